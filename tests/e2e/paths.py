"""Paths of the repository and of the local cluster, and whether the tests use that cluster."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
LOCAL_CLUSTER = ROOT.parent / "shared" / "cluster" / "cluster"
CLUSTER_HOME = Path(os.environ.get("CLUSTER_HOME", "/var/lib/local-cluster"))


def local_kubeconfig() -> Path:
    """The kubeconfig that `cluster up` writes."""
    return CLUSTER_HOME / "kubeconfig"


def is_local() -> bool:
    """Whether the cluster is the local one: KUBECONFIG is not set, or names it."""
    named = os.environ.get("KUBECONFIG")
    if named is None and not LOCAL_CLUSTER.exists():
        sys.exit(
            f"error: KUBECONFIG is not set, and there is no local cluster at {LOCAL_CLUSTER}\n"
            "hint: set KUBECONFIG, E2E_LOAD and E2E_HOST, as CONTRIBUTING.md explains"
        )
    return named is None or (
        LOCAL_CLUSTER.exists() and Path(named).resolve() == local_kubeconfig().resolve()
    )
