"""One reader of files for every door. It imports nothing of this repository, and is copied beside the Space."""
