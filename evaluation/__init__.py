"""What is measured on a trained model: scores, calibration, guarantees, the lexical head, plots."""
