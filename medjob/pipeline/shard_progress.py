"""Progress of a stage over all of its shards, from what each of them stores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, Literal

from medjob.artifacts.artifact import Artifact
from medjob.runtime.files import parse_json

State = Literal["published", "running", "waiting"]
STATES: tuple[State, ...] = ("published", "running", "waiting")
_RATES = ("per_s", "tokens_per_second")  # of running shards
_SPENT = ("endpoint_requests", "endpoint_tokens", "endpoint_cost")  # of all shards


@dataclass(frozen=True, slots=True)
class ShardProgress:
    """State and progress of one shard."""

    index: int
    state: State
    numbers: dict[str, float] = field(default_factory=dict)
    """What `progress_of` returned for the shard."""


def progress_of(artifact: Artifact) -> dict[str, float]:
    """Return the numbers of an artifact's progress.json; empty if it has none or is damaged."""
    blob = artifact.store.get(artifact.path("progress.json"))
    try:
        event = parse_json(blob.data if blob else b"{}")
    except ValueError:
        return {}
    if not isinstance(event, dict) or ("step" in event and "total" not in event):
        return {}
    return {name: value for name, value in event.items() if isinstance(value, int | float)}


def total_progress(shards: Sequence[ShardProgress]) -> dict[str, float]:
    """Return the progress of all shards together, in the form of `progress_of`.

    Steps, totals, the speeds of running shards and what endpoints were paid are added. A shard that
    has not reported yet counts as long as the others, because all shards have about the same number
    of rows. The time left is that of the shard that needs longest; one that waits is taken to start
    now, with the speed of the running ones.
    """
    reported = [shard for shard in shards if "step" in shard.numbers]
    if not reported:
        return {}
    length = fmean(shard.numbers["total"] for shard in reported)
    silent = sum("step" not in shard.numbers and shard.state != "published" for shard in shards)
    total = sum(shard.numbers["total"] for shard in reported) + silent * length
    found = {"step": sum(shard.numbers["step"] for shard in reported), "total": round(total)}
    running = [shard for shard in reported if shard.state == "running"]
    for name in _RATES:
        rates = [shard.numbers[name] for shard in running if name in shard.numbers]
        found |= {name: round(sum(rates), 3)} if rates else {}
    for name in _SPENT:
        spent = [shard.numbers[name] for shard in shards if name in shard.numbers]
        found |= {name: sum(spent)} if spent else {}
    eta_s = _eta_s(shards, running, length)
    return found if eta_s is None else found | {"eta_s": eta_s}


def _eta_s(
    shards: Sequence[ShardProgress], running: Sequence[ShardProgress], length: float
) -> int | None:
    speeds = [shard.numbers["per_s"] for shard in running if shard.numbers.get("per_s")]
    if not speeds:
        return None
    usual = fmean(speeds)
    times = [0.0]
    for shard in shards:
        if shard.state != "published":
            left = shard.numbers.get("total", length) - shard.numbers.get("step", 0)
            own = shard.numbers.get("per_s") if shard.state == "running" else None
            times.append(left / (own or usual))
    return round(max(times))


def shard_list(shards: Sequence[ShardProgress]) -> dict[State, list[int]]:
    """Return the indices of the shards in each state."""
    return {state: [shard.index for shard in shards if shard.state == state] for state in STATES}


def describe(indices: dict[str, Any]) -> str:
    """Say how many shards are in each state, and which: `3 shards: 1 published (0), ...`."""
    count = sum(map(len, indices.values()))
    parts = [
        f"{len(indices[state])} {state} ({_ranges(indices[state])})"
        for state in STATES
        if indices.get(state)
    ]
    return f"{count} shards: {', '.join(parts)}"


def _ranges(indices: Sequence[int]) -> str:
    """Write sorted numbers as ranges: `0-2, 5`."""
    ranges: list[list[int]] = []
    for index in indices:
        if ranges and index == ranges[-1][1] + 1:
            ranges[-1][1] = index
        else:
            ranges.append([index, index])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in ranges)
