"""Scores, calibration, coverage guarantees, the lexical head and plots of a trained model."""
