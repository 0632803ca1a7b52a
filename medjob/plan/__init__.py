"""Memory, time and cost of a training before it runs. Nothing here imports torch."""
