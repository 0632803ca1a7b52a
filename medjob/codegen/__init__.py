"""Documentation and chart files that are generated from the code."""
