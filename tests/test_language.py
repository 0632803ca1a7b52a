"""Code, docs, charts, run files and tests are written in plain language."""

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCANNED = (
    *("medjob", "docs", "charts", "jobs", "images", "bench", "tests"),
    *("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "Makefile"),
)
SUFFIXES = {".py", ".md", ".yaml", ".tpl", ".txt"}
# (pattern, better wording). A space also matches a line break and the `#` of a comment.
PHRASES = (
    (
        r"(?<!here\s)\bis no (file|folder|text|list|number|known|valid|readable|JSON|column|model)",
        "is not a ..., is not valid ..., unknown ...",
    ),
    (r"\bis of no use\b|\bof no use\b", "does not help, is useless"),
    (r"\bfault of (medjob|ours)\b", "a bug in medjob"),
    (r"\bwhoever\b", "name who does it"),
    (r"\b(is|are|was|were|be|been|being) told\b(?! apart)", "receives, is asked to, is reported"),
    (r"\b(tells?|told) of\b", "reports"),
    (r"\bmend(s|ed|ing)?\b", "fix"),
    (r"\breckon(s|ed|ing)?\b", "estimate, compute"),
    (r"\ball well\b", "OK"),
    (r"\bstands\b", "is, is in, means"),
    (r"\bbears\b", "has"),
    (r"\bgo(es)? on from\b", "continue from"),
    (r"\bwhole lines?\b|\bwalks? the line\b|\b(step|stage|stages) of the line\b", "pipeline"),
    (r"\bbesides\b", "also, in addition"),
    (r"\ban? \w+( \w+)? of (its|their|one's) own\b(?! \w)", "its own ..., a separate ..."),
    (r"\b(of|than|from|are|is|not|see|for) (ours|theirs)\b", "name the thing"),
    (r"\bnobody is here\b", "stdin is not a terminal"),
    (r"\bone \w+ an? (device|node|row|line|stage|run|process|file|rank|GPU|kind)\b", "per"),
    (r"\b(tokens|rows|steps|requests|GB|MB|KB|GiB|MiB|USD) an? (second|minute|hour)\b", "per"),
    (r"\bwhat is published\b", "the published artifact"),
    (r"\blets? us in\b", "grants access"),
    (r"\brests? on\b", "depends on"),
    (r"\b(can|could|to) be had\b", "is available"),
    (r"\bbut for (the|those|its|their)\b", "except"),
    (r"\bso that neither\b", "so that ... does not ..."),
    (r"\b(anew|thereof|therein|whereof)\b", "again, from the start, in it"),
    (r"\bstranger\b", "unrelated client"),
    (r"\bhindrance\b", "say what it does"),
    (r"\b(store|bucket|server|hub|API) (is|was) away\b", "unreachable"),
    (r"\btried again\b", "retried"),
    (r"\bis there already\b", "already exists"),
    (r"\b(as it does|at hand)\b", "leave it out, or name the fact"),
)


def scanned_files() -> list[Path]:
    command = ["git", "ls-files", "-z", *SCANNED]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    files = [ROOT / name for name in done.stdout.split("\0") if name]
    return [
        file
        for file in files
        if file.is_file() and (file.suffix in SUFFIXES or file.name == "Makefile")
    ]


def findings(text: str) -> Iterator[tuple[int, str]]:
    """Line number and complaint for each phrase in a text."""
    for pattern, better in PHRASES:
        for match in re.finditer(pattern.replace(" ", r"[\s#]+"), text, re.IGNORECASE):
            number = text.count("\n", 0, match.start()) + 1
            phrase = " ".join(match[0].replace("#", " ").split())
            yield number, f"{phrase!r}, better: {better}"


@pytest.mark.parametrize("file", scanned_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_prose_is_plain(file: Path) -> None:
    if file != Path(__file__):
        found = findings(file.read_text(encoding="utf-8"))
        lines = [f"{file.relative_to(ROOT)}:{number}: {text}" for number, text in found]
        if lines:
            pytest.fail("\n".join(lines), pytrace=False)


def test_phrases_are_found_across_line_breaks() -> None:
    text = "# the path is no\n# folder, so mend it: one process a\n# device. There is no file."
    assert list(findings(text)) == [
        (1, "'is no folder', better: is not a ..., is not valid ..., unknown ..."),
        (2, "'mend', better: fix"),
        (2, "'one process a device', better: per"),
    ]
