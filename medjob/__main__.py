"""`python -m medjob` is the `medjob` command."""

from medjob.cli.main import entry

if __name__ == "__main__":
    entry()
