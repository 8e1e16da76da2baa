"""The parts of predict.py: input records, a restartable output, and output rows in three formats."""
