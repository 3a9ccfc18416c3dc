"""The content-addressed cache of latents and text embeddings."""
