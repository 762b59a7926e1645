"""What a plan says of the error of K is what a conversion makes of random weights."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import mlx.core as mx
import pytest
from conversion import convert
from support import loaded, sample

from mla_tools.precision import expected_error
from mla_tools.quantization import MODES, QuantSpec
from mla_tools.spec import DType

_PATH = Path(__file__).parent.parent / "benchmarks" / "embed_q.py"
_SPEC = importlib.util.spec_from_file_location("embed_q", _PATH)
assert _SPEC is not None
assert _SPEC.loader is not None
embed_q = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(embed_q)
# The error of one head has the same figure as that of several.
embed_q.HEADS = 1

SPECS = [QuantSpec(mode, b, g) for mode, (bits, groups) in MODES.items() for b in bits for g in groups]

# The formula takes decoded numbers for normally distributed, and those of a 4-bit source lie on few
# points; the float modes have larger steps than the formula's uniform ones.
TOLERANCE = 0.3

# Below this a figure is printed as 0: the smallest E4M3 codes do not all survive a change of scale.
ZERO = 1e-4


@pytest.mark.parametrize("dtype", [DType.BF16, DType.F16, DType.F32], ids=lambda dtype: dtype.name)
@pytest.mark.parametrize("source", SPECS, ids=str)
def test_the_figure_of_a_plan_is_what_is_measured(source: QuantSpec, dtype: DType) -> None:
    wrong = {}
    for target in (*SPECS, None):
        expected = expected_error(source, target, dtype)
        if expected is None:
            assert source.bits < 4
            continue
        found = embed_q.measured(source, target, dtype, seed=source.bits)
        if abs(found - expected) > max(TOLERANCE * found, ZERO):
            wrong[str(target)] = (found, expected)
    assert not wrong


def test_what_was_not_measured_has_no_figure() -> None:
    assert expected_error(QuantSpec("affine", 2, 64), QuantSpec(), DType.BF16) is None
    assert expected_error(QuantSpec(), QuantSpec(), DType.I64) is None


def test_a_number_that_is_rounded_once_loses_less() -> None:
    twice = expected_error(QuantSpec(), None, DType.BF16)
    once = expected_error(QuantSpec(), None, DType.BF16, decoded_in_dtype=False)
    assert twice is not None
    assert once is not None
    assert 0 < once < twice


# What becomes of K by default: the source's format -> flags -> the encoding of embed_q.
AUTOMATIC = [
    pytest.param("fp8-ue8m0", "", "mxfp8", id="fp8-ue8m0"),
    pytest.param("ct-mxfp4", "", "mxfp8", id="mxfp4"),
    pytest.param("quark-mxfp4", "", "mxfp8", id="quark-mxfp4"),
    pytest.param("ct-int4", "", "affine 8-bit g32", id="int4"),
    pytest.param("awq", "", "affine 8-bit g32", id="awq"),
    pytest.param("ct-int8", "", "affine 8-bit g32", id="int8"),
    pytest.param("ct-int4", "--dtype float32", "f32", id="int4-float32"),
    pytest.param("fp8-ue8m0", "--embed-q auto", "mxfp8", id="auto"),
]


@pytest.mark.parametrize(("fmt", "flags", "wanted"), AUTOMATIC)
def test_the_smallest_form_that_loses_nothing_is_taken(
    fmt: str, flags: str, wanted: str, tmp_path: Path
) -> None:
    plan = convert(sample("deepseek_v3", fmt), tmp_path / "out", *flags.split())
    name = "model.layers.0.self_attn.embed_q.weight"
    (target,) = [each for step in plan.steps for each in step.targets if each.name == name]
    assert target.codec.name == wanted
    (cost,) = plan.embed_q_costs
    assert (cost.error == 0) == (wanted != "affine 8-bit g32")
    convert(sample("deepseek_v3", fmt), tmp_path / "exact", "-d", "--dtype", "float32")
    exact, held = loaded(tmp_path / "exact")[name], loaded(tmp_path / "out")
    found = target.codec.decode(
        {part: held[stored] for part, stored in target.parts.items()}, 0, target.spec.rows, DType.F32
    )
    assert mx.array_equal(found.reshape(exact.shape), exact).item() == (wanted != "affine 8-bit g32")
