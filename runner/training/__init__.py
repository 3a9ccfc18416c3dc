"""One run, whole: phases, step loop, recorder."""
