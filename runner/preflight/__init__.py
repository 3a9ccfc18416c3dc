"""`fluxrun check`: everything that can be known before the runs start."""
