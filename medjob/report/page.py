"""HTML pages. Each is one file, and loads nothing from a network."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

_environment = Environment(
    loader=PackageLoader("medjob.report"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def _number(value: Any) -> str:
    """Format a number with four digits, and thousands separators. An unknown one is a hyphen."""
    if value is None:
        return "-"
    if isinstance(value, float) and not math.isfinite(value):
        return f"{value:g}"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    is_large_whole = value == int(value) and abs(value) >= 1000
    if isinstance(value, int) or is_large_whole:
        return f"{value:,}"
    return f"{value:.4g}"


def _percent(value: float | None) -> str:
    """Format a share without digits after the point. An unknown one is a hyphen."""
    return "-" if value is None else f"{100 * value:.0f} %"


def _interval(figures: Mapping[str, Any]) -> str:
    """Format a value and its interval, of which the ends may be unknown."""
    if figures["low"] is None:
        return f"{figures['value']:.3f}"
    return f"{figures['value']:.3f} [{figures['low']:.3f}, {figures['high']:.3f}]"


def _percent_interval(figures: Mapping[str, float]) -> str:
    """Format a share and its interval in percent."""
    return "{:.0f} % [{:.0f}, {:.0f}]".format(
        *(100 * figures[name] for name in ("value", "low", "high"))
    )


for _filter in (_number, _percent, _interval, _percent_interval):
    _environment.filters[_filter.__name__.removeprefix("_")] = _filter


def write_page(path: Path, template: str, charts: dict[str, str], **values: Any) -> None:
    """Render `template` to `path`. `charts` holds SVG texts by name."""
    page = _environment.get_template(template).render(
        charts={name: Markup(svg) for name, svg in charts.items()}, **values
    )
    path.write_text(page, encoding="utf-8", errors="replace")
