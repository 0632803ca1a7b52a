"""What `prepare` counted, as plain data for JSON and the report."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

_PERCENTILES = (5, 25, 50, 75, 95, 99, 100)


@dataclass(slots=True)
class Tokens:
    """Lengths of training rows, gathered batch by batch."""

    totals: list[int] = field(default_factory=list)
    prompts: list[int] = field(default_factory=list)
    sources: Counter[str] = field(default_factory=Counter)

    def add(self, rows: list[dict[str, Any]]) -> None:
        """Count rows of TRAIN_SCHEMA."""
        self.totals.extend(len(row["input_ids"]) for row in rows)
        self.prompts.extend(row["prompt_tokens"] for row in rows)
        self.sources.update(row["source"] for row in rows)

    def summary(self, max_length: int) -> dict[str, Any]:
        """Sums and percentiles; `overlong_fraction` is the share of rows over `max_length` tokens."""
        total, prompt = np.array(self.totals or [0]), np.array(self.prompts or [0])
        return {
            "rows": len(self.totals),
            "tokens": int(total.sum()),
            "answer_tokens": int((total - prompt).sum()),
            "overlong_rows": int((total > max_length).sum()),
            "overlong_fraction": float((total > max_length).mean()),
            "row_tokens": percentiles(total),
            "answer_row_tokens": percentiles(total - prompt),
            "sources": dict(sorted(self.sources.items())),
        }


def percentiles(values: Any) -> dict[str, float]:
    """Named percentiles of a list of numbers."""
    return {f"p{p}": float(np.percentile(values, p)) for p in _PERCENTILES}
