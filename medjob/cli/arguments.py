"""Arguments that several commands share."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, TypeAlias

from medjob.errors import ConfigError

if TYPE_CHECKING:
    from medjob.config import RunFile


class Parser(argparse.ArgumentParser):
    """Argument parser that exits with code 64 on a wrong flag, where argparse exits with 2."""

    def error(self, message: str) -> NoReturn:
        """Print the usage and the message, and exit with code 64."""
        self.print_usage(sys.stderr)
        sys.stderr.write(f"error: {message}\nhint: {self.prog} --help\n")
        sys.exit(ConfigError.exit_code)


Commands: TypeAlias = "argparse._SubParsersAction[Parser]"  # noqa: SLF001  no public name exists


def add_command(commands: Commands, name: str, summary: str, *examples: str) -> Parser:
    """Add a command that takes run files with `-f` and `--set`."""
    command = _new_command(commands, name, summary, examples)
    _add_file(command, required=True)
    _add_set(command)
    _add_debug(command)
    return command


def add_store_command(commands: Commands, name: str, summary: str, *examples: str) -> Parser:
    """Add a command that reads a store, which a run file or `--store` names."""
    command = _new_command(commands, name, summary, examples)
    source = command.add_mutually_exclusive_group(required=True)
    _add_file(source)
    source.add_argument(
        "--store",
        metavar="URI",
        help="use this store instead of a run file's: file://, s3:// or gs://",
    )
    command.add_argument(
        "--run",
        metavar="NAME",
        help="name of the run; required with --store, except for ls (default: the run file's)",
    )
    _add_set(command)
    _add_debug(command)
    return command


def add_release_command(commands: Commands, name: str, summary: str, *examples: str) -> Parser:
    """Add a command that takes the name of an installed release."""
    command = _new_command(commands, name, summary, examples)
    command.add_argument("release", metavar="RELEASE", help="name of the release")
    command.add_argument(
        "-n",
        "--namespace",
        metavar="NAME",
        help="namespace of the release (default: the kubeconfig's)",
    )
    command.add_argument(
        "--context", metavar="NAME", help="kubeconfig context (default: the current one)"
    )
    _add_debug(command)
    return command


def _new_command(commands: Commands, name: str, summary: str, examples: tuple[str, ...]) -> Parser:
    return commands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog="\n".join(["examples:", *(f"  {example}" for example in examples)]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _add_file(command: argparse._ActionsContainer, required: bool = False) -> None:
    command.add_argument(
        "-f",
        "--file",
        action="append",
        type=Path,
        metavar="FILE",
        help="run file (repeatable; later files override earlier ones)",
        required=required,
    )


def _add_set(command: Parser) -> None:
    command.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="a.b=c",
        help="set one value of the run file, written as in YAML (repeatable)",
    )


def _add_debug(command: Parser) -> None:
    command.add_argument(
        "--debug",
        action="store_true",
        help="log debug messages, and print a traceback when an error occurs",
    )


def load_run_file_of(arguments: argparse.Namespace) -> RunFile:
    """Load the run file that `-f` and `--set` specify."""
    from medjob.config import load_run_file

    run_file = load_run_file(arguments.file, arguments.set)
    arguments.sensitive = run_file.run.prepare.sensitive  # for messages of errors
    return run_file
