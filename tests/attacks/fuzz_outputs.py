"""A fuzzer of output folders: after any damage, each action ends well or with a sentence, and harms nobody.

`python tests/attacks/fuzz_outputs.py [libFuzzer's options] [FOLDER ...]`; each input is a list of choices
for a conversion that was interrupted, mutations of its folder and what is then done with it.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).parent.parent))

with atheris.instrument_imports(include=["mla_tools"]):
    import mla_tools.execute
    import mla_tools.output
    import mla_tools.verify  # noqa: F401

from attacks.outputs import bench, check
from attacks.running import run

# libFuzzer finds out which choices lead to new code.
CORPUS = [random.Random(number).randbytes(96) for number in range(64)]


def one_input(data: bytes) -> None:
    choices = atheris.FuzzedDataProvider(data)
    check(lambda count: int(choices.ConsumeIntInRange(0, count - 1)))


if __name__ == "__main__":
    bench()
    run(one_input, CORPUS)
