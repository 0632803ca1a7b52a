"""What a training process runs: `python -m medjob.launch.worker SOCKET SPEC`, started by `ranks`, never by a user."""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
import traceback
from pathlib import Path
from typing import Any

from medjob.errors import MedjobError, Preempted, RetryError, translate
from medjob.launch.spec import Spec
from medjob.runtime.link import Link, LinkHandler
from medjob.stage import get_stage


def main(descriptor: str, spec_file: str) -> None:
    """Run one stage in this process and end it: 0, or the code of what went wrong."""
    spec = Spec.load(Path(spec_file).read_text())
    link = Link(socket.socket(fileno=int(descriptor)), spec.world, spec.resume_step)
    logging.basicConfig(level=logging.WARNING, handlers=[LinkHandler(link)], force=True)
    logging.getLogger("medjob").setLevel(logging.DEBUG if spec.debug else logging.INFO)
    code = 0
    try:
        last = json.dumps({"event": "done", "metrics": _run(spec, link)})
    except BaseException as error:
        error = translate(error)
        code = error.exit_code if isinstance(error, MedjobError) else 1
        last = json.dumps(_described(error, code))
    if code in (0, Preempted.exit_code):
        _finish_trackers()
    link.send(json.loads(last))  # after which the parent may end this process
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # a process group whose peers are gone may hang in its destructor


def _finish_trackers() -> None:
    """Let W&B send what it still holds: its own hook at the interpreter's end is never reached."""
    try:
        if "wandb" in sys.modules:
            sys.modules["wandb"].finish()
    except Exception as error:
        logging.getLogger(__name__).warning(
            "wandb did not finish: %s: %s", type(error).__name__, error
        )


def _run(spec: Spec, link: Link) -> dict[str, Any]:
    entry = get_stage(spec.stage).entry()
    from medjob.train.distributed import join, leave
    from medjob.train.network import record_nccl, report_network

    record_nccl(spec.work)
    join(spec.world, spec.rendezvous, spec.listener)
    report_network(spec.world, spec.work)
    metrics = entry(spec.context(link))
    leave()
    return metrics


def _described(error: BaseException, code: int) -> dict[str, Any]:
    message = (
        error.message if isinstance(error, MedjobError) else f"{type(error).__name__}: {error}"
    )
    hint = error.hint if isinstance(error, MedjobError) else ""
    trace = "".join(traceback.format_exception(error)) if code in (1, RetryError.exit_code) else ""
    return {"event": "error", "code": code, "message": message, "hint": hint, "traceback": trace}


if __name__ == "__main__":
    main(*sys.argv[1:])
