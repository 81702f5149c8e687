"""Calibration of `MoDESConfig` on a model: importances of layers, then thresholds that skip a share of the experts."""
