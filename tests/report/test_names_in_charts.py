"""Charts and pages with names that mean something to matplotlib or to HTML."""

import html
import warnings
from pathlib import Path

from medjob.report.charts import bars, histogram, intervals, scatter
from medjob.report.page import write_page

NAMES = (
    "from_$5_to_$10.jsonl",
    "$$",
    "\\frac{$",
    "$\\undefined$",
    "模型一",
    "데이터.jsonl",
    "_hidden",
    "a < b & c",
    "<script>",
    "line\nbreak",
    "{{ x }}",
    "%s",
    " ",
)


def test_names_are_shown_as_they_are() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        charts = [
            bars(dict.fromkeys(NAMES, 3), "rows of $5 and $10"),
            intervals({"win rate over m_$5_x_$9": dict.fromkeys(NAMES, (0.5, 0.4, 0.6))}, "label"),
        ]
    for chart in charts:
        for name in NAMES:
            assert " ".join(name.split()) in html.unescape(chart), name
        assert "<script>" not in chart
    assert "rows of $5 and $10" in charts[0]
    assert "win rate over m_$5_x_$9" in charts[1]


def test_long_names_are_shortened_and_keep_their_own_bars() -> None:
    names = {f"{'x' * 200}{number}{'y' * 200}": number for number in range(3)}
    chart = bars(names, "rows")
    assert chart.count("…") == 3
    assert "x" * 100 not in chart


def test_degenerate_values_are_drawn() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for values in ([], [1.0], [0.0, 0.0], [float("nan"), 1.0], [float("inf")]):
            assert "<svg" in histogram(values, "score")
        assert "<svg" in intervals({}, "label")
        assert "<svg" in bars({}, "rows")
        assert "<svg" in scatter([], [], "x", "y")
        many = {f"model {n}": (0.5, 0.4, 0.6) for n in range(12)}
        assert "model 11" in intervals({"metric": many}, "label")


def test_equal_numbers_give_equal_bytes() -> None:
    assert bars({"$a$": 1}, "rows") == bars({"$a$": 1}, "rows")


def test_page_escapes_names_and_shows_unknown_numbers(tmp_path: Path) -> None:
    row = {
        "metric": "win rate over <b>$5</b>",
        "better": "higher",
        "about": "a & b",
        "cells": ["inf ", "-"],
    }
    write_page(
        tmp_path / "report.html",
        "evaluate.html",
        {"intervals": "<svg></svg>"},
        r={
            "rows": dict.fromkeys(("open", "multiple_choice", "harmful", "benign"), 1),
            "judge": "<i>judge</i>",
            "judge_note": "",
            "multiple_choice": None,
            "corrected": None,
            "pairwise": [],
        },
        models=["<b>$5</b>", "模型"],
        table=[row],
        differences=[],
        answers=[],
        shows_rows=True,
    )
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<b>$5" not in page
    assert "&lt;b&gt;$5&lt;/b&gt;" in page
    assert "模型" in page
    assert "<i>judge" not in page
