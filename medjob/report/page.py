"""HTML pages. Each is one file, and loads nothing from a network."""

from __future__ import annotations

import math
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


_environment.filters["number"] = _number


def write_page(path: Path, template: str, charts: dict[str, str], **values: Any) -> None:
    """Render `template` to `path`. `charts` holds SVG texts by name."""
    page = _environment.get_template(template).render(
        charts={name: Markup(svg) for name, svg in charts.items()}, **values
    )
    path.write_text(page, encoding="utf-8", errors="replace")
