"""Verbs that look into a store: ls, pull, verify, gc."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from medjob.cli.arguments import Parser, add_verb, run_file_of
from medjob.errors import ConfigError, InputError

if TYPE_CHECKING:
    from medjob.store import Store


def add(verbs: argparse._SubParsersAction[Parser]) -> None:
    """Add them to the command line."""
    ls = add_verb(
        verbs,
        "ls",
        "list artifacts with their sizes",
        "medjob ls -f jobs/demo.yaml; medjob ls --store s3://bucket/prefix",
        True,
    )
    pull = add_verb(
        verbs,
        "pull",
        "download one artifact, every byte verified",
        "medjob pull export -f jobs/demo.yaml -o ./model",
        True,
    )
    pull.add_argument(
        "artifact", metavar="STAGE[/KEY]", help="what to download; KEY where several are published"
    )
    pull.add_argument(
        "-o", "--output", type=Path, metavar="FOLDER", help="where to (default: ./STAGE)"
    )
    verify = add_verb(
        verbs,
        "verify",
        "read and verify every byte of a run's artifacts and checkpoints",
        "medjob verify -f jobs/demo.yaml",
        True,
    )
    gc = add_verb(
        verbs,
        "gc",
        "list what nothing refers to any more; with --delete, remove it",
        "medjob gc -f jobs/demo.yaml --delete",
        True,
    )
    gc.add_argument(
        "--delete", action="store_true", help="remove it; without this flag nothing is changed"
    )
    for verb, call in ((ls, _ls), (pull, _pull), (verify, _verify), (gc, _gc)):
        verb.add_argument("--run", metavar="NAME", help="with --store: which run")
        verb.set_defaults(call=_placed(call))


def _placed(call: Callable[..., None]) -> Callable[[argparse.Namespace], None]:
    return lambda arguments: call(arguments, *_place(arguments))


def _place(arguments: argparse.Namespace) -> tuple[Store, str | None]:
    """The store that a verb looks into, and the run."""
    from medjob.config.load import store_ref
    from medjob.store import open_store

    if arguments.store is None:
        run_file = run_file_of(arguments)
        return open_store(run_file.cluster.store), arguments.run or run_file.run.name
    if arguments.run is None and arguments.verb != "ls":
        raise ConfigError(
            "--store: needs --run NAME as well",
            f"medjob ls --store {arguments.store} lists the runs",
        )
    return open_store(store_ref(arguments.store, arguments.set)), arguments.run


def _ls(_: argparse.Namespace, store: Store, run: str | None) -> None:
    from medjob.cli.tables import artifacts_table, runs_table

    print(artifacts_table(store, run) if run else runs_table(store))


def _pull(arguments: argparse.Namespace, store: Store, run: str) -> None:
    from medjob.cli.tables import size_of
    from medjob.pipeline import maintenance

    artifact, manifest = maintenance.find_published(store, run, arguments.artifact)
    folder = arguments.output or Path(artifact.stage)
    maintenance.pull(artifact, manifest, folder)
    print(
        f"{artifact.prefix}: {len(manifest.files)} files, {size_of(sum(file.size for file in manifest.files))}, verified, in {folder}"
    )


def _verify(_: argparse.Namespace, store: Store, run: str) -> None:
    from medjob.cli.tables import checks_table
    from medjob.pipeline import maintenance

    checks = list(maintenance.verify(store, run))
    print(checks_table(checks))
    problems = [problem for check in checks for problem in check.problems]
    for problem in problems:
        print(problem)
    if problems:
        raise InputError(
            f"{run}: {len(problems)} of {sum(check.files for check in checks)} files are damaged or missing"
        )


def _gc(arguments: argparse.Namespace, store: Store, run: str) -> None:
    from medjob.cli.tables import size_of, waste_table
    from medjob.pipeline import maintenance

    found = maintenance.waste(store, run)
    print(waste_table(found))
    size = size_of(sum(waste.size for waste in found))
    if not arguments.delete:
        if found:
            print(f"nothing was removed; --delete frees {size}")
        return
    for waste in found:
        maintenance.remove(store, waste)
    print(f"removed, {size} freed")
