"""Commands and manifests in the guides are valid, as far as that can be tested here."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from medjob.cli.main import parser
from medjob.config.load import load_run_file
from tests.charts.rendering import CLUSTERS, ROOT, helm, render, validate

GUIDES = sorted((ROOT / "docs" / "guides").glob("*.md"))
CLOUD = [ROOT / "docs" / "guides" / f"{name}.md" for name in ("gke", "eks", "cluster")]
# Only the quoting of these commands is checked.
NOT_TESTED = {"gcloud", "aws", "eksctl", "docker", "export", "echo"}
TARGETS = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
VARIABLES = {
    "ACCOUNT": "111122223333",
    "AWS_REGION": "us-west-2",
    "BUCKET": "my-bucket",
    "NUMBER": "123",
    "PROJECT": "my-project",
    "REGION": "us-central1",
}
KINDS = {"apps/v1", "batch/v1", "v1", "networking.k8s.io/v1", "rbac.authorization.k8s.io/v1"}


def blocks(guide: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", guide.read_text(), re.MULTILINE | re.DOTALL)


def commands(*programs: str) -> list[tuple[str, list[str]]]:
    """Guide and words of each command that calls one of the programs; all commands by default."""
    found = []
    for guide in CLOUD:
        for block in blocks(guide, "sh"):
            for line in block.replace("\\\n", " ").splitlines():
                for part in re.split(r" \| | && ", line):
                    words = shlex.split(part, comments=True)  # ValueError if quotes do not match
                    if words and (not programs or words[0] in programs):
                        found.append((guide.stem, words))
    return found


def _id(value: object) -> str:
    return " ".join(map(str, value))[:60] if isinstance(value, list) else str(value)


@pytest.mark.parametrize("guide", CLOUD, ids=lambda path: path.stem)
def test_guide_has_commands_and_manifests(guide: Path) -> None:
    assert len(blocks(guide, "sh")) >= (1 if guide.stem == "cluster" else 10)
    assert blocks(guide, "yaml")
    assert guide.read_text().count("```") == 2 * len(
        re.findall(r"^```(?:sh|yaml|json)\n", guide.read_text(), re.MULTILINE)
    )


@pytest.mark.parametrize("guide", CLOUD[:2], ids=lambda path: path.stem)
def test_cloud_guide_begins_with_what_was_not_tested(guide: Path) -> None:
    top = guide.read_text().split("\n## ")[0]
    assert "We could not test this guide on " in top
    assert "Not tested:" in top


def test_every_command_calls_a_known_program() -> None:
    known = NOT_TESTED | {"medjob", "make", "helm", "kubectl", "grep"}
    assert {words[0] for _, words in commands()} <= known


@pytest.mark.parametrize(("guide", "words"), commands("medjob"), ids=_id)
def test_medjob_command(guide: str, words: list[str]) -> None:
    arguments = parser().parse_args(words[1:])
    assert all(Path(ROOT / name).is_file() for name in getattr(arguments, "file", None) or [])


@pytest.mark.parametrize(("guide", "words"), commands("make"), ids=_id)
def test_make_command(guide: str, words: list[str]) -> None:
    assert words[1] in TARGETS
    given = dict(word.split("=", 1) for word in words[2:])
    assert set(given) <= {"RUN", "CLUSTER", "SET", "YES", "WAIT", "REGISTRY"}
    if "CLUSTER" in given:
        files = [ROOT / given["RUN"], ROOT / "jobs" / "clusters" / f"{given['CLUSTER']}.yaml"]
        load_run_file(files, [_filled(pair) for pair in given.get("SET", "").split()])


def _filled(text: str) -> str:
    return re.sub(r"\$(\w+)", lambda match: VARIABLES.get(match[1], match[1]), text)


@pytest.mark.parametrize(("guide", "words"), commands("helm"), ids=_id)
def test_helm_command(guide: str, words: list[str]) -> None:
    if words[1] == "upgrade" and "charts/medjob" in words:
        flags = [word for word in words[2:] if word != "--install"]
        done = helm(
            "template", *(str(ROOT / word) if (ROOT / word).exists() else word for word in flags)
        )
    else:
        done = helm(*words[1:], "--help")  # Helm refuses unknown flags
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
@pytest.mark.parametrize(("guide", "words"), commands("kubectl"), ids=_id)
def test_kubectl_command(guide: str, words: list[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("secret")
    words = [re.sub(r"=\$HOME/.*", f"={tmp_path}/file", word) for word in words]
    if words[1] == "create":
        done = subprocess.run(
            [*words, "--dry-run=client", "-o", "yaml"], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        made = yaml.safe_load(done.stdout)
        made["metadata"] = {
            key: value for key, value in made["metadata"].items() if value is not None
        }
        validate(made)
        assert made["kind"] != "Secret" or set(made["data"]) <= {
            "aws-credentials",
            "gcs.json",
            "hf-token",
            "wandb-api-key",
        }
    else:
        done = subprocess.run([*words, "--help"], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def documents() -> list[tuple[Path, str]]:
    return [(guide, block) for guide in CLOUD for block in blocks(guide, "yaml")]


@pytest.mark.parametrize(
    ("guide", "text"),
    documents(),
    ids=lambda value: value.stem if isinstance(value, Path) else value.split("\n")[0][:40],
)
def test_manifest(guide: Path, text: str, tmp_path: Path) -> None:
    for tree in yaml.safe_load_all(text):
        if "apiVersion" not in tree:
            _check_values(guide, tree, tmp_path / "own.yaml")
        elif tree["apiVersion"] in KINDS:
            validate(tree)
        else:  # there is no schema for Kueue and eksctl
            assert tree["apiVersion"] in ("kueue.x-k8s.io/v1beta2", "eksctl.io/v1alpha5")
            assert {"kind", "metadata"} <= set(tree)


def _check_values(guide: Path, tree: dict[str, object], own: Path) -> None:
    """The values load in medjob and render in Helm, on top of a run and the guide's cluster."""
    own.write_text(yaml.safe_dump(tree))
    cluster = next((path for path in CLUSTERS if path.stem == guide.stem), CLUSTERS[0])
    files = [ROOT / "jobs" / "o1-llama.yaml", cluster, own]
    load_run_file(files)
    for item in render(*files).everything:
        validate(item)


def test_queue_in_the_guide_covers_all_requested_resources() -> None:
    (queue,) = (
        tree
        for _, text in documents()
        for tree in yaml.safe_load_all(text)
        if tree.get("kind") == "ClusterQueue"
    )
    covered = {
        name for group in queue["spec"]["resourceGroups"] for name in group["coveredResources"]
    }
    asked: set[str] = set()
    for job in render(ROOT / "jobs" / "o1-llama.yaml", CLUSTERS[0]).stages.values():
        asked |= set(job["spec"]["template"]["spec"]["containers"][0]["resources"]["requests"])
    assert asked <= covered


def test_link_targets_exist() -> None:
    for guide in GUIDES:
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", guide.read_text()):
            if "://" not in target:
                assert (guide.parent / target).exists(), f"{guide.name}: {target}"
