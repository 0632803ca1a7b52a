"""Free TCP ports for servers that cannot choose one themselves."""

import contextlib
import random
import socket


def free_ports(count: int) -> list[int]:
    """Find consecutive ports that nothing listens on.

    They lie below the range that the kernel assigns from. An outgoing connection could take a port
    of that range before the server binds it.
    """
    while True:
        first = random.randrange(15_000, 30_000)
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            ports = list(range(first, first + count))
            for port in ports:
                stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return ports
