"""Secret files set environment variables, and their contents never appear in messages."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from medjob.errors import ConfigError, InputError
from medjob.runtime.secrets import CONTENTS, PATHS, install


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A Secret as Kubernetes mounts it: symbolic links to files in a hidden directory."""
    hidden = tmp_path / "secrets/..data"
    hidden.mkdir(parents=True)
    for name in (*PATHS, *CONTENTS, "other"):
        (hidden / name).write_text(f"content of {name}\n")
        (hidden.parent / name).symlink_to(f"..data/{name}")
    return hidden.parent


def test_each_file_sets_its_variable_and_nothing_else(folder: Path) -> None:
    environment = {"MEDJOB_SECRETS": str(folder)}
    install(environment)
    paths = {variable: str(folder / name) for name, variable in PATHS.items()}
    contents = {variable: f"content of {name}" for name, variable in CONTENTS.items()}
    assert environment == {"MEDJOB_SECRETS": str(folder), **paths, **contents}


def test_a_variable_that_is_already_set_is_kept(folder: Path) -> None:
    environment = {"MEDJOB_SECRETS": str(folder), "WANDB_API_KEY": "mine", "HF_TOKEN_PATH": ""}
    install(environment)
    assert (environment["WANDB_API_KEY"], environment["HF_TOKEN_PATH"]) == ("mine", "")


def test_a_missing_directory_sets_no_variable(tmp_path: Path) -> None:
    environment = {"MEDJOB_SECRETS": str(tmp_path / "none")}
    install(environment)
    assert len(environment) == 1


def test_an_unreadable_file_is_named_without_its_content(folder: Path) -> None:
    (folder / "hf-token").write_bytes(b"hf_secret\xff")
    with pytest.raises(InputError, match=r"hf-token: is not UTF-8") as caught:
        install({"MEDJOB_SECRETS": str(folder)})
    assert "hf_secret" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


def test_a_file_without_read_permission_is_an_input_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, **_: str) -> str:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(
        Path, "read_text", refuse
    )  # the tests may run as root, which can read every file
    with pytest.raises(InputError, match="aws-credentials: Permission denied") as caught:
        install({"MEDJOB_SECRETS": str(folder)})
    assert caught.value.exit_code == 66


def test_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="MEDJOB_SECRETS must be a folder"):
        install({"MEDJOB_SECRETS": str(tmp_path / "file")})


@pytest.mark.parametrize("content", ["a\0b", "a" * 1_000_000])
def test_secret_that_fits_into_no_variable_is_refused(folder: Path, content: str) -> None:
    (folder / "wandb-api-key").write_text(content)
    with pytest.raises(InputError, match="wandb-api-key: must be text of at most") as caught:
        install({"MEDJOB_SECRETS": str(folder)})
    assert content not in str(caught.value)


def test_verbs_get_secrets_and_debug_does_not_print_them(folder: Path, tmp_path: Path) -> None:
    code = (
        "import json, os, sys\nfrom medjob.cli import main\n"
        "main._run = lambda arguments: print(json.dumps(dict(os.environ)))\n"
        f"main.main(['ls', '--store', 'file://{tmp_path}', '--debug'])"
    )
    clean = {
        name: value
        for name, value in os.environ.items()
        if name not in {*PATHS.values(), *CONTENTS.values()}
    }
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**clean, "MEDJOB_SECRETS": str(folder)},
        capture_output=True,
        text=True,
        check=True,
    )
    environment = json.loads(done.stdout)
    assert environment["WANDB_API_KEY"] == "content of wandb-api-key"
    assert environment["AWS_SHARED_CREDENTIALS_FILE"] == str(folder / "aws-credentials")
    assert "content of" not in done.stderr
