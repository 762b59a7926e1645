"""Ports of this machine that nobody listens on, for tests that start several ranks."""

from __future__ import annotations

import secrets
import socket
from contextlib import ExitStack

# Below the ports that Linux and macOS give to whoever asks for any.
_RANGE = range(20_000, 32_000)


def free_ports(count: int) -> int:
    """Return the first of so many ports in a row that were free a moment ago.

    Where the search begins is left to chance, so that test runs side by side do not find the same ones.
    """
    for _ in range(100):
        first = _RANGE.start + secrets.randbelow(len(_RANGE) - count)
        with ExitStack() as held:
            try:
                for port in range(first, first + count):
                    held.enter_context(socket.socket()).bind(("127.0.0.1", port))
            except OSError:
                continue
        return first
    raise AssertionError(f"no {count} free ports in a row were found from {_RANGE.start} to {_RANGE.stop}")
