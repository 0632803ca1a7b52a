"""fetch: pin every model and data set of the run."""

from __future__ import annotations

import json
import os

from medjob.config.base import ModelRef
from medjob.errors import InputError, RetryError
from medjob.sources import Reference, is_remote, references, spelling
from medjob.stage import Metrics, RowContext


def run(context: RowContext) -> Metrics:
    """Write pins.json: a commit for each hub id, and the digests of everything local (without its paths).

    Models of a hub are downloaded to its cache, so that later stages need no network.
    """
    commits = {}
    named = {spelling(reference): reference for reference in references(context.run)}
    remote = {name: reference for name, reference in named.items() if is_remote(reference)}
    with context.progress.task("pin", total=len(named), done=len(named) - len(remote)) as task:
        for name, reference in remote.items():
            commits[name] = context.pins.get(name) or _commit(reference)
            task.advance()
    (context.output / "pins.json").write_text(
        json.dumps(
            {"hub": commits, "local": sorted({context.pins[name] for name in named if name not in remote})}, indent=1, sort_keys=True
        )
    )
    return {"local": len(named) - len(remote), "hub": len(remote)}


def _commit(reference: Reference) -> str:
    """The commit that a hub id stands for now; a model's files come along, so that later stages need no hub.

    Raises:
        InputError: there is no such id, or it is gated.
        RetryError: the hub cannot be reached.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    name = reference.id if isinstance(reference, ModelRef) else reference.path
    if os.environ.get("HF_HUB_OFFLINE") == "1":
        raise RetryError(f"{name}: HF_HUB_OFFLINE is set, so the hub is not asked", "unset it for `medjob fetch`, or name a local folder")
    kind = "model" if isinstance(reference, ModelRef) else "dataset"
    try:
        info = HfApi().repo_info(name, repo_type=kind, revision=reference.revision)
        if kind == "model":
            snapshot_download(name, revision=info.sha, ignore_patterns=["*.bin", "*.pt", "*.pth", "*.gguf", "original/*"])
    except GatedRepoError:
        raise InputError(f"{name}: access is gated", f"accept its terms at https://huggingface.co/{name} and set HF_TOKEN") from None
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise InputError(f"{name}: the hub has no such {kind}: {str(error).splitlines()[0]}") from None
    except (HfHubHTTPError, OSError) as error:
        raise RetryError(
            f"{name}: the hub cannot be reached: {type(error).__name__}", "try again, or name a local folder or file"
        ) from None
    except Exception as error:
        # The hub's client raises its transport's own errors (of httpx or requests, by version) for a closed network.
        if type(error).__module__.split(".")[0] in ("httpx", "httpx2", "httpcore", "httpcore2", "requests"):
            raise RetryError(f"{name}: the hub cannot be reached: {error}", "try again, or name a local folder or file") from None
        raise
    return str(info.sha)
