"""Models that several processes hold together."""
