"""The parent of a fake training in its own process, which ends as the command `medjob` does.

    python -m tests.support.parent_process OPTIONS

OPTIONS is a JSON object with `directory`, `scripts`, `grace_s`, `nodes` and `slow_s`. If `nodes` is
2, the file `lose the node` in the directory disconnects the second node.
"""

import json
import sys
import threading
from pathlib import Path
from unittest import mock

from medjob.cli import main as cli
from medjob.launch import training
from tests.support.fake_training import FakeTraining
from tests.support.waiting import wait_for_file


def main(arguments: str) -> None:
    """Run the training in place of the command `medjob sft`."""
    options = json.loads(arguments)
    directory = Path(options["directory"])

    def run(_: object) -> None:
        fake = FakeTraining(
            directory, *options["scripts"], nodes=options["nodes"], slow_s=options["slow_s"]
        )
        if options["nodes"] > 1:
            fake.connect_node()
            threading.Thread(target=lose_node_on_request, args=(fake,), daemon=True).start()
        fake.run(options["grace_s"])

    with mock.patch.object(cli, "_run", run), mock.patch.object(training, "_ROOT_CAUSE_S", 0.4):
        cli.main(["sft", "-f", "x.yaml"])


def lose_node_on_request(fake: FakeTraining) -> None:
    wait_for_file(fake.directory / "lose the node")
    fake.disconnect_node()


if __name__ == "__main__":
    main(*sys.argv[1:])
