"""The ports that tests hand to ranks are free, and are not the same ones each time."""

from __future__ import annotations

import secrets
import socket

import pytest
from ports import _RANGE, free_ports


def test_ports_in_use_are_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    first = free_ports(3)
    offered = iter([first - _RANGE.start, first - _RANGE.start + 1, first - _RANGE.start + 3])
    monkeypatch.setattr(secrets, "randbelow", lambda count: next(offered))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", first + 2))
        # Three from the first on would include it, and so would three from the second on.
        assert free_ports(3) == first + 3


def test_two_that_ask_at_once_get_different_ones() -> None:
    assert len({free_ports(2) for _ in range(20)}) > 1
