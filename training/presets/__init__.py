"""Training configurations that are shipped, by name."""
