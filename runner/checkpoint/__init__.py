"""Checkpoint files and their asynchronous writer."""
