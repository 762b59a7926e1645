"""The memory that a plan states is what the converting process takes, whatever the format and the budget."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support import without_tokenizer

from mla_tools.errors import MlaToolsError
from mla_tools.files.checkpoint import open_checkpoint
from mla_tools.options import Options
from mla_tools.plan import SLAB_ELEMENTS, make_plan
from mla_tools.samples import write_sample

# A vocabulary of several slabs, and experts that are less than one.
SIZES = {
    "vocab_size": 17_000,
    "hidden_size": 1024,
    "moe_intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_nextn_predict_layers": 0,
}

# format, flags, budget
CASES = [
    ("bf16", "", "2GB"),
    ("bf16", "-q", "140MB"),
    ("bf16", "-q --q-mode mxfp4", "2GB"),
    ("fp8", "-q", "200MB"),
    ("fp8-ue8m0", "", "200MB"),
    ("ct-int4", "-d", "2GB"),
]

# Linux counts into ru_maxrss what the process was before it became the command, VmHWM does not.
CHILD = """
import json, pathlib, resource, sys
from mla_tools.cli import main
code = main(sys.argv[1:])
status = pathlib.Path("/proc/self/status")
if status.exists():
    peak = int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024
else:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"code": code, "peak": peak}), file=sys.stderr)
"""


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("wide")
    made = {fmt: folder / fmt for fmt, _, _ in CASES}
    for fmt, path in made.items():
        write_sample("deepseek_v3", path, fmt, changes=SIZES)
        without_tokenizer(path)
    return made


@pytest.mark.parametrize(("fmt", "flags", "budget"), CASES)
def test_a_conversion_takes_no_more_than_is_stated(
    fmt: str, flags: str, budget: str, wide: dict[str, Path], tmp_path: Path
) -> None:
    command = ["convert", str(wide[fmt]), "--mlx-path", str(tmp_path / "out"), *flags.split(), "--json"]
    child = subprocess.run(
        [sys.executable, "-c", CHILD, *command, "--max-memory", budget], capture_output=True, text=True
    )
    measured = json.loads(child.stderr.splitlines()[-1])
    assert measured["code"] == 0, child.stderr
    stated = json.loads(child.stdout)["peak_bytes"]
    assert measured["peak"] <= stated <= {"140MB": 140e6, "200MB": 200e6, "2GB": 2e9}[budget]


def test_a_smaller_budget_makes_smaller_slabs_before_fewer_threads(wide: dict[str, Path]) -> None:
    plan = make_plan(open_checkpoint(wide["fp8"]), Options(dequantize=True))
    ample = plan.workload(2 * 10**9, 2)
    assert (ample.threads, ample.slab_elements) == (2, SLAB_ELEMENTS)
    less = plan.workload(ample.peak_bytes - 1, 2)
    assert less.threads == 2
    assert less.slab_elements < SLAB_ELEMENTS
    assert plan.workload(96 * 10**6, 2).threads == 1
    budgets = [plan.workload(budget * 10**6, 4).peak_bytes for budget in (96, 150, 300, 2000)]
    assert budgets == sorted(budgets)


def test_a_budget_that_cannot_work_names_the_smallest_that_can(wide: dict[str, Path]) -> None:
    plan = make_plan(open_checkpoint(wide["fp8"]), Options())
    with pytest.raises(MlaToolsError, match=r"at least --max-memory \d+MB") as caught:
        plan.workload(10**6)
    least = int(str(caught.value).rpartition(" ")[2].removesuffix("MB."))
    assert plan.workload(least * 10**6).peak_bytes <= least * 10**6
    with pytest.raises(MlaToolsError):
        plan.workload((least - 1) * 10**6)
