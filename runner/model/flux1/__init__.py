"""FLUX.1: loading, text encoders, latents, transformer."""
