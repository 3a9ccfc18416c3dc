"""Images, captions, placeholders and aspect-ratio buckets."""
