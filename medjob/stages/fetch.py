"""fetch: pin every model and data set of the run, and copy those that later stages cannot reach.

It also checks the judge and the models to compare, which are used only after the training."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medjob.artifacts.published import find_published
from medjob.config.base import ADAPTER_CONFIG, ADAPTER_WEIGHTS, ModelRef
from medjob.errors import ConfigError, InputError, MedjobError, RetryError
from medjob.evaluate.preflight import check_later_models
from medjob.sources import references
from medjob.sources.buckets import Original, with_run_file_key
from medjob.sources.copies import copy_name
from medjob.sources.hub import RepoType, hub_errors
from medjob.sources.locations import Location, locate
from medjob.sources.pins import PINS, Pins
from medjob.sources.references import Reference, named_references
from medjob.stage import FetchContext, Metrics
from medjob.store import open_store

_UNUSED = ("*.bin", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack", "*.onnx*", "original/*")


def run(context: FetchContext) -> Metrics:
    """Write pins.json: commits of hub ids, and digests of everything else, without local paths.

    Everything in buckets and every model of another run is copied to `mirror/`, and if the store is
    a bucket, so are models from a hub. Otherwise those are downloaded to the hub's own cache.
    Either way, later stages need no network.
    """
    named = {reference.key: (path, reference) for path, reference in named_references(context.run)}
    local = {name: ref for name, (_, ref) in named.items() if not references.is_remote(ref)}
    hub: dict[str, str] = {}
    buckets: dict[str, str] = {}
    with context.extras.progress.task("pin", total=len(named), done=len(local)) as task:
        for name, (path, reference) in named.items():
            if references.is_copied(reference):
                buckets[name] = _pin_copied(context, path, reference)
            elif references.is_hub(reference):
                hub[name] = _pin_hub(context, reference)
            else:
                continue  # pinned already, by its digest
            task.advance()
    pins = context.extras.pins
    packages = {name: pins[name] for name, ref in local.items() if references.is_package(ref)}
    digests = tuple(sorted({pins[name] for name in local if name not in packages}))
    written = Pins(hub=hub, buckets=buckets, packages=packages, local=digests)
    (context.output / PINS).write_text(written.dump())
    for path, reference in named_references(context.run):
        if isinstance(reference, ModelRef):
            _check_kind(context, path, reference, {**hub, **buckets})
    check_later_models(context.run, lambda model: _location(context, model, {**hub, **buckets}))
    return {"local": len(local), "hub": len(hub), "buckets": len(buckets)}


def _location(context: FetchContext, model: ModelRef, pins: Mapping[str, str]) -> Location | None:
    """Where this machine has a model. A copy that an earlier fetch published was checked then."""
    pin = pins.get(model.key)
    if pin is not None and (context.output / copy_name(model, pin)).is_dir():
        return Location(model.key, str(context.output / copy_name(model, pin)))
    if pin is not None and copy_name(model, pin) in context.extras.copies:
        return None
    return locate(model, {**context.extras.pins, **pins}, context.extras.models)


def _check_kind(context: FetchContext, path: str, model: ModelRef, pins: Mapping[str, str]) -> None:
    """Refuse an adapter that is named as a model, and what is no LoRA adapter as `run.adapter`."""
    location = _location(context, model, pins)
    if location is None or location.converted:
        return
    file = _file_of(location, ADAPTER_CONFIG)
    adapter = _read_adapter(path, model, file) if file is not None else None
    is_model = _file_of(location, "config.json") is not None
    if path == "run.adapter":
        _check_adapter(model, location, adapter)
    elif adapter is not None and not is_model:
        base = adapter.get("base_model_name_or_path")
        raise ConfigError(
            f"{path}: {model} is a LoRA adapter, not a model",
            f"set run.base_model={base} and run.adapter={model}"
            if path == "run.base_model"
            else f"export it as a merged model first, or name its base model {base}",
        )


def _read_adapter(path: str, model: ModelRef, file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: {model}: cannot read {ADAPTER_CONFIG}: {error}") from None
    if not isinstance(values, dict):
        raise InputError(f"{path}: {model}: {ADAPTER_CONFIG} is not an object")
    return values


def _check_adapter(model: ModelRef, location: Location, adapter: dict[str, Any] | None) -> None:
    if adapter is None:
        raise ConfigError(
            f"run.adapter: {model} is a model, not a LoRA adapter",
            f"set run.base_model={model}, and leave out run.adapter",
        )
    kind = adapter.get("peft_type")
    if kind != "LORA" or not isinstance(adapter.get("r"), int):
        raise InputError(
            f"run.adapter: {model} is not a complete LoRA adapter (peft_type {kind}, r "
            f"{adapter.get('r')})",
            "name a LoRA adapter that PEFT saved, or a merged model as run.base_model",
        )
    if _file_of(location, ADAPTER_WEIGHTS) is None:
        raise InputError(
            f"run.adapter: {model} has no {ADAPTER_WEIGHTS}",
            "save it again with PEFT's save_pretrained",
        )


def _file_of(location: Location, name: str) -> Path | None:
    """A file of a model on this disk, or of one that was downloaded to the hub's cache."""
    if location.on_hub:
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(location.path, name, revision=location.revision)
        return Path(found) if isinstance(found, str) else None
    file = Path(location.path, name)
    return file if file.is_file() else None


def _pin_copied(context: FetchContext, path: str, reference: Reference) -> str:
    """Copy a model or data set from a bucket, or a model of another run. Its pin is the digest that
    a local copy would have.

    Args:
        path: Path of the reference in the run file, for messages.
    """
    known = context.extras.pins.get(reference.key)
    if known and copy_name(reference, known) in context.extras.copies:
        return known
    folder = context.work / "copy"
    try:
        if isinstance(reference, ModelRef) and references.is_run(reference):
            artifact, manifest = find_published(
                open_store(context.extras.store), *references.artifact_of(reference)
            )
            artifact.fetch(manifest, folder)
        else:
            Original.find(reference, context.extras.store).copy(folder)
        pin = references.local_pin(references.with_path(reference, folder))
        if known not in (None, pin):
            raise InputError(
                "changed after this run had pinned it",
                "restore the earlier objects, or give the run another name",
            )
    except MedjobError as error:
        raise with_run_file_key(path, reference, error) from None
    name = copy_name(reference, pin)
    target = context.output / name
    target.parent.mkdir(exist_ok=True)
    if target.exists() or name in context.extras.copies:  # another address has the same contents
        shutil.rmtree(folder)
    else:
        folder.rename(target)
    return pin


def _pin_hub(context: FetchContext, reference: Reference) -> str:
    """Choose the commit of a hub id, once per run, and download a model that later stages need."""
    known = context.extras.pins.get(reference.key)
    if not isinstance(reference, ModelRef):
        return known or _commit(reference)
    if not context.extras.copies_hub:
        if known is None:
            known = _commit(reference)
            _download(reference, known, None)
        return known
    commit = known or _commit(reference)
    name = copy_name(reference, commit)
    if name not in context.extras.copies and not (context.output / name).exists():
        _download(reference, commit, context.output / name)
    return commit


def _commit(reference: Reference) -> str:
    """The current commit of a hub id. Raises as `hub_errors`."""
    from huggingface_hub import HfApi

    repo_type: RepoType = "model" if isinstance(reference, ModelRef) else "dataset"
    name = references.name_of(reference)
    _check_online(name)
    with hub_errors(name, repo_type):
        info = HfApi().repo_info(name, repo_type=repo_type, revision=reference.revision)
        return str(info.sha)


def _download(reference: ModelRef, commit: str, folder: Path | None) -> None:
    """Download a model to `folder`, or to the hub's cache. Raises as `hub_errors`."""
    from huggingface_hub import snapshot_download

    name = reference.id
    _check_online(name)
    with hub_errors(name, "model"):
        snapshot_download(name, revision=commit, local_dir=folder, ignore_patterns=list(_UNUSED))
    if folder is None:
        return
    shutil.rmtree(folder / ".cache", ignore_errors=True)  # the hub's metadata, with times in it
    if not any(folder.glob("*.safetensors")):
        raise InputError(
            f"{name}: no .safetensors weights, and other formats are not copied",
            "convert the weights, and name a local directory or a bucket",
        )


def _check_online(name: str) -> None:
    if os.environ.get("HF_HUB_OFFLINE") == "1":
        raise RetryError(
            f"{name}: cannot be pinned while HF_HUB_OFFLINE is set",
            "unset it for `medjob fetch`, or name a local directory",
        )
