"""`make goldens`: render the chart into golden/. `git diff` then shows the effect of a change."""

from pathlib import Path

from tests.charts.rendering import KIND, SPOT, render

FOLDER = Path(__file__).parent / "golden"
GOLDENS = {
    FOLDER / f"{values.stem.removesuffix('-values')}.yaml": values for values in (KIND, SPOT)
}

if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for path, values in GOLDENS.items():
        path.write_text(render(values).text)
