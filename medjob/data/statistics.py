"""Statistics of the training rows, for `statistics.json` and the report."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from medjob.data.labels import trained_tokens

_PERCENTILES = (5, 25, 50, 75, 95, 99, 100)


@dataclass(slots=True)
class TokenCounts:
    """Token counts of training rows, collected in batches."""

    totals: list[int] = field(default_factory=list)
    answers: list[int] = field(default_factory=list)
    sources: Counter[str] = field(default_factory=Counter)
    numbers: list[int] = field(default_factory=list)
    """The position of each row's source in `sources`."""

    def add(self, rows: list[dict[str, Any]]) -> None:
        """Count a batch of rows of TRAIN_SCHEMA."""
        self.totals.extend(len(row["input_ids"]) for row in rows)
        self.answers.extend(map(trained_tokens, rows))
        self.sources.update(row["source"] for row in rows)
        position = {name: number for number, name in enumerate(self.sources)}
        self.numbers.extend(position[row["source"]] for row in rows)

    def summary(self, max_length: int) -> dict[str, Any]:
        """Return sums and percentiles. Rows over `max_length` tokens are overlong."""
        total = np.array(self.totals or [0])
        answer = np.array(self.answers or [0])
        overlong = total > max_length
        return {
            "rows": len(self.totals),
            "tokens": int(total.sum()),
            "answer_tokens": int(answer.sum()),
            "overlong_rows": int(overlong.sum()),
            "overlong_fraction": float(overlong.mean()),
            "row_tokens": percentiles(total),
            "answer_row_tokens": percentiles(answer),
            "sources": dict(sorted(self.sources.items())),
        }

    def by_source(self, max_length: int) -> dict[str, dict[str, float]]:
        """Return the number of rows and the lengths of each source, by its name."""
        total = np.array(self.totals)
        answer = np.array(self.answers)
        numbers = np.array(self.numbers)
        return {
            name: {
                "rows": rows,
                "median": float(np.median(total[numbers == number])),
                "p95": float(np.percentile(total[numbers == number], 95)),
                "longest": int(total[numbers == number].max()),
                "answer_median": float(np.median(answer[numbers == number])),
                "overlong_rows": int((total[numbers == number] > max_length).sum()),
            }
            for number, (name, rows) in enumerate(self.sources.items())
        }


def percentiles(values: Any) -> dict[str, float]:
    """Return percentiles of a list of numbers, such as `p50`."""
    return {f"p{p}": float(np.percentile(values, p)) for p in _PERCENTILES}
