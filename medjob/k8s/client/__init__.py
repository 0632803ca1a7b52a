"""Submit and control a run from a user's machine."""
