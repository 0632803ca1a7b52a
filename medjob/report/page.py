"""HTML pages: one file each, nothing loaded from anywhere."""

from __future__ import annotations

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
    """A figure as a person reads it: four digits, thousands apart."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return (
        f"{value:,}"
        if isinstance(value, int) or (value == int(value) and abs(value) >= 1000)
        else f"{value:.4g}"
    )


_environment.filters["number"] = _number


def write_page(path: Path, template: str, charts: dict[str, str], **values: Any) -> None:
    """Render `template` to `path`; `charts` are SVG texts by name."""
    page = _environment.get_template(template).render(
        charts={name: Markup(svg) for name, svg in charts.items()}, **values
    )
    path.write_text(page, encoding="utf-8")
