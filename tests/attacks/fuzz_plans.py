"""A fuzzer of the folder reader and the planner: any checkpoint is planned, or refused with a sentence.

`python tests/attacks/fuzz_plans.py [libFuzzer's options] [FOLDER ...]`; each input is a list of choices
for the mutations of small sound checkpoints.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).parent.parent))

with atheris.instrument_imports(include=["mla_tools"]):
    import mla_tools.plan
    import mla_tools.report  # noqa: F401

from attacks.mutations import OPTIONS, SEEDS, check, mutated, seed
from attacks.running import run

# libFuzzer finds out which choices lead to new code.
CORPUS = [random.Random(number).randbytes(64) for number in range(4 * len(SEEDS))]


def one_input(data: bytes) -> None:
    choices = atheris.FuzzedDataProvider(data)

    def pick(count: int) -> int:
        return int(choices.ConsumeIntInRange(0, count - 1))

    check(mutated(pick), OPTIONS[pick(len(OPTIONS))])


if __name__ == "__main__":
    for sample in SEEDS:
        seed(*sample)
    run(one_input, CORPUS)
