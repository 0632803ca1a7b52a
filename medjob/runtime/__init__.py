"""Processes, files, signals and secrets, without any knowledge of models or runs."""
