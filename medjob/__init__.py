"""medjob: a run file goes in, a better medical language model comes out."""

__version__ = "0.1.0"
