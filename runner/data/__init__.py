"""Images, captions, placeholders and aspect-ratio buckets. Needs no torch."""
