"""Generated reference pages are up to date."""

from pathlib import Path

import pytest

from medjob.codegen.docs import pages

FOLDER = Path(__file__).parent.parent / "docs/reference"


@pytest.mark.parametrize("name", sorted(pages()))
def test_reference_is_up_to_date(name: str) -> None:
    assert (FOLDER / name).read_text() == pages()[name].rstrip() + "\n", "run `make generate`"


def test_every_field_is_described() -> None:
    rows = [line for line in pages()["config.md"].splitlines() if line.startswith("| `")]
    assert len(rows) > 150
    assert [row for row in rows if row.endswith("|  |")] == []


def test_every_section_of_the_run_file_has_a_table() -> None:
    text = pages()["config.md"]
    for section in ("run.prepare.safety", "run.prepare.contamination", "cluster.profiles.NAME"):
        assert f"\n## {section}\n" in text
