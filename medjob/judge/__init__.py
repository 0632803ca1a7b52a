"""Judges: scores of answers, calibration, and preference pairs."""
