"""What many tests begin with: samples that are written once in a process, and what files and arrays hold."""

from __future__ import annotations

import atexit
import shutil
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import mlx.core as mx
import numpy as np
from mlx_lm.utils import _get_classes

from mla_tools.architectures import MODEL_TYPES
from mla_tools.samples import sample_config, write_sample

__all__ = ["contents", "loaded", "mlx_lm_reads", "same", "sample"]


def mlx_lm_reads(family: str) -> bool:
    """Return whether mlx-lm finds a class by the hub's config.json, so that it can convert by itself."""
    config = sample_config(family)
    config.setdefault("model_type", MODEL_TYPES[family].model_type)
    try:
        _get_classes(config)
    except ValueError:
        return False
    return True


def sample(family: str, fmt: str = "bf16") -> Path:
    """Return the sample of a family in a format. It is everybody's: what changes it takes a copy."""
    return _sample(family, fmt)


@cache
def _sample(family: str, fmt: str) -> Path:
    folder = _samples() / f"{family}-{fmt}" / family
    folder.parent.mkdir()
    write_sample(family, folder, fmt)
    return folder


@cache
def _samples() -> Path:
    folder = Path(mkdtemp(prefix="samples-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def without_tokenizer(folder: Path) -> Path:
    """Return a folder, without its tokenizer: a command then starts no process that opens it."""
    for path in folder.glob("*token*"):
        path.unlink()
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Return the bytes of each file in a folder."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def loaded(folder: Path) -> dict[str, mx.array]:
    """Return the weights in a folder."""
    files = sorted(folder.glob("model*.safetensors"))
    assert files, f"{folder} holds no weights"
    return {name: array for file in files for name, array in mx.load(str(file)).items()}


def same(left: mx.array, right: mx.array) -> bool:
    """Return whether two arrays have the same dtype, shape and bits."""
    alike = left.dtype == right.dtype and left.shape == right.shape
    return alike and np.array_equal(*(np.array(array.reshape(-1).view(mx.uint8)) for array in (left, right)))
