"""The command line: help, errors, and the commands that run the pipeline on one machine."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from medjob.cli.main import main
from medjob.config import RunFile
from medjob.stage import STAGES

HEAVY = (
    "torch",
    "transformers",
    "datasets",
    "numpy",
    "pyarrow",
    "matplotlib",
    "boto3",
    "google.cloud",
    "kubernetes",
)


def call(*arguments: str) -> int:
    """Run a command in this process and return its exit code."""
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    return int(ended.value.code or 0)


def test_help_imports_no_heavy_libraries() -> None:
    code = (
        "import sys\nfrom medjob.cli.main import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"
    assert all(stage.name in done.stdout for stage in STAGES)
    assert "examples:" in done.stdout
    assert "143" in done.stdout


def test_errors_are_printed_without_a_traceback(
    tree: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import medjob.stages.fetch as stage

    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(tree))

    def fails_with(error: Exception) -> tuple[int, str]:
        def run(context: Any) -> Any:
            raise error

        monkeypatch.setattr(stage, "run", run)
        return call("fetch", "-f", str(path)), capsys.readouterr().err

    code, errors = fails_with(OSError(28, "No space left on device", "/x/file"))
    assert (code, "error: /x/file: No space left on device" in errors) == (75, True)
    code, errors = fails_with(
        ModuleNotFoundError("No module named 'torch'", name="torch")
    )  # torch is missing in the image medjob-core
    assert (
        code,
        "error: the Python package torch is not installed\nhint: pip install" in errors,
    ) == (
        64,
        True,
    )
    code, errors = fails_with(ZeroDivisionError("by zero"))
    assert (code, "unexpected ZeroDivisionError: by zero" in errors, "Traceback" in errors) == (
        1,
        True,
        False,
    )


def test_output_of_show_loads_to_the_same_run_file(
    tree: dict[str, Any],
    make_run_file: Callable[..., RunFile],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(tree))
    assert call("show", "-f", str(path), "--set", "run.seed=7") == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["run"]["seed"] == 7
    assert shown["run"]["dpo"]["beta"] == 0.1
    shown["run"]["seed"] = 42
    assert RunFile.model_validate(shown) == make_run_file()


def test_dry_run_and_ls_list_what_is_published(
    tree: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(tree))
    assert call("run", "-f", str(path), "--dry-run") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == [stage.name for stage in STAGES]
    assert "run, after fetch" in lines[2]
    assert not list((tmp_path / "store").rglob("*.json"))  # a dry run writes nothing
    assert call("ls", "-f", str(path)) == 0
    assert "no artifacts in file://" in capsys.readouterr().out
    assert call("run", "-f", str(path), "--until", "prepare") == 0
    capsys.readouterr()
    assert call("run", "-f", str(path), "--dry-run") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].endswith("skip: published")
    assert lines[2].endswith("skip: published")
    assert lines[3].endswith("run")
    assert "run, after sft" in lines[4]
    assert call("ls", "-f", str(path)) == 0
    assert [line.split()[:3:2] for line in capsys.readouterr().out.splitlines()[1:]] == [
        ["fetch", "published"],
        ["prepare", "published"],
    ]


def test_progress_is_json_lines_without_a_terminal(tree: dict[str, Any], tmp_path: Path) -> None:
    import json

    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(tree))
    done = subprocess.run(
        [sys.executable, "-m", "medjob", "run", "-f", str(path), "--until", "sft"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    # Every line is JSON: the libraries print nothing.
    events = [json.loads(line) for line in done.stderr.splitlines()]
    steps = [event for event in events if event["event"] == "progress" and event["stage"] == "sft"]
    assert steps[-1]["step"] == steps[-1]["total"] == 4
    assert {"loss", "grad_norm", "per_s"} <= set(steps[-1])
    kept = json.loads(next((tmp_path / "store").glob("t/sft/*/progress.json")).read_text())
    assert kept["step"] == 4


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_others_cannot_read_what_a_run_writes(
    tree: dict[str, Any], tmp_path: Path, umask: int
) -> None:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    words = [sys.executable, "-m", "medjob", "run", "-f", "run.yaml", "--until", "prepare"]
    done = subprocess.run(words, cwd=tmp_path, check=False, umask=umask)
    assert done.returncode == 0
    files = [*(tmp_path / "store").rglob("*"), *(tmp_path / "work").rglob("*")]
    assert len(files) > 10
    assert [path for path in files if path.stat().st_mode & 0o077] == []


def run_medjob(*arguments: str, cwd: Path | None = None, **environment: str) -> tuple[int, str]:
    """Run a command in its own process. Return its exit code and its messages."""
    done = subprocess.run(
        [sys.executable, "-m", "medjob", *arguments],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        check=False,
    )
    return done.returncode, done.stderr.decode()


def test_debug_keeps_the_exit_code(tmp_path: Path) -> None:
    code, errors = run_medjob("show", "-f", str(tmp_path / "none.yaml"), "--debug")
    assert code == 64
    assert "Traceback" in errors
    assert "error: " in errors


def test_terminal_without_unicode_shows_escapes(tree: dict[str, Any], tmp_path: Path) -> None:
    tree["run"]["description"] = "d\u00e9j\u00e0 vu"
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    command = [sys.executable, "-m", "medjob", "show", "-f", str(tmp_path / "run.yaml")]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    shown = subprocess.run(command, env=environment, capture_output=True, check=True).stdout
    assert yaml.safe_load(shown)["run"]["description"] == "d\u00e9j\u00e0 vu"


def test_deleted_directory_is_reported(tmp_path: Path) -> None:
    code = (
        "import os, sys; os.mkdir('gone'); os.chdir('gone'); os.rmdir('../gone'); "
        "os.execv(sys.executable, [sys.executable, '-m', 'medjob', 'show', '-f', '/x.yaml'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 64
    assert done.stderr.startswith("error: the current directory was deleted")


def test_wrong_variables_of_the_hub_are_named(tree: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    file = str(tmp_path / "run.yaml")
    code, errors = run_medjob("show", "-f", file, HF_HUB_ETAG_TIMEOUT="soon")
    assert (code, errors) == (
        64,
        "error: HF_HUB_ETAG_TIMEOUT must be a number of seconds (got 'soon')\n",
    )
    base = ("--set", "run.base_model=a/b")
    code, errors = run_medjob("fetch", "-f", file, *base, HF_ENDPOINT="http://[::1")
    assert code == 64
    assert "HF_ENDPOINT must be the URL of a hub (got 'http://[::1')" in errors


def test_control_characters_in_names_do_not_reach_the_terminal(tmp_path: Path) -> None:
    code, errors = run_medjob("show", "-f", "no\x1b]0;title\x07such.yaml")
    assert code == 64
    assert errors.startswith("error: no\\x1b]0;title\\x07such.yaml: no such file")


def test_too_little_memory_can_be_retried(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("medjob.cli.main._run", fail)
    assert call("show", "-f", "run.yaml") == 75
    assert capsys.readouterr().err.startswith("error: out of memory\nhint: ")
