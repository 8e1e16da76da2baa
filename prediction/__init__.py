"""The parts of predict.py: records, model, rows in four formats, a restartable output on disks and in stores, the Ray job."""
