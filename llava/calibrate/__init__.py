"""Calibration: which pruning for a model, some pictures and a budget (`python -m llava.calibrate`)."""
