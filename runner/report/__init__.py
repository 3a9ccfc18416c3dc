"""The results page, comparisons and tables. Needs no torch."""
