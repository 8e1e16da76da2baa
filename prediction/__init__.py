"""What predict.py is made of: the records of the input, a restartable output, and the forms of its rows."""
