"""The parts of predict.py: records, model, rows in three formats, a restartable output on disks and in stores, the Ray job."""
