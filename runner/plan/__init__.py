"""A spec and the facts that it names become phases. Pure: touches no file and needs no torch."""
