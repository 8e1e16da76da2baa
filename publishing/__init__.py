"""A checkpoint on its way to the Hub: its files, its card, the export, the commit."""
