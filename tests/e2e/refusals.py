"""What is refused, and how soon: before a stage starts, or with the words of the cluster."""

from __future__ import annotations

import time
from typing import Any

from tests.e2e.release import STAGES, Release
from tests.e2e.site import Site


def bad_value(site: Site) -> str:
    """A bad value is refused here, and by Helm itself."""
    release = Release(site, "bad")
    done = release.submit(check=False, sets={"run.sft.learning_rate": -1})
    assert done.returncode == 64, done
    assert "run.sft.learning_rate: must be > 0 (got -1)" in done.stderr, done.stderr
    assert not release.leftovers()
    return _last_error(done.stderr)


def missing_queue(site: Site) -> str:
    """A queue that nobody watches would hold the run for ever."""
    release = Release(site, "noqueue", {"cluster.queue": "research"})
    done = release.submit(check=False)
    assert done.returncode == 64, done
    assert "Kueue is not in this cluster" in done.stderr, done.stderr
    assert not release.leftovers()
    return _last_error(done.stderr)


def missing_bucket(site: Site) -> str:
    """A bucket that is not there ends the run before any stage."""
    return _refused(
        Release(site, "nobucket", {"cluster.store.uri": "s3://not-there/runs"}),
        "not-there",
        code=64,
    )


def pod_security(site: Site) -> str:
    """A pod that the namespace's level forbids is refused by the server's dry run, before anything is installed."""
    volume = [{"name": "host", "hostPath": {"path": "/etc"}}]
    release = Release(site, "unsafe", {"cluster.extraVolumes": volume})
    done = release.submit(check=False)
    assert done.returncode == 64, done
    assert "violates PodSecurity" in done.stderr, done.stderr
    assert not release.leftovers()
    return _last_error(done.stderr)


def missing_secret(site: Site) -> str:
    """A Secret that is not there: submit says so; where it vanishes later, the start deadline ends the run with the Event's text."""
    release = Release(site, "nosecret", {"cluster.existingSecret": "not-there"})
    done = release.submit(check=False)
    assert done.returncode == 64, done
    assert "not-there" in done.stderr, done.stderr
    return (
        _last_error(done.stderr)
        + "; "
        + _at_deadline(site, "nosecret", {"cluster.existingSecret": "not-there"}, "not-there")
    )


def missing_image(site: Site) -> str:
    """An image that does not exist ends at the start deadline with the Event's text."""
    return _at_deadline(
        site, "noimage", {"cluster.image.fullDigest": f"sha256:{'0' * 64}"}, "image"
    )


def final_code(site: Site) -> str:
    """A stage that exits 64 stops the run at once; `medjob status` says why."""
    release = Release(
        site, "wrong", {"pipeline.until": "sft", "run.lora.target_modules": ["no_such_module"]}
    )
    release.submit()
    status = release.wait_for_state("failed")
    assert status["code"] == 64, status
    assert "no_such_module" in status["text"], status
    assert len(release.jobs("sft")) == 1
    shown = site.medjob("status", "wrong", "-n", site.namespace).stdout
    assert "no_such_module" in shown, shown
    watched = site.medjob("status", "wrong", "-n", site.namespace, "--watch", check=False)
    assert watched.returncode == 64, watched
    release.cancel()
    return _first_line(status["text"])


def _at_deadline(site: Site, name: str, changes: dict[str, Any], text: str) -> str:
    """Install past the client's own checks, and see the run end."""
    keys = [
        {"name": "AWS_ACCESS_KEY_ID", "value": "test"},
        {"name": "AWS_SECRET_ACCESS_KEY", "value": "testsecret"},
    ]
    release = Release(
        site, name, {"pipeline.startDeadlineSeconds": 20, "cluster.extraEnv": keys, **changes}
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
