"""Mistakes in the plugin's bookkeeping that its tests have to notice, one per variable of its state."""

MUTATIONS = {}
