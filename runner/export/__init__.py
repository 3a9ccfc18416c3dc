"""Trained weights as files for other programs, and what each file must hold."""
