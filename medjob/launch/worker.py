"""The program of a training process: `python -m medjob.launch.worker DESCRIPTOR SPEC_FILE`.

Only `medjob.launch.ranks` and `external` start it.
"""

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
from medjob.runtime import streams
from medjob.runtime.link import Event, Link, LinkHandler
from medjob.stage import get_stage


def main(descriptor: str, spec_file: str) -> None:
    """Run the stage, report its metrics or its error to the parent, and end the process.

    `descriptor` is the file descriptor of the connection to the parent.
    """
    streams.protect()
    spec = Spec.load(Path(spec_file).read_text())
    link = Link(socket.socket(fileno=int(descriptor)), spec.world, spec.resume_step)
    logging.basicConfig(level=logging.WARNING, handlers=[LinkHandler(link)], force=True)
    logging.getLogger("medjob").setLevel(logging.DEBUG if spec.debug else logging.INFO)
    code, report = _run_and_report(spec, link)
    if code in (0, Preempted.exit_code):
        _finish_trackers()
    link.send(report)  # the parent may kill this process as soon as it has the report
    sys.stdout.flush()
    sys.stderr.flush()
    if spec.external:
        link.wait_for_end()
    # Not sys.exit: the destructor of a process group can hang after a peer is lost.
    os._exit(code)


def _run_and_report(spec: Spec, link: Link) -> tuple[int, Event]:
    """Run the stage. Returns the exit code and the last event."""
    try:
        report: Event = {"event": "done", "metrics": _run(spec, link)}
        json.dumps(report)  # raises if a metric cannot be sent
        return 0, report
    except BaseException as error:
        return _describe(translate(error, str(spec.work)))


def _run(spec: Spec, link: Link) -> dict[str, Any]:
    """Join the process group and call the stage's function."""
    entry = get_stage(spec.stage).entry()
    from medjob.train.distributed import join, leave
    from medjob.train.network import record_nccl, report_network

    record_nccl(spec.work)
    join(spec.world, spec.rendezvous, spec.listener)
    report_network(spec.world, spec.work)
    metrics = entry(spec.context(link))
    leave()
    return metrics


def _finish_trackers() -> None:
    """Let W&B upload its remaining data, because `os._exit` skips its exit hook."""
    try:
        if "wandb" in sys.modules:
            sys.modules["wandb"].finish()
    except Exception as error:
        logging.getLogger(__name__).warning(
            "wandb did not finish: %s: %s", type(error).__name__, error
        )


def _describe(error: BaseException) -> tuple[int, Event]:
    """Exit code and event of an error."""
    if isinstance(error, MedjobError):
        code, message, hint = error.exit_code, error.message, error.hint
    else:
        code, message, hint = 1, f"{type(error).__name__}: {error}", ""
    trace = "".join(traceback.format_exception(error)) if code in (1, RetryError.exit_code) else ""
    return code, {
        "event": "error",
        "code": code,
        "message": message,
        "hint": hint,
        "traceback": trace,
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
