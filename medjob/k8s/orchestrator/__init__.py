"""The pod that creates each stage's Job as soon as its inputs are published."""
