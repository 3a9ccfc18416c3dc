"""Files, locks, hashing, errors and terminal output. Knows nothing of FLUX and needs no torch."""
