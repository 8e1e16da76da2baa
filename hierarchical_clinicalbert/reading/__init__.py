"""Read files, for all commands and the Space, which publishes a copy.

Of this repository, only the taxonomy is imported.
"""
