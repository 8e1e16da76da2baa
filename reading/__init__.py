"""One reader of files for all commands and the Space. It imports nothing of this repository and is published with the Space."""
