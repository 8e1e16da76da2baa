"""Publish a checkpoint: its model card, its exported forms, and its commit on the Hub."""
