"""The spec: its schema, reading it from TOML, and messages about what is wrong with it."""
