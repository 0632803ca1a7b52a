"""Install a lock into this environment, leave out what never runs here, compile the rest. Used by the Dockerfile only.

All in one step, so that no layer holds files that a later one deletes. What is left out was looked up in what would load it: torch's
libraries name those they need (`readelf -d`), bitsandbytes takes the library of torch's CUDA version.
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
PIP = "/mnt/pip-*.whl"  # Debian's, mounted while a layer is built
OPTIONS = "--no-deps --no-build-isolation --use-pep517 --no-compile --root-user-action=ignore --disable-pip-version-check"

UNUSED = (
    # Static libraries and headers: nothing is linked or compiled against them (Triton brings the two headers that it needs).
    "nvidia/*/include",
    "nvidia/*/lib/*.a",
    "nvidia/nvshmem/lib/*.bc",
    "pyarrow/include",
    "pyarrow/src",
    "torch/include",
    "torch/share/cmake",
    "triton/backends/*/lib/**/*.a",
    # Programs and libraries that nothing here loads: multi-GPU solvers, a second NVRTC, the protobuf compiler, TensorBoard's pages.
    "nvidia/cu13/lib/libcusolverMg.so*",
    "nvidia/cu13/lib/libnvrtc*.alt.so*",
    "tensorboard/webfiles.zip",
    "tensorboard_data_server/bin",
    "torch/bin/protoc*",
    # The second, asynchronous Kubernetes client.
    "kubernetes/aio",
    # Test suites.
    "nltk/test",
    *(f"{package}/**/tests" for package in ("matplotlib", "mpmath", "networkx", "numpy", "pandas", "pyarrow", "scipy", "sympy")),
)
# Hundreds of megabytes of what a debugger reads; exported symbols and GPU code stay.
WITH_SYMBOLS = ("nvidia/nccl/lib/*.so*", "torch/lib/*.so", "triton/_C/*.so")


def main() -> None:
    """Install the lock, or the folder of wheels, that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("--whole", action="store_true", help="leave nothing out: to compile against it")
    arguments = parser.parse_args()
    wheels = [str(path) for path in arguments.source.glob("*.whl")]
    if arguments.source.is_file():
        pip("--require-hashes", "-r", str(arguments.source))
    elif wheels:
        pip("--no-index", *wheels)
    else:
        return
    if not arguments.whole:
        leave_out()
    compileall.compile_dir(str(SITE), quiet=2, workers=0)  # what earlier layers compiled is left as it is


def pip(*arguments: str) -> None:
    """pip install, with what is said here and nothing else: no dependencies, no build tools from anywhere."""
    environment = {
        **os.environ,
        "PYTHONPATH": glob.glob(PIP)[0],
        "PIP_CONFIG_FILE": "/run/secrets/pip.conf",
        "PIP_CACHE_DIR": "/root/.cache/pip",
    }
    subprocess.run([sys.executable, "-m", "pip", "install", *OPTIONS.split(), *arguments], env=environment, check=True)


def leave_out() -> None:
    """Remove what never runs in these images."""
    before = size()
    for pattern in UNUSED:
        for path in SITE.glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    for path in other_cudas():
        path.unlink()
    for pattern in WITH_SYMBOLS:
        for path in filter(has_symbols, SITE.glob(pattern)):
            subprocess.run(["strip", "--strip-unneeded", str(path)], check=True)
    print(f"left out {(before - size()) / 1e6:.0f} of {before / 1e6:.0f} MB", flush=True)


def other_cudas() -> list[Path]:
    """bitsandbytes' libraries for other accelerators, and for other CUDA versions than torch's."""
    libraries = [path for path in SITE.glob("bitsandbytes/libbitsandbytes_*.so") if not path.stem.endswith("_cpu")]
    if not libraries:
        return []
    version = re.search(r"^cuda: .*'(\d+)\.(\d+)'", (SITE / "torch/version.py").read_text(), re.MULTILINE)
    wanted = f"libbitsandbytes_cuda{''.join(version.groups())}" if version else "libbitsandbytes_cpu"
    if wanted not in [path.stem for path in SITE.glob("bitsandbytes/*.so")]:
        sys.exit(f"bitsandbytes has no {wanted}.so")
    return [path for path in libraries if path.stem != wanted]


def has_symbols(library: Path) -> bool:
    """Whether there is anything left to strip: doing it again would copy the file into another layer."""
    return ".symtab" in subprocess.run(["readelf", "-SW", str(library)], capture_output=True, text=True, check=True).stdout


def size() -> int:
    """Bytes of the environment."""
    return sum(path.lstat().st_size for path in SITE.rglob("*") if not path.is_dir())


if __name__ == "__main__":
    main()
