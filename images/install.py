"""Install a lock file into this environment, remove unused files, and compile the rest.

Only the Dockerfile uses this script. It does all of this in one step, so that no layer contains
files that a later layer deletes. To find out which libraries are unused, we looked at what loads
them: torch's libraries name those they need (`readelf -d`), and bitsandbytes loads the library for
torch's CUDA version.
"""

import argparse
import compileall
import glob
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

SITE = Path(sysconfig.get_path("purelib"))
PIP = "/mnt/pip-*.whl"  # Debian's pip, mounted while a layer is built
OPTIONS = (
    "--no-deps --no-build-isolation --use-pep517 --no-compile "
    "--root-user-action=ignore --disable-pip-version-check"
)

UNUSED = (
    # Static libraries and headers: nothing is linked or compiled against them. Triton contains the
    # two headers that it needs.
    "nvidia/*/include",
    "nvidia/*/lib/*.a",
    "nvidia/nvshmem/lib/*.bc",
    "pyarrow/include",
    "pyarrow/src",
    "torch/include",
    "torch/share/cmake",
    "triton/backends/*/lib/**/*.a",
    # Programs and libraries that nothing loads: multi-GPU solvers, a second NVRTC, the protobuf
    # compiler, TensorBoard's pages.
    "nvidia/cu13/lib/libcusolverMg.so*",
    "nvidia/cu13/lib/libnvrtc*.alt.so*",
    "tensorboard/webfiles.zip",
    "tensorboard_data_server/bin",
    "torch/bin/protoc*",
    # The second, asynchronous Kubernetes client.
    "kubernetes/aio",
    # Test suites.
    "nltk/test",
    "matplotlib/**/tests",
    "mpmath/**/tests",
    "networkx/**/tests",
    "numpy/**/tests",
    "pandas/**/tests",
    "pyarrow/**/tests",
    "scipy/**/tests",
    "sympy/**/tests",
)
# These contain hundreds of megabytes of debugging symbols. Exported symbols and GPU code are kept.
WITH_SYMBOLS = ("nvidia/nccl/lib/*.so*", "torch/lib/*.so", "triton/_C/*.so")


def main() -> None:
    """Install the lock file, or the folder of wheels, given on the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument(
        "--whole",
        action="store_true",
        help="remove nothing, so that programs can be compiled against it",
    )
    parser.add_argument(
        "--target", type=Path, help="install into this folder, outside the environment"
    )
    arguments = parser.parse_args()
    wheels = [str(path) for path in arguments.source.glob("*.whl")]
    target = arguments.target or SITE
    if arguments.source.is_file():
        folder = ("--target", str(target)) if arguments.target else ()
        pip("--require-hashes", *folder, "-r", str(arguments.source))
    elif wheels:
        pip("--no-index", *wheels)
    else:
        return
    if not arguments.whole:
        leave_out()
    compileall.compile_dir(str(target), quiet=2, workers=0)  # skips files that are compiled


def pip(*arguments: str) -> None:
    """Run `pip install` without dependencies and without downloading build tools."""
    environment = {
        **os.environ,
        "PYTHONPATH": glob.glob(PIP)[0],
        "PIP_CONFIG_FILE": "/run/secrets/pip.conf",
        "PIP_CACHE_DIR": "/root/.cache/pip",
    }
    subprocess.run(
        [sys.executable, "-m", "pip", "install", *OPTIONS.split(), *arguments],
        env=environment,
        check=True,
    )


def leave_out() -> None:
    """Remove files that these images never use."""
    before = size()
    for pattern in UNUSED:
        for path in SITE.glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    for path in other_cudas():
        path.unlink()
    for pattern in WITH_SYMBOLS:
        for path in filter(has_symbols, SITE.glob(pattern)):
            subprocess.run(["strip", "--strip-unneeded", str(path)], check=True)
    print(f"removed {(before - size()) / 1e6:.0f} of {before / 1e6:.0f} MB", flush=True)


def other_cudas() -> list[Path]:
    """Libraries of bitsandbytes for other accelerators, or for CUDA versions other than torch's."""
    libraries = [
        path
        for path in SITE.glob("bitsandbytes/libbitsandbytes_*.so")
        if not path.stem.endswith("_cpu")
    ]
    if not libraries:
        return []
    torch_version = (SITE / "torch/version.py").read_text()
    version = re.search(r"^cuda: .*'(\d+)\.(\d+)'", torch_version, re.MULTILINE)
    device = f"cuda{''.join(version.groups())}" if version else "cpu"
    wanted = f"libbitsandbytes_{device}"
    if wanted not in [path.stem for path in SITE.glob("bitsandbytes/*.so")]:
        sys.exit(f"error: bitsandbytes has no {wanted}.so")
    return [path for path in libraries if path.stem != wanted]


def has_symbols(library: Path) -> bool:
    """Whether `strip` would change the library; doing it again would copy it into another layer."""
    command = ["readelf", "-SW", str(library)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return ".symtab" in done.stdout


def size() -> int:
    """Size of the environment in bytes."""
    return sum(path.lstat().st_size for path in SITE.rglob("*") if not path.is_dir())


if __name__ == "__main__":
    main()
