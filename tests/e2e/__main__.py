"""`make e2e`: the whole way on a real cluster. Prints a table; its last line reads `N passed, M failed`."""

from __future__ import annotations

import argparse
import sys
import time
import traceback

from tests.e2e import scenarios
from tests.e2e.site import site


def main() -> int:
    """Run the rows; 0 if all have passed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="only the shortest way through")
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="only these rows (repeatable)")
    arguments = parser.parse_args()
    rows = scenarios.SMOKE if arguments.smoke else scenarios.ALL
    chosen = [row for row in rows if not arguments.only or row.__name__ in arguments.only]
    results: list[tuple[str, bool, float, str]] = []
    with site() as place:
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
