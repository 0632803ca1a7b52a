"""Commands that read and clean up a store: ls, pull, verify and gc."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from medjob.cli.arguments import Commands, add_store_command, load_run_file_of
from medjob.errors import ConfigError, InputError
from medjob.runtime.printable import printable

if TYPE_CHECKING:
    from medjob.store import Store


def add(commands: Commands) -> None:
    """Add the commands."""
    ls = add_store_command(
        commands,
        "ls",
        "list artifacts and their sizes",
        "medjob ls -f jobs/demo.yaml",
        "medjob ls --store s3://bucket/prefix",
    )
    ls.set_defaults(call=_ls)
    pull = add_store_command(
        commands,
        "pull",
        "download one artifact and verify every byte",
        "medjob pull export -f jobs/demo.yaml -o ./model",
    )
    pull.add_argument(
        "artifact",
        metavar="STAGE[/KEY]",
        help="artifact to download; KEY is needed if the stage has published several",
    )
    pull.add_argument(
        "-o", "--output", type=Path, metavar="FOLDER", help="destination (default: ./STAGE)"
    )
    pull.set_defaults(call=_pull)
    verify = add_store_command(
        commands,
        "verify",
        "read and verify every byte of a run's artifacts and checkpoints",
        "medjob verify -f jobs/demo.yaml",
    )
    verify.set_defaults(call=_verify)
    gc = add_store_command(
        commands,
        "gc",
        "list objects that nothing refers to, and delete them with --delete",
        "medjob gc -f jobs/demo.yaml",
        "medjob gc -f jobs/demo.yaml --delete",
    )
    gc.add_argument(
        "--delete",
        action="store_true",
        help="delete the listed objects; without this flag nothing changes",
    )
    gc.set_defaults(call=_gc)


def _open(arguments: argparse.Namespace) -> tuple[Store, str | None]:
    """Open the store that the arguments name; return it and the run's name, if they give one."""
    from medjob.config.load import store_ref
    from medjob.store import open_store

    if arguments.store is None:
        run_file = load_run_file_of(arguments)
        return open_store(run_file.cluster.store), arguments.run or run_file.run.name
    return open_store(store_ref(arguments.store, arguments.set)), arguments.run


def _open_run(arguments: argparse.Namespace) -> tuple[Store, str]:
    """Open the store as `_open` does.

    Raises:
        ConfigError: the arguments do not name a run.
    """
    store, run = _open(arguments)
    if run is None:
        raise ConfigError(
            "--store needs --run NAME as well",
            f"medjob ls --store {arguments.store} lists the runs",
        )
    return store, run


def _ls(arguments: argparse.Namespace) -> None:
    from medjob.cli.tables import artifacts_table, runs_table

    store, run = _open(arguments)
    print(artifacts_table(store, run) if run else runs_table(store))


def _pull(arguments: argparse.Namespace) -> None:
    from medjob.artifacts.published import find_published
    from medjob.cli.tables import size_of
    from medjob.pipeline import maintenance

    store, run = _open_run(arguments)
    artifact, manifest = find_published(store, run, arguments.artifact)
    folder = arguments.output or Path(artifact.stage)
    maintenance.pull(artifact, manifest, folder)
    size = size_of(sum(file.size for file in manifest.files))
    files = len(manifest.files)
    print(printable(f"{artifact.prefix}: {files} files, {size}, verified, in {folder}"))


def _verify(arguments: argparse.Namespace) -> None:
    from medjob.cli.tables import verify_table
    from medjob.pipeline import maintenance

    store, run = _open_run(arguments)
    results = list(maintenance.verify(store, run))
    print(verify_table(results))
    problems = [problem for result in results for problem in result.problems]
    for problem in problems:
        print(printable(problem))
    if problems:
        files = sum(result.files for result in results)
        raise InputError(f"{run}: {len(problems)} of {files} files are damaged or missing")


def _gc(arguments: argparse.Namespace) -> None:
    from medjob.cli.tables import garbage_table, size_of
    from medjob.pipeline import maintenance

    store, run = _open_run(arguments)
    found = maintenance.find_garbage(store, run)
    print(garbage_table(found))
    size = size_of(sum(garbage.size for garbage in found))
    if not arguments.delete:
        if found:
            print(f"nothing was deleted; --delete frees {size}")
        return
    for garbage in found:
        maintenance.delete(store, garbage)
    print(f"deleted; {size} freed")
