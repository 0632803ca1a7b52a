"""Rows: reading, cleaning, deduplication, splits and prompts."""
