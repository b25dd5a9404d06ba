"""Arithmetic that knows nothing of networks: scaled arrays, precision, determinants."""
