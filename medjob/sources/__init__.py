"""Models and data sets: where they come from, how they are pinned, and their local copies."""
