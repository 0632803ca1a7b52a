"""`python -m medjob` is the `medjob` command."""

from medjob.cli import main

if __name__ == "__main__":
    main()
