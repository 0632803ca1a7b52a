"""What a stage has spent at an endpoint, over all its attempts, and the limit that it must keep."""

from __future__ import annotations

import threading
import time
import uuid
from collections import Counter
from collections.abc import Mapping

from medjob.artifacts.finished_rows import FinishedRows
from medjob.artifacts.progress import Progress
from medjob.artifacts.shard import WHOLE, Shard
from medjob.config.endpoints import Endpoint
from medjob.errors import GateError

_STORE_EVERY_S = 5.0
_TEMPLATE_TOKENS = 64  # more than chat templates add; corrected by the replies
_ESTIMATED_TOKENS_PER_BYTE = 0.5  # more than most text has
COUNTS = ("requests", "input_tokens", "output_tokens", "logprobs", "structured", "unreadable")


class Spending:
    """Counts requests and tokens, in any thread. The counts are stored beside the finished rows, so
    that the next attempt continues with them."""

    def __init__(
        self,
        name: str,
        endpoint: Endpoint,
        currency: str,
        finished: FinishedRows,
        progress: Progress,
        shard: Shard = WHOLE,
    ) -> None:
        """Read what this attempt's stage has spent already.

        Args:
            name: Name of the endpoint in `cluster.endpoints`.
            shard: Each shard may spend the same share of the limit, of which what was spent with
                another number of shards is taken off before.
        """
        self._name = name
        self._endpoint = endpoint
        self._currency = currency
        self._finished = finished
        self._progress = progress
        self._shard = str(shard)
        self._lock = threading.Lock()
        self._counts, others, before = self._read(shard.count)
        self._others = others + before
        self._limit: float | None = None
        if endpoint.max_cost is not None:
            self._limit = (endpoint.max_cost - self._cost(before)) / shard.count
        self._stored = Counter(self._counts)
        self._stored_at = time.monotonic()
        self._reserved = 0.0
        self._added_tokens = _TEMPLATE_TOKENS

    def _read(self, count: int) -> tuple[Counter[str], Counter[str], Counter[str]]:
        """The stored counts of this shard, of the others, and of those of another division."""
        own, others, before = Counter[str](), Counter[str](), Counter[str]()
        for row in self._finished.read(self._kind).values():
            same_division = str(row["shard"]).endswith(f"-of-{count}")
            group = own if row["shard"] == self._shard else others if same_division else before
            group.update({name: row[name] for name in COUNTS if name in row})
        return own, others, before

    def _cost(self, counts: Mapping[str, int]) -> float:
        return self._endpoint.cost(counts["input_tokens"], counts["output_tokens"])

    @property
    def _kind(self) -> str:
        return f"spending-{self._name}"

    def figures(self) -> Mapping[str, float]:
        """What the stage has spent in all of its attempts: counts, and the cost in the currency of
        the prices."""
        with self._lock:
            total = self._counts + self._others
        return {**{name: total[name] for name in COUNTS}, "cost": round(self._cost(total), 6)}

    def reserve(self, prompt_bytes: int, output_tokens: int) -> float | None:
        """Reserve the most that a prompt can cost. None if the limit does not allow it.

        The tokens of a prompt are not known before it is sent. A byte of text is at most one token.
        """
        cost = self._most(prompt_bytes, output_tokens)
        with self._lock:
            if self._limit is not None and self._spent() + cost > self._limit:
                return None
            self._reserved += cost
            return cost

    def _spent(self) -> float:
        return self._cost(self._counts) + self._reserved

    def release(self, reserved: float) -> None:
        """Give back what `reserve` returned, once the prompt is answered and counted."""
        with self._lock:
            self._reserved -= reserved

    def _most(self, prompt_bytes: int, output_tokens: int) -> float:
        return self._endpoint.cost(prompt_bytes + self._added_tokens, output_tokens)

    def add(
        self,
        prompt_bytes: int,
        output_bytes: int,
        input_tokens: int | None,
        output_tokens: int | None,
    ) -> None:
        """Count one answered request. Tokens that the endpoint does not report are estimated."""
        if input_tokens is None:
            input_tokens = round(_ESTIMATED_TOKENS_PER_BYTE * prompt_bytes) + _TEMPLATE_TOKENS
        if output_tokens is None:
            output_tokens = round(_ESTIMATED_TOKENS_PER_BYTE * output_bytes)
        with self._lock:
            self._added_tokens = max(self._added_tokens, input_tokens - prompt_bytes)
            self._counts["requests"] += 1
            self._counts["input_tokens"] += input_tokens
            self._counts["output_tokens"] += output_tokens
        self._show()

    def _show(self) -> None:
        """Show the total beside the progress: of this shard, so that those of all can be added."""
        counts = self._counts
        self._progress.show(
            endpoint_requests=counts["requests"],
            endpoint_tokens=counts["input_tokens"] + counts["output_tokens"],
            endpoint_cost=round(self._cost(counts), 6),
        )

    def count(self, name: str) -> None:
        """Count one prompt as `logprobs`, `structured` or `unreadable`."""
        with self._lock:
            self._counts[name] += 1

    def store(self, now: bool = False) -> None:
        """Store what has been counted since the last time, at most every 5 s unless `now`."""
        with self._lock:
            new = self._counts - self._stored
            if not new or not (now or time.monotonic() - self._stored_at > _STORE_EVERY_S):
                return
            self._stored = Counter(self._counts)
            self._stored_at = time.monotonic()
        self._finished.add(self._kind, [{"id": uuid.uuid4().hex, "shard": self._shard, **new}])

    def limit_reached(self, left: int) -> GateError:
        """The error for `left` prompts that the limit does not allow."""
        self.store(now=True)
        counts = self._counts
        tokens = counts["input_tokens"] + counts["output_tokens"]
        return GateError(
            f"endpoint {self._name} ({self._endpoint.host}): {self._cost(counts):.4g} of at most "
            f"{self._limit:.4g} {self._currency} are spent ({counts['requests']:,} requests, "
            f"{tokens:,} tokens), and the next request could exceed the limit; {left:,} prompts of "
            "this step are left",
            f"raise cluster.endpoints.{self._name}.maxCost and run the same command: it continues "
            "with what is left, and no finished row is asked again",
        )
