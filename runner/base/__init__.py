"""Facts about a base model from its files and configs. Needs no torch."""
