"""Models that transformers does not have, one package each; importing a package registers its Auto classes."""
