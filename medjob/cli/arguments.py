"""What the verbs of the command line share: flags, and the run files that they name."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from medjob.errors import ConfigError

if TYPE_CHECKING:
    from medjob.config import RunFile


class Parser(argparse.ArgumentParser):
    """argparse, with the table's code for a wrong flag."""

    def error(self, message: str) -> NoReturn:
        """End with the usage, the message and exit code 64."""
        self.print_usage(sys.stderr)
        sys.stderr.write(f"error: {message}\nhint: {self.prog} --help\n")
        sys.exit(ConfigError.exit_code)


def add_verb(
    verbs: argparse._SubParsersAction[Parser],
    name: str,
    summary: str,
    example: str,
    takes_store: bool = False,
) -> argparse.ArgumentParser:
    """A verb that takes run files; with `takes_store`, a store's address instead."""
    verb = verbs.add_parser(
        name, help=summary, description=f"{summary}.", epilog=f"example: {example}"
    )
    where = verb.add_mutually_exclusive_group(required=True)
    where.add_argument(
        "-f",
        "--file",
        action="append",
        type=Path,
        metavar="FILE",
        help="run file (repeatable; later ones win)",
    )
    if takes_store:
        where.add_argument(
            "--store",
            metavar="URI",
            help="look into this store, without a run file: file://, s3:// or gs://",
        )
    verb.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="a.b=c",
        help="set one value, written as in YAML (repeatable)",
    )
    verb.add_argument(
        "--debug", action="store_true", help="show debug messages, and tracebacks instead of errors"
    )
    return verb


def run_file_of(arguments: argparse.Namespace) -> RunFile:
    """The job that `-f` and `--set` name."""
    from medjob.config import load_run_file

    sets = list(arguments.set)
    if getattr(arguments, "model", None):
        sets.append(f"run.evaluate.extra_models={arguments.model}")
    return load_run_file(arguments.file, sets)
