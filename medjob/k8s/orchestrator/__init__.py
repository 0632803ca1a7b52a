"""The pod that creates the Job of each stage as soon as its inputs are published."""
