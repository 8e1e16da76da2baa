"""Implement predict.py: read records, run the model here or on Ray, and write rows to an output
that can be resumed.
"""
