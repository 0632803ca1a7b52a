"""fetch: pin every model and data set of the run, and copy those that stages could not reach or rely on."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from medjob.config.base import ModelRef
from medjob.errors import InputError, MedjobError, RetryError, translate
from medjob.sources import references
from medjob.sources.buckets import Original, naming
from medjob.sources.copies import copy_name
from medjob.sources.pins import PINS, Pins
from medjob.sources.references import Reference, named_references
from medjob.stage import FetchContext, Metrics

_UNUSED = ("*.bin", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack", "*.onnx*", "original/*")


def run(context: FetchContext) -> Metrics:
    """Write pins.json: commits of hub ids, and digests of everything else (without paths of this machine).

    What is in buckets is copied to `mirror/`, and so are models of a hub where the store is a bucket. Else those are
    downloaded to the hub's own cache: later stages need no network.
    """
    named = {reference.key: (key, reference) for key, reference in named_references(context.run)}
    remote = {
        name: (key, reference)
        for name, (key, reference) in named.items()
        if references.is_remote(reference)
    }
    hub, buckets = {}, {}
    with context.progress.task("pin", total=len(named), done=len(named) - len(remote)) as task:
        for name, (key, reference) in remote.items():
            if references.is_bucket(reference):
                buckets[name] = _pin_bucket(context, key, reference)
            else:
                hub[name] = _pin_hub(context, reference)
            task.advance()
    here = {name: reference for name, (_, reference) in named.items() if name not in remote}
    packages = {
        name: context.pins[name]
        for name, reference in here.items()
        if references.is_package(reference)
    }
    local = tuple(sorted({context.pins[name] for name in here if name not in packages}))
    (context.output / PINS).write_text(
        Pins(hub=hub, buckets=buckets, packages=packages, local=local).dump()
    )
    return {"local": len(here), "hub": len(hub), "buckets": len(buckets)}


def _pin_bucket(context: FetchContext, key: str, reference: Reference) -> str:
    """Copy what stands in a bucket; the digest of it, the same that it has in a local folder."""
    known = context.pins.get(reference.key)
    if known and copy_name(reference, known) in context.copies:
        return known
    folder = context.work / "copy"
    try:
        Original.find(reference, context.store).copy(folder)
        pin = references.local_pin(references.at(reference, folder))
        if known not in (None, pin):
            raise InputError(
                "has changed since this run has pinned it",
                "put back what stood there, or give the run another name",
            )
    except MedjobError as error:
        raise naming(key, reference, error) from None
    name = copy_name(reference, pin)
    target = context.output / name
    target.parent.mkdir(exist_ok=True)
    if target.exists() or name in context.copies:  # the same content under another address
        shutil.rmtree(folder)
    else:
        folder.rename(target)
    return pin


def _pin_hub(context: FetchContext, reference: Reference) -> str:
    """The commit of a hub id, chosen once for the run, with a copy of a model where stages will need one."""
    known = context.pins.get(reference.key)
    if not isinstance(reference, ModelRef):
        return known or _commit(reference)
    if not context.copies_hub:
        if known is None:
            _download(reference, known := _commit(reference), None)
        return known
    commit = known or _commit(reference)
    name = copy_name(reference, commit)
    if name not in context.copies and not (context.output / name).exists():
        _download(reference, commit, context.output / name)
    return commit


def _commit(reference: Reference) -> str:
    """The commit that a hub id stands for now. Raises as `_asking`."""
    from huggingface_hub import HfApi

    with _asking(reference) as (name, kind):
        return str(HfApi().repo_info(name, repo_type=kind, revision=reference.revision).sha)


def _download(reference: ModelRef, commit: str, folder: Path | None) -> None:
    """Download a model to `folder`, or to the hub's cache. Raises as `_asking`."""
    from huggingface_hub import snapshot_download

    with _asking(reference) as (name, _):
        snapshot_download(name, revision=commit, local_dir=folder, ignore_patterns=list(_UNUSED))
    if folder is not None:
        shutil.rmtree(
            folder / ".cache", ignore_errors=True
        )  # the hub's own notes, with times in them
        if not any(folder.glob("*.safetensors")):
            raise InputError(
                f"{name}: has no .safetensors weights, and no others are copied",
                "convert it, and name a folder or bucket",
            )


@contextlib.contextmanager
def _asking(reference: Reference) -> Iterator[tuple[str, str]]:
    """Name and kind of what the hub is asked about, with its errors as ours.

    Raises:
        InputError: there is no such id, or it is gated.
        RetryError: the hub cannot be reached.
    """
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    name, kind = (
        references.name_of(reference),
        "model" if isinstance(reference, ModelRef) else "dataset",
    )
    if os.environ.get("HF_HUB_OFFLINE") == "1":
        raise RetryError(
            f"{name}: HF_HUB_OFFLINE is set, so the hub is not asked",
            "unset it for `medjob fetch`, or name a local folder",
        )
    try:
        yield name, kind
    except GatedRepoError:
        raise InputError(
            f"{name}: access is gated",
            f"accept its terms at https://huggingface.co/{name} and set HF_TOKEN",
        ) from None
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise InputError(
            f"{name}: the hub has no such {kind}: {str(error).splitlines()[0]}"
        ) from None
    except (HfHubHTTPError, OSError) as error:
        if translate(error) is not error:  # it is this disk
            raise
        raise RetryError(
            f"{name}: the hub cannot be reached: {type(error).__name__}",
            "try again, or name a local folder or file",
        ) from None
    except Exception as error:
        # The hub's client raises its transport's own errors (of httpx or requests, by version) for a closed network.
        if type(error).__module__.split(".")[0] in (
            "httpx",
            "httpx2",
            "httpcore",
            "httpcore2",
            "requests",
        ):
            raise RetryError(
                f"{name}: the hub cannot be reached: {error}",
                "try again, or name a local folder or file",
            ) from None
        raise
