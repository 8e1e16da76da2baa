"""What predict.py is made of: an output that survives the end of the process, and the forms of its rows."""
