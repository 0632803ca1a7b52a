"""Charts as SVG text.

They contain no dates and no random ids, so equal numbers give equal bytes.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
from cycler import cycler

mpl.use("Agg")
import matplotlib.pyplot as plt

_NAME_LENGTH = 40  # characters
_LEGEND_COLUMNS = 3
_STYLE = {
    "svg.hashsalt": "medjob",
    # The reader's browser has fonts for scripts that matplotlib's own font lacks, such as Chinese.
    "svg.fonttype": "none",
    "text.parse_math": False,  # names of files and models may contain dollar signs
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.prop_cycle": cycler(color=["#8d99ae", "#2a6f97", "#bc4b51", "#5b8e7d", "#f4a259"]),
}


def histogram(values: Sequence[float], label: str, limit: float | None = None) -> str:
    """Draw the distribution of `values`, with a line at `limit`."""
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(figsize=(5, 2.4), layout="constrained")
        axes.hist([value for value in values if math.isfinite(value)], bins=40, color="#2a6f97")
        if limit is not None and max(values, default=0) > limit * 0.6:
            axes.axvline(limit, color="#bc4b51", linestyle="--", label=f"limit {limit:g}")
            axes.legend(frameon=False)
        axes.set_xlabel(label)
        axes.set_ylabel("rows")
        return _svg(figure)


def bars(values: Mapping[str, float], label: str) -> str:
    """Draw one horizontal bar per name."""
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(figsize=(5, 0.9 + 0.35 * len(values)), layout="constrained")
        drawn = axes.barh(range(len(values)), list(values.values()), color="#2a6f97")
        axes.bar_label(drawn, fmt="%g", padding=3)
        axes.set_yticks(range(len(values)), list(map(_shortened, values)))
        axes.invert_yaxis()
        axes.set_xlabel(label)
        return _svg(figure)


def intervals(rows: Mapping[str, Mapping[str, tuple[float, float, float]]], label: str) -> str:
    """Draw a point with its interval (value, low, high) for each metric and model."""
    with plt.rc_context(_STYLE):
        models = list(dict.fromkeys(model for values in rows.values() for model in values))
        legend_rows = math.ceil(len(models) / _LEGEND_COLUMNS)
        height = 1 + 0.5 * len(rows) + 0.2 * legend_rows
        figure, axes = plt.subplots(figsize=(6, height), layout="constrained")
        for number, model in enumerate(models):
            # Models are side by side around the position of their metric.
            offset = (number - (len(models) - 1) / 2) * min(0.2, 0.8 / len(models))
            x: list[float] = []
            y: list[float] = []
            below: list[float] = []
            above: list[float] = []
            for position, values in enumerate(rows.values()):
                if model in values:
                    value, low, high = values[model]
                    x.append(value)
                    y.append(position + offset)
                    below.append(max(0.0, value - low))
                    above.append(max(0.0, high - value))
            axes.errorbar(x, y, xerr=[below, above], fmt="o", capsize=3, label=_shortened(model))
        axes.set_yticks(range(len(rows)), list(map(_shortened, rows)))
        axes.invert_yaxis()
        axes.set_xlabel(label)
        if models:
            columns = min(len(models), _LEGEND_COLUMNS)
            figure.legend(frameon=False, loc="outside upper right", ncols=columns)
        return _svg(figure)


def scatter(x: Sequence[float], y: Sequence[float], x_label: str, y_label: str) -> str:
    """Draw one point per row."""
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(figsize=(4, 3), layout="constrained")
        axes.scatter(x, y, s=10, alpha=0.5, color="#2a6f97")
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        return _svg(figure)


def _shortened(name: str) -> str:
    """Leave out the middle of a long name. A legend ignores empty names and those that begin with
    an underscore, so they get an invisible space."""
    name = " ".join(name.split())
    if len(name) > _NAME_LENGTH:
        half = _NAME_LENGTH // 2
        name = f"{name[:half]}…{name[-half:]}"
    return f"\u200b{name}" if not name or name.startswith("_") else name


def _svg(figure: Any) -> str:
    buffer = io.StringIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    plt.close(figure)
    text = buffer.getvalue()
    return text[text.index("<svg") :]
