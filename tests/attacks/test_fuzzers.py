"""Mutated checkpoints are planned or refused, mutated outputs finished or refused, and a short run of each
fuzzer of libFuzzer finds nothing.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest
from attacks import outputs
from attacks.mutations import OPTIONS, SEEDS, check, mutated, seed
from hypothesis import given, settings
from hypothesis import strategies as st
from pairs import ONLY_IN_ALL

HERE = Path(__file__).parent

# Where atheris has wheels; the mark in pyproject.toml says the same.
ATHERIS = (sys.platform, platform.machine()) == ("linux", "x86_64") and sys.version_info < (3, 14)


@pytest.mark.parametrize("sample", SEEDS, ids="-".join)
def test_what_is_mutated_is_sound(sample: tuple[str, str]) -> None:
    assert check(seed(*sample), OPTIONS[0]) == "planned"


@given(st.data())
@settings(max_examples=300)
def test_any_mutated_checkpoint_is_planned_or_refused(data: st.DataObject) -> None:
    def pick(count: int) -> int:
        return data.draw(st.integers(0, count - 1))

    check(mutated(pick), OPTIONS[pick(len(OPTIONS))])


@given(st.data())
@settings(max_examples=300)
def test_any_mutated_output_is_finished_or_refused_and_nothing_else_is_touched(data: st.DataObject) -> None:
    outputs.check(lambda count: data.draw(st.integers(0, count - 1)))


def test_a_companion_of_another_size_is_not_read() -> None:
    # new 10 -> sparse -> generation_config.json -> resume
    choices = iter([2, 1, 12, 3, 2, 0])
    assert "generation_config.json exists already" in outputs.check(lambda _: next(choices))


def test_every_moment_of_an_output_can_be_acted_on() -> None:
    made = outputs.bench()
    states = sorted(made.states)
    assert {"empty", "finished", "other finished"} < set(states)
    assert len(states) > 40
    actions = list(outputs.ACTIONS)
    for number, state in enumerate(states):
        ours = state.startswith(("new", "finished", "empty")) or made.states[state].get(outputs.CLEARING)
        for action in ("resume", "overwrite") if ours else ("overwrite",):
            choices = iter([number, 0, actions.index(action)])
            assert outputs.check(lambda _, choices=choices: next(choices)) == "done", (state, action)


if ATHERIS:
    SHORT = {"fuzz_headers.py": 4000, "fuzz_plans.py": 200, "fuzz_outputs.py": 300}
    LONGER = [
        pytest.param(fuzzer, 4 * runs, id=f"{fuzzer}-longer", marks=ONLY_IN_ALL)
        for fuzzer, runs in SHORT.items()
    ]

    @pytest.mark.parametrize(("fuzzer", "runs"), [*SHORT.items(), *LONGER])
    def test_a_short_run_of_a_fuzzer_finds_nothing(fuzzer: str, runs: int, tmp_path: Path) -> None:
        # By a shell, because the largest size of this process would count as that of its children.
        by_shell = ["sh", "-c", '"$@"; exit $?', "sh"]
        done = subprocess.run(
            [*by_shell, sys.executable, str(HERE / fuzzer), f"-runs={runs}", "-seed=1", "-timeout=120"],
            capture_output=True,
            text=True,
            # Where libFuzzer leaves an input that breaks something.
            cwd=tmp_path,
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stdout + done.stderr[-10_000:]
        # All seeds are run, also where they are more.
        (made,) = re.findall(r"Done (\d+) runs", done.stderr)
        assert int(made) >= runs
