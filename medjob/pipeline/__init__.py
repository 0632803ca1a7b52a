"""Runs stages in order: keys, planning, execution and maintenance of the store."""
