"""Models and data sets: where they come from, what pins them, and their local copies."""
