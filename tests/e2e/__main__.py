"""`make e2e`: the whole way on a real cluster. Prints a table; its last line reads `N passed, M failed`."""

from __future__ import annotations

import argparse
import sys
import time
import traceback

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
from tests.e2e.refusals import bad_value, final_code, missing_bucket, missing_image, missing_secret, pod_security
from tests.e2e.scenarios import (
    again_skips_everything,
    changed_key_replaces,
    changed_key_waits,
    helm_test,
    install_and_complete,
    pause_and_resume,
    two_nodes,
    uninstall_leaves_nothing,
    upgrade_and_rollback,
)
from tests.e2e.site import site

SMOKE = (install_and_complete, eviction, uninstall_leaves_nothing)
ALL = (
    install_and_complete,
    helm_test,
    again_skips_everything,
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
    bad_value,
    missing_bucket,
    pod_security,
    missing_secret,
    missing_image,
    final_code,
    uninstall_leaves_nothing,
)


def main() -> int:
    """Run the rows; 0 if all have passed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="only the shortest way through")
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="only these rows (repeatable)")
    arguments = parser.parse_args()
    rows = SMOKE if arguments.smoke else ALL
    chosen = [row for row in rows if not arguments.only or row.__name__ in arguments.only]
    results: list[tuple[str, bool, float, str]] = []
    with site(1 if arguments.smoke else 2) as place:
        for row in chosen:
            began = time.monotonic()
            try:
                text, passed = row(place), True
            except Exception as error:
                traceback.print_exc()
                text, passed = " ".join(str(error).split())[:300], False
            results.append((row.__name__, passed, time.monotonic() - began, text))
            print(_line(*results[-1]), flush=True)
    print("\n" + "\n".join(["| what | | s | seen |", "| --- | --- | ---: | --- |", *(_line(*result) for result in results)]))
    passed = sum(result[1] for result in results)
    print(f"{passed} passed, {len(results) - passed} failed")
    return 0 if passed == len(results) else 1


def _line(name: str, passed: bool, seconds: float, text: str) -> str:
    return f"| {name.replace('_', ' ')} | {'passed' if passed else 'FAILED'} | {seconds:.0f} | {text} |"


if __name__ == "__main__":
    sys.exit(main())
