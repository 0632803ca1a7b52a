"""What is measured, as commands that print a ratio taken side by side in one run."""
