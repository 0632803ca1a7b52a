"""Scoring answers, checking the scorer, and making pairs."""
