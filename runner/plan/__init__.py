"""From a spec and the facts that it names to the phases of a run, with their resume keys. Pure: touches no file."""
