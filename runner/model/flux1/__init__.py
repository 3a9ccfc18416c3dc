"""FLUX.1, the first model family; `family.py` is what training sees of it."""
