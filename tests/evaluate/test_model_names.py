"""Compared models never share a name, a column or finished rows."""

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from medjob.config import RunFile
from medjob.config.judge import EvaluateParams
from medjob.errors import ConfigError
from medjob.evaluate import models
from medjob.pipeline.runner import Pipeline
from medjob.sources.locations import Location
from medjob.stage import get_stage


@pytest.mark.parametrize(
    "models",
    [
        ["base"],
        ["sft"],
        ["dpo"],
        ["x", "x"],
        ["x", "./x"],
        ["x", "x/"],
        ["x", "y/../x"],
        ["~/x", "~/x/"],
        ["org/x", "org/x"],
        ["org/x", "./org/x"],
        ["s3://bucket/x", "s3://bucket/x/"],
        ["package:x", "package:x"],
        [{"id": "org/x", "revision": "a"}, {"id": "org/x", "revision": "a"}],
        [{"id": "org/x", "revision": "a"}, "org/x@a"],
    ],
)
def test_names_that_are_taken_are_refused(
    make_run_file: Callable[..., RunFile], models: list[Any]
) -> None:
    changes = {"run": {"evaluate": {"extra_models": models}}}
    with pytest.raises(ConfigError, match=r"extra_models\.\d: .*(is taken|only once)"):
        make_run_file(changes)


DIFFERENT = (
    *("模型一", "模型二", "模型", "модель", "x", "X", "./base", "./sft", "./Base", "base-", "org/x"),
    *("org--x", "org-x", "org_x", "org.x", "org x", "org/X", "a" * 300 + "x", "a" * 300 + "y", "../x"),
    *("s3://bucket/x", "gs://bucket/x", "package:x", "m_$5_x_$9", "\u00e9", "e\u0301", "x%2F", "-", "--", "?"),
)  # fmt: skip


def label_for(reference: Any, params: EvaluateParams, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr("medjob.sources.references.local_pin", lambda _: "sha256:0")
    locations = SimpleNamespace(
        run=SimpleNamespace(evaluate=params),
        location=lambda each: Location(each.key, each.id, True, each.revision),
    )
    return models.label_of(locations, str(reference))  # type: ignore[arg-type]


def test_labels_differ_and_are_portable_path_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    revisions = [{"id": "org/x", "revision": revision} for revision in ("a", "b", "A")]
    params = EvaluateParams.model_validate({"extra_models": [*DIFFERENT, *revisions]})
    labels = [label_for(each, params, monkeypatch) for each in params.extra_models]
    assert len({label.lower() for label in labels}) == len(labels)
    assert not {"base", "sft", "dpo"} & set(labels)
    for label in labels:
        assert len(label) <= 60
        assert label.isascii()
        assert label.replace("-", "").isalnum()


def test_label_changes_with_the_model_in_a_directory(tmp_path: Path, tiny: Path) -> None:
    """An unfinished stage may be resumed after the directory has been replaced."""
    folder = tmp_path / "model"
    shutil.copytree(tiny, folder)
    params = EvaluateParams.model_validate({"extra_models": [str(folder)]})
    context: Any = SimpleNamespace(
        run=SimpleNamespace(evaluate=params), location=lambda _: Location.of_folder(folder)
    )
    before = models.label_of(context, str(folder))
    assert models.label_of(context, str(folder)) == before
    (folder / "generation_config.json").write_text('{"temperature": 0.5}')
    assert models.label_of(context, str(folder)) != before


def test_models_with_similar_names_have_their_own_figures(
    make_run_file: Callable[..., RunFile], tiny: Path, tmp_path: Path
) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    names = ["模型$一$", "模型$二$", "base"]
    for seed, name in enumerate(names):
        shutil.copytree(tiny, tmp_path / name)
        file = tmp_path / name / "model.safetensors"
        torch.manual_seed(seed)
        weights = {key: torch.randn_like(value) * 0.3 for key, value in load_file(file).items()}
        save_file(weights, file, metadata={"format": "pt"})
    extra = [str(tmp_path / name) for name in names]
    changes = {"run": {"evaluate": {"models": ["base"], "extra_models": extra}}}
    pipeline = Pipeline.open(make_run_file(changes))
    for stage in ("fetch", "prepare", "evaluate"):
        manifest = pipeline.run(get_stage(stage))
    rows = {row["metric"]: row["models"] for row in manifest.metrics["metrics"]}
    assert set(rows["perplexity"]) == {"base", *extra}
    values = [figures["value"] for figures in rows["perplexity"].values()]
    assert len(set(values)) == len(values)
