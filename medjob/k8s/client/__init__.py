"""Commands that submit and control a run from a user's machine."""
