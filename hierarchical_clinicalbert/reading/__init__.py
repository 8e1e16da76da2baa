"""Read files, for all commands and the Space. It imports nothing else of this repository, because the Space publishes a copy."""
