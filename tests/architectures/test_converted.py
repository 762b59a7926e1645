"""A checkpoint that was converted already, through `convert` again: the same tensors, the same bits."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import pytest
from conversion import convert
from support import loaded, sample

from mla_tools.architectures import MODEL_TYPES


@pytest.mark.parametrize("family", MODEL_TYPES)
def test_converting_again_changes_nothing(family: str, tmp_path: Path) -> None:
    convert(sample(family), tmp_path / "once")
    plan = convert(tmp_path / "once", tmp_path / "twice")
    assert any("own layout already" in note for note in plan.notes)
    once, twice = loaded(tmp_path / "once"), loaded(tmp_path / "twice")
    assert once.keys() == twice.keys()
    for name, array in once.items():
        assert twice[name].dtype == array.dtype, name
        assert mx.array_equal(twice[name], array).item(), name
