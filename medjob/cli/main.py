"""The command line. Commands import what they need when they run, so that `--help` is fast."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

from medjob import __version__
from medjob.cli import cluster, environment, pipeline, preview, store
from medjob.cli.arguments import Parser
from medjob.errors import EXIT_CODES, MedjobError, UnexpectedError, translate, without_text
from medjob.runtime import secrets, signals, streams
from medjob.runtime.printable import printable

_EXAMPLES = """examples:
  medjob run -f jobs/demo.yaml                       run the whole pipeline on this machine
  medjob run -f jobs/demo.yaml --dry-run             list what it would run
  medjob preview -f jobs/demo.yaml --rows 1          show rows as the model will see them
  medjob plan -f jobs/o1-llama.yaml --gpu H100       estimate memory, steps, hours and cost
  medjob sft -f jobs/demo.yaml --set run.sft.learning_rate=1e-4
  medjob show -f jobs/qa-smollm2.yaml -f jobs/presets/qa-fast.yaml
  medjob evaluate -f jobs/demo.yaml --model ./my-model
  medjob pull export -f jobs/demo.yaml -o ./model    download the merged model and verify it

exit codes:
"""


def entry() -> NoReturn:
    """Run `main`, and exit without waiting for threads.

    A thread that waits for an unreachable store would keep the process alive for minutes.
    """
    streams.protect()
    os.umask(os.umask(0o077) | 0o077)  # what medjob writes can hold rows of patients
    try:
        main()
    except SystemExit as ended:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):  # the stream is closed
                stream.flush()
        os._exit(ended.code if isinstance(ended.code, int) else 1)


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run one command and exit with its code."""
    signals.install()
    arguments = parser().parse_args(argv)
    from medjob.artifacts.progress import setup_logging

    setup_logging(arguments.debug)
    try:
        environment.check()
        secrets.install()
        _run(arguments)
    except BrokenPipeError:  # the process that reads our output has ended, such as `head`
        sys.stderr.close()
    except Exception as error:
        sensitive = getattr(arguments, "sensitive", False)
        if arguments.debug and not sensitive:
            traceback.print_exc()
        known = translate(error)
        sys.exit(_report(without_text(known) if sensitive else known))
    sys.exit(0)


def _run(arguments: argparse.Namespace) -> None:
    arguments.call(arguments)


def _report(error: BaseException) -> int:
    """Print an error and return its exit code."""
    if isinstance(error, MedjobError):
        sys.stderr.write(printable(f"error: {error}\n", line_breaks=True))
        return error.exit_code
    name = "" if isinstance(error, UnexpectedError) else f"{type(error).__name__}: "
    sys.stderr.write(
        printable(f"error: unexpected {name}{error}\n", line_breaks=True)
        + "hint: this is a bug in medjob; --debug prints the traceback\n"
    )
    return 1


def parser() -> Parser:
    """Build the parser of all commands."""
    codes = "\n".join(f"  {code:>3}  {meaning}" for code, meaning in EXIT_CODES.items())
    top = Parser(
        prog="medjob",
        description="A run file goes in, a better medical language model comes out.",
        epilog=_EXAMPLES + codes,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"medjob {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    pipeline.add_run(commands)
    preview.add(commands)
    pipeline.add_inspect(commands)
    store.add(commands)
    cluster.add(commands)
    return top
