"""Generators of docs/reference and of the generated files in charts/medjob."""
