"""Converted checkpoints give the logits of transformers: every family, every storage."""

from __future__ import annotations

from pathlib import Path

import pytest
from conversion import convert
from reference import STORAGES, checkpoint, mlx_logits, reference_truth, relative_error

TOLERANCE = 1e-5

each_checkpoint = pytest.mark.parametrize(
    ("family", "storage"), [pytest.param(*pair, id="-".join(pair)) for pair in STORAGES]
)


@each_checkpoint
def test_float32_output_is_the_decoded_source(family: str, storage: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert(checkpoint(family, storage), out, "--dtype", "float32")
    prefill, decode = relative_error(mlx_logits(out), reference_truth(family, storage))
    assert prefill <= TOLERANCE
    assert decode <= TOLERANCE


@each_checkpoint
def test_default_dtype_only_rounds_the_weights(family: str, storage: str, tmp_path: Path) -> None:
    # config.json says bfloat16: the output must be the source rounded once, and the tensors that
    # mlx-lm's cast_predicate keeps not even that.
    out = tmp_path / "out"
    convert(checkpoint(family, storage), out)
    rounded = reference_truth(family, storage, "bfloat16")
    prefill, decode = relative_error(mlx_logits(out, float32=True), rounded)
    assert prefill <= TOLERANCE
    assert decode <= TOLERANCE
