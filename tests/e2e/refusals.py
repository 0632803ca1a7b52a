"""Runs that are refused, before a stage starts or with the cluster's message."""

from __future__ import annotations

import time
from typing import Any

from tests.e2e.environment import ClusterEnvironment
from tests.e2e.release import STAGES, Release


def bad_value(cluster: ClusterEnvironment) -> str:
    """`medjob submit` refuses a bad value."""
    release = Release(cluster, "bad")
    done = release.submit(check=False, sets={"run.sft.learning_rate": -1})
    assert done.returncode == 64, done
    assert "run.sft.learning_rate: must be > 0 (got -1)" in done.stderr, done.stderr
    assert not release.leftovers()
    return _last_error(done.stderr)


def missing_queue(cluster: ClusterEnvironment) -> str:
    """`medjob submit` refuses a queue without Kueue, which would hold the run forever."""
    release = Release(cluster, "noqueue", {"cluster.queue": "research"})
    done = release.submit(check=False)
    assert done.returncode == 64, done
    assert "Kueue is not installed in this cluster" in done.stderr, done.stderr
    assert not release.leftovers()
    return _last_error(done.stderr)


def missing_bucket(cluster: ClusterEnvironment) -> str:
    """A bucket that does not exist ends the run before any stage."""
    return _refused(
        Release(cluster, "nobucket", {"cluster.store.uri": "s3://not-there/runs"}),
        "not-there",
        code=64,
    )


def pod_security(cluster: ClusterEnvironment) -> str:
    """The server's dry run refuses a pod that the namespace's level forbids."""
    volume = [{"name": "host", "hostPath": {"path": "/etc"}}]
    release = Release(cluster, "unsafe", {"cluster.extraVolumes": volume})
    done = release.submit(check=False)
    assert done.returncode == 64, done
    assert "violates PodSecurity" in done.stderr, done.stderr
    assert not release.leftovers()
    return _last_error(done.stderr)


def missing_secret(cluster: ClusterEnvironment) -> str:
    """`medjob submit` refuses a missing Secret.

    If the Secret disappears later, the start deadline ends the run with the Event's text.
    """
    release = Release(cluster, "nosecret", {"cluster.existingSecret": "not-there"})
    done = release.submit(check=False)
    assert done.returncode == 64, done
    assert "not-there" in done.stderr, done.stderr
    return (
        _last_error(done.stderr)
        + "; "
        + _at_deadline(cluster, "nosecret", {"cluster.existingSecret": "not-there"}, "not-there")
    )


def missing_image(cluster: ClusterEnvironment) -> str:
    """A missing image ends the run at the start deadline with the Event's text."""
    return _at_deadline(
        cluster, "noimage", {"cluster.image.fullDigest": f"sha256:{'0' * 64}"}, "image"
    )


def final_code(cluster: ClusterEnvironment) -> str:
    """A stage that exits 64 ends the run at once, and `medjob status` shows the reason."""
    release = Release(
        cluster, "wrong", {"pipeline.until": "sft", "run.lora.target_modules": ["no_such_module"]}
    )
    release.submit()
    status = release.wait_for_state("failed")
    assert status["code"] == 64, status
    assert "no_such_module" in status["text"], status
    assert len(release.jobs("sft")) == 1
    shown = cluster.medjob("status", "wrong", "-n", cluster.namespace).stdout
    assert "no_such_module" in shown, shown
    watched = cluster.medjob("status", "wrong", "-n", cluster.namespace, "--watch", check=False)
    assert watched.returncode == 64, watched
    release.cancel()
    return _first_line(status["text"])


def _at_deadline(cluster: ClusterEnvironment, name: str, changes: dict[str, Any], text: str) -> str:
    """Install without the checks of `medjob submit`, and wait until the run fails."""
    keys = [
        {"name": "AWS_ACCESS_KEY_ID", "value": "test"},
        {"name": "AWS_SECRET_ACCESS_KEY", "value": "testsecret"},
    ]
    release = Release(
        cluster, name, {"pipeline.startDeadlineSeconds": 20, "cluster.extraEnv": keys, **changes}
    )
    began = time.monotonic()
    release.install()
    status = release.wait_for_state("failed", 180)
    assert text in status["text"], status
    took = time.monotonic() - began
    release.cancel()
    return f"after {took:.0f} s: {_first_line(status['text'])}"


def _refused(release: Release, text: str, code: int) -> str:
    release.submit()
    status = release.wait_for_state("failed", 180)
    assert text in status["text"], status
    assert status["code"] == code, status
    assert not any(release.jobs(stage) for stage in STAGES)
    release.cancel()
    return _first_line(status["text"])


def _last_error(text: str) -> str:
    return _first_line(next(line for line in text.splitlines() if line.startswith("error:")))


def _first_line(text: str) -> str:
    return text.splitlines()[0][:160]
