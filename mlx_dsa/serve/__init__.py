"""A server for many conversations at once."""
