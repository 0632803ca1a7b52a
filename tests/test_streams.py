"""Closed and full output streams never change how a command ends."""

import subprocess
import sys
from pathlib import Path

import pytest

MEDJOB = [sys.executable, "-m", "medjob"]
FULL = pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")


@pytest.mark.parametrize(
    ("redirection", "code"),
    [
        ("2>&-", 64),
        (">&- 2>&-", 64),
        (">&- 2>&- <&-", 64),
        pytest.param("2>/dev/full", 64, marks=FULL),
        (">&-", 64),
    ],
)
def test_error_keeps_its_exit_code(tmp_path: Path, redirection: str, code: int) -> None:
    words = [*MEDJOB, "show", "-f", str(tmp_path / "missing.yaml")]
    shell = ["sh", "-c", f'exec "$@" {redirection}', "sh", *words]
    assert subprocess.run(shell, check=False).returncode == code


def test_messages_reach_no_file_that_is_opened_in_place_of_stderr(tmp_path: Path) -> None:
    """Without a descriptor 2, the first file that is opened takes its number."""
    program = (
        "from medjob.runtime.streams import protect; protect(); import os, sys;"
        f"file = os.open({str(tmp_path / 'data')!r}, os.O_CREAT | os.O_WRONLY);"
        "sys.stderr.write('message'); os.write(file, b'data'); sys.exit(0 if file > 2 else 1)"
    )
    shell = ["sh", "-c", 'exec "$@" 2>&-', "sh", sys.executable, "-c", program]
    assert subprocess.run(shell, check=False, cwd=Path.cwd()).returncode == 0
    assert (tmp_path / "data").read_text() == "data"
