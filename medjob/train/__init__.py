"""Models and trainers."""
