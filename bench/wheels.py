"""Downloads the wheels that bench.train needs on a GPU machine without a package index.

    python -m bench.wheels           into build/wheels, for CPython 3.12 on x86-64 Linux

Copy that directory with the checkout; bench.train installs the wheels. The machine must have
PyTorch and transformers. Versions come from constraints.txt and, for packages that only GPUs need,
from pyproject.toml.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from pathlib import Path

# Left out are the requirements of torch and transformers (numpy, huggingface_hub, safetensors,
# tokenizers, pyyaml, tqdm, psutil, jinja2), and accelerate, peft, pandas, pyarrow, xxhash and
# fsspec, which such machines have. pandas and pyarrow alone would be 60 MB.
_PYDANTIC = (
    "pydantic",
    "pydantic_core",
    "annotated-types",
    "typing-inspection",
    "typing_extensions",
)
LOCKED = ("trl", "datasets", "dill", "multiprocess", "bitsandbytes", *_PYDANTIC, "google-crc32c")
GPU_ONLY = ("liger-kernel",)
LIMIT_MIB = 60
PYTHON = "3.12"
GLIBC = (28, 27, 24, 17)


def main() -> None:
    """Download the wheels and print their sizes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, nargs="?", default=Path("build/wheels"))
    folder = parser.parse_args().folder
    shutil.rmtree(folder, ignore_errors=True)
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--only-binary=:all:",
        "--dest",
        str(folder),
    ]
    command += ["--implementation", "cp", "--python-version", PYTHON]
    for platform in [*(f"manylinux_2_{minor}_x86_64" for minor in GLIBC), "manylinux2014_x86_64"]:
        command += ["--platform", platform]
    subprocess.run([*command, *requirements()], check=True)
    sizes = {file.name: file.stat().st_size / 2**20 for file in sorted(folder.glob("*.whl"))}
    for name, size in sizes.items():
        print(f"{size:8.2f} MiB  {name}")
    total = sum(sizes.values())
    print(f"{total:8.2f} MiB in {folder}")
    if total > LIMIT_MIB:
        raise SystemExit(f"more than {LIMIT_MIB} MiB")


def requirements() -> list[str]:
    """Return `name==version` of every wheel."""
    locked = Path("constraints.txt").read_text()
    gpu_only = Path("pyproject.toml").read_text()
    return [_pinned(name, locked) for name in LOCKED] + [
        _pinned(name, gpu_only) for name in GPU_ONLY
    ]


def _pinned(name: str, text: str) -> str:
    found = re.search(rf"(?im)(?<![\w-]){re.escape(name)}==[\w.]+", text)
    if found is None:
        raise SystemExit(f"{name} has no pinned version")
    return found.group()


if __name__ == "__main__":
    main()
