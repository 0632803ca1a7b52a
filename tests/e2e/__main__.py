"""`make e2e`: test medjob on a real cluster.

Prints a table of scenarios. The last line reads `N passed, M failed`, plus `, K skipped` if
scenarios were skipped.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections import Counter

from tests.e2e.access import policy_for_one_prefix, rotated_credentials
from tests.e2e.disruptions import (
    cut_off_node,
    deleted_job,
    early_signal,
    eviction,
    eviction_of_a_peer,
    lost_node,
    lost_orchestrator,
    store_away,
    uninstall_and_install,
)
from tests.e2e.environment import Skipped, cluster_environment
from tests.e2e.refusals import (
    bad_value,
    final_code,
    missing_bucket,
    missing_image,
    missing_queue,
    missing_secret,
    pod_security,
)
from tests.e2e.scenarios import (
    again_skips_everything,
    changed_key_replaces,
    changed_key_waits,
    helm_test,
    install_and_complete,
    pause_and_resume,
    plain_fine_tuning,
    two_nodes,
    uninstall_leaves_nothing,
    upgrade_and_rollback,
)
from tests.e2e.shards import evicted_shard, lost_shard, three_shards
from tests.e2e.sidecars import admission_policy, sidecar_after_failure, sidecar_after_success

SMOKE = (install_and_complete, eviction, uninstall_leaves_nothing)
ALL = (
    install_and_complete,
    helm_test,
    again_skips_everything,
    plain_fine_tuning,
    two_nodes,
    eviction,
    early_signal,
    eviction_of_a_peer,
    lost_node,
    cut_off_node,
    uninstall_and_install,
    lost_orchestrator,
    store_away,
    upgrade_and_rollback,
    changed_key_waits,
    changed_key_replaces,
    pause_and_resume,
    deleted_job,
    three_shards,
    evicted_shard,
    lost_shard,
    bad_value,
    missing_queue,
    missing_bucket,
    pod_security,
    missing_secret,
    missing_image,
    final_code,
    sidecar_after_success,
    sidecar_after_failure,
    admission_policy,
    rotated_credentials,
    policy_for_one_prefix,
    uninstall_leaves_nothing,
)


def main() -> int:
    """Run the scenarios; return 0 if none has failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="run only a short selection")
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="NAME",
        help="run only this scenario (repeatable)",
    )
    arguments = parser.parse_args()
    selected = [
        scenario
        for scenario in (SMOKE if arguments.smoke else ALL)
        if not arguments.only or scenario.__name__ in arguments.only
    ]
    results: list[tuple[str, str, float, str]] = []
    nodes, images = (1, ("core", "full")) if arguments.smoke else (2, ("core", "full", "vllm"))
    with cluster_environment(nodes, images) as cluster:
        for scenario in selected:
            began = time.monotonic()
            try:
                text, end = scenario(cluster), "passed"
            except Skipped as reason:
                text, end = str(reason), "skipped"
            except Exception as error:
                traceback.print_exc()
                text, end = " ".join(str(error).split())[:300], "FAILED"
            results.append((scenario.__name__, end, time.monotonic() - began, text))
            print(_line(*results[-1]), flush=True)
    print(
        "\n"
        + "\n".join(
            [
                "| scenario | | s | observed |",
                "| --- | --- | ---: | --- |",
                *(_line(*result) for result in results),
            ]
        )
    )
    count = Counter(end for _, end, _, _ in results)
    print(
        f"{count['passed']} passed, {count['FAILED']} failed"
        + (f", {count['skipped']} skipped" if count["skipped"] else "")
    )
    return 1 if count["FAILED"] else 0


def _line(name: str, end: str, seconds: float, text: str) -> str:
    return f"| {name.replace('_', ' ')} | {end} | {seconds:.0f} | {text} |"


if __name__ == "__main__":
    sys.exit(main())
