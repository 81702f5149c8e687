"""Training and evaluation of the small model in `fastmmoe/scenes/checkpoint/`."""
