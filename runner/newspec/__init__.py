"""`fluxrun new`: specs from templates, picture folders, cards and other programs' command lines."""
