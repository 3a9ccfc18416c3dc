"""A run's folder: its files, lease, state, index record. Needs no torch."""
