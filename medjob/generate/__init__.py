"""Engines that write and score text."""
