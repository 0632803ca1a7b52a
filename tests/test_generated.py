"""What is generated agrees with the code."""

from pathlib import Path

import pytest

from medjob.codegen.docs import pages

FOLDER = Path(__file__).parent.parent / "docs/reference"


@pytest.mark.parametrize("name", sorted(pages()))
def test_reference_is_up_to_date(name: str) -> None:
    assert (FOLDER / name).read_text() == pages()[name].rstrip() + "\n", "run `make generate`"


def test_every_field_has_a_meaning() -> None:
    for line in pages()["config.md"].splitlines():
        if line.startswith("| `"):
            assert not line.endswith("|  |"), line
