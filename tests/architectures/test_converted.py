"""A checkpoint that was converted already, through `convert` again: the same tensors, the same bits."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import pytest
from conversion import convert

from mla_tools.architectures import MODEL_TYPES
from mla_tools.samples import write_sample


def load(folder: Path) -> dict[str, mx.array]:
    files = sorted(folder.glob("model*.safetensors"))
    assert files, f"{folder} holds no weights"
    return {name: array for file in files for name, array in mx.load(str(file)).items()}


@pytest.mark.parametrize("family", MODEL_TYPES)
def test_converting_again_changes_nothing(family: str, tmp_path: Path) -> None:
    write_sample(family, tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "once")
    plan = convert(tmp_path / "once", tmp_path / "twice")
    assert any("own layout already" in note for note in plan.notes)
    once, twice = load(tmp_path / "once"), load(tmp_path / "twice")
    assert once.keys() == twice.keys()
    for name, array in once.items():
        assert twice[name].dtype == array.dtype, name
        assert mx.array_equal(twice[name], array).item(), name
