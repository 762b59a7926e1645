"""The plans of real checkpoints at full size: complete, as mlx-lm's classes want them, and as they were.

The texts in tests/golden are what `mla-sanitize plan` prints. After a change that is meant to change
them, write them again with `python tests/test_golden.py --write` and read the difference.
"""

from __future__ import annotations

import difflib
import json
import re
import sys
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
from listing import LISTINGS, checkpoint, load
from pairs import ONLY_IN_ALL

from mla_tools.options import Options
from mla_tools.plan import Plan, make_plan
from mla_tools.quantization import QuantSpec
from mla_tools.report import plan_text
from mla_tools.verify import compare
from mla_tools.verify.child import manifest

GOLDEN = Path(__file__).parent / "golden"

OPTIONS = {"": Options(), "-q4": Options(quantize=QuantSpec())}

# A golden text is kept of each listing, and of other options where the folder has one already; what the texts
# must agree with is tested for every pair.
TEXTS = [
    (name, options)
    for name in LISTINGS
    for options in OPTIONS
    if not options or (GOLDEN / f"{name}{options}.txt").exists()
]
# What keeps MLX's conversions of DeepSeek V4 from loading: stacked experts under their old names, an
# output projection in pieces, and the scales of a quantized embedding and output head.
GAPS = re.compile(r"layers\.\d+\.(ffn\.experts\.w[123]|attn\.wo_a\.\d)\..*|(embed|head)\.(scales|biases)")

# How a family is quantized is decided by its targets, in whatever format its listing is stored: one in floats
# and one in FP8 have their texts, and one in integers and one in FP4 are added.
QUANTIZED = {"kimi_k25_int4", "deepseek_v4_flash", *(name for name, options in TEXTS if options)}
PAIRS = [
    pytest.param(
        name,
        options,
        id=f"{name}{options}",
        marks=[ONLY_IN_ALL] if options and name not in QUANTIZED else [],
    )
    for name in LISTINGS
    for options in OPTIONS
]


@cache
def planned(name: str, options: str) -> Plan:
    return make_plan(checkpoint(name), OPTIONS[options])


def ids(pairs: list[tuple[str, str]]) -> list[str]:
    return ["".join(pair) for pair in pairs]


@pytest.mark.parametrize("name", LISTINGS)
def test_a_listing_has_the_published_totals(name: str) -> None:
    found = load(name)
    specs = found.stored.values()
    elements = sum(spec.size for spec in specs)
    nbytes = sum(spec.nbytes for spec in specs)
    totals = {
        "tensors": len(specs),
        "scales": sum(tensor.endswith("_scale_inv") for tensor in found.stored),
        "unknown_to_mlx_lm": sum(bool(GAPS.fullmatch(tensor)) for tensor in found.stored),
        "elements": elements,
        "twice_the_elements": 2 * elements,
        "bytes": nbytes,
        "gibibytes": round(nbytes / 2**30, 2),
    }
    assert {key: totals[key] for key in found.published} == found.published


@pytest.mark.parametrize(("name", "options"), PAIRS)
def test_every_stored_tensor_is_used_or_dropped_once(name: str, options: str) -> None:
    plan = planned(name, options)
    used = Counter(part for step in plan.steps for source in step.sources for part in source.parts.values())
    used.update(part for drop in plan.drops for part in drop.source.parts.values())
    assert used.keys() == load(name).stored.keys()
    assert set(used.values()) == {1}


@pytest.mark.parametrize(("name", "options"), PAIRS)
def test_the_targets_are_the_parameters_of_the_class(name: str, options: str) -> None:
    plan = planned(name, options)
    shapes = {tensor: spec.shape for file in plan.files for tensor, spec in file.tensors.items()}
    # The config as it is read back from the output, not as it stands in memory.
    assert compare(shapes, manifest(json.loads(json.dumps(plan.config)), shapes)) == []


@pytest.mark.parametrize("name", LISTINGS)
def test_a_plan_keeps_every_element_and_drops_what_the_listing_says(name: str) -> None:
    plan = planned(name, "")
    kept = sum(source.spec.size for step in plan.steps for source in step.sources)
    assert plan.parameters == kept
    said = load(name).dropped
    found = Counter(
        next((reason for reason in said if drop.reason.startswith(reason)), drop.reason)
        for drop in plan.drops
    )
    assert found == said


@pytest.mark.parametrize(("name", "options"), TEXTS, ids=ids(TEXTS))
def test_the_text_is_the_golden_one(name: str, options: str) -> None:
    path = GOLDEN / f"{name}{options}.txt"
    assert path.exists(), "write it with: python tests/test_golden.py --write"
    difference = difflib.unified_diff(
        path.read_text().splitlines(),
        text_of(name, options).splitlines(),
        f"golden/{path.name}",
        "now",
        lineterm="",
    )
    lines = "\n".join(difference)
    assert not lines, f"\n{lines}\n\nIf this is meant: python tests/test_golden.py --write"


def test_no_golden_text_is_left_over() -> None:
    assert {path.name for path in GOLDEN.iterdir()} == {f"{name}{options}.txt" for name, options in TEXTS}


def text_of(name: str, options: str) -> str:
    return plan_text(planned(name, options)) + "\n"


def write() -> None:
    GOLDEN.mkdir(exist_ok=True)
    for name, options in TEXTS:
        (GOLDEN / f"{name}{options}.txt").write_text(text_of(name, options))


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit("usage: python tests/test_golden.py --write")
    write()
