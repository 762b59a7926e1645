"""Runs a fuzzer with its corpus under a limit of memory, and says how often it ran."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import atheris

# Of address space, most of which Python, MLX and libFuzzer reserve without using it.
LIMIT = 4 << 30


def run(one_input: Callable[[bytes], None], corpus: Sequence[bytes]) -> None:
    """Hand inputs to a fuzzer until an option of libFuzzer ends it; what it raises ends it too."""
    resource.setrlimit(resource.RLIMIT_AS, (LIMIT, LIMIT))
    with TemporaryDirectory() as folder:
        for number, data in enumerate(corpus):
            (Path(folder) / str(number)).write_bytes(data)
        # The first folder is where libFuzzer keeps what it finds.
        atheris.Setup([*sys.argv, folder], one_input)
        atheris.Fuzz()
