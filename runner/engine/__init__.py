"""The queue supervisor, its worker processes, and the slots they use."""
