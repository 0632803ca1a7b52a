"""A node in its own process, for tests that kill or suspend it.

    node_process.py RANK COUNT PORT HEARTBEAT_TIMEOUT_S HEARTBEAT_INTERVAL_S

Prints `started` when it begins to connect.
"""

import sys
import time

from medjob.launch import nodes


def main(rank: str, count: str, port: str, timeout_s: str, interval_s: str) -> None:
    """Connect to the other nodes and stay."""
    nodes.HEARTBEAT_TIMEOUT_S = float(timeout_s)
    nodes._HEARTBEAT_INTERVAL_S = float(interval_s)
    node = nodes.Node(int(rank), int(count), "127.0.0.1", int(port))
    print("started", flush=True)
    membership = (
        nodes.connect_to_leader(node, lambda: False)
        if node.rank
        else nodes.accept_followers(node, {"epoch": 3})
    )
    assert membership
    time.sleep(60)


if __name__ == "__main__":
    main(*sys.argv[1:])
