"""From spec files and a runs folder to planned jobs, with estimates of memory, time and cache use. Needs no torch."""
