"""Every family in every format: converted, run by mlx-lm, and compared with transformers.

The cells come from the two registries: the families of tests/reference.py, which transformers has a model
for, with two of them beside an image encoder, and the formats that a sample can be written in. A new one
joins by itself. Truth is transformers in
float32 on the decoded weights; that each codec decodes to the right numbers is shown in tests/codecs,
against implementations of others.

`python tests/test_matrix.py --write` makes docs/matrix.md, with what mlx-lm makes of the same files.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import sys
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from conversion import convert
from reference import FAMILIES, Logits, checkpoint, hub_logits, mlx_logits, relative_error

from mla_tools.codecs import FORMATS
from mla_tools.files.checkpoint import open_checkpoint
from mla_tools.options import Options
from mla_tools.plan import make_steps
from mla_tools.samples import write_checkpoint
from mla_tools.spec import DType

TOLERANCE = 1e-5
# The families whose language model is one of the others, under a name of its own and beside images.
WRAPPED = {"kimi_k25": "kimi_k2", "kimi_vl": "deepseek_v3"}
COLUMNS = [*FAMILIES, *WRAPPED]
CELLS = [(family, fmt) for family in COLUMNS for fmt in FORMATS]


def dense(family: str) -> tuple[dict[str, Any], dict[str, mx.array]]:
    """Return the config and the float32 tensors of the reference checkpoint of a family."""
    # mlx-lm's deepseek_v3 drops no other MTP layer than number 61, which would decide the whole column.
    inner = WRAPPED.get(family, family)
    folder = checkpoint(inner, "f32", mtp=inner != "deepseek_v3")
    tensors: dict[str, mx.array] = {}
    for file in sorted(folder.glob("model*.safetensors")):
        tensors |= {name: array.astype(mx.float32) for name, array in mx.load(str(file)).items()}
    assert tensors
    config = json.loads((folder / "config.json").read_text())
    if family not in WRAPPED:
        return config, tensors
    wrapped = {"model_type": family, "torch_dtype": config.pop("torch_dtype"), "text_config": config}
    return wrapped, {f"language_model.{name}": array for name, array in tensors.items()}


@cache
def cell(family: str, fmt: str) -> tuple[Path, dict[str, torch.Tensor]]:
    """Return a checkpoint of a family in a format, and its decoded weights."""
    folder = Path(mkdtemp(prefix="matrix-")) / "source"
    config, tensors = dense(family)
    write_checkpoint(folder, config, tensors, fmt)
    stored: dict[str, mx.array] = {}
    for file in folder.glob("model*.safetensors"):
        stored |= mx.load(str(file))
    assert stored
    found = open_checkpoint(folder)
    specs = {name: place.spec for name, place in found.tensors.items()}
    made = make_steps(specs, found.config, Options())
    assert made.problems == ()
    sources = [source for step in made.steps for source in step.sources]
    decoded: dict[str, torch.Tensor] = {}
    for source in sources + [drop.source for drop in made.drops]:
        spec = source.spec
        parts = {part: stored[name] for part, name in source.parts.items()}
        rows = {part: a.reshape(-1, a.shape[-1] if a.ndim else 1) for part, a in parts.items()}
        value = source.codec.decode(rows, 0, spec.rows, DType.F32).reshape(spec.shape)
        decoded[source.name] = torch.from_numpy(np.array(value))
    return folder, decoded


@cache
def truth_of(family: str, fmt: str, cast: str | None = None) -> Logits:
    """Return the logits of the decoded weights, of the weights rounded to `cast` if it is given."""
    folder, decoded = cell(family, fmt)
    config = json.loads((folder / "config.json").read_text())
    if family in WRAPPED:
        config = config["text_config"]
        decoded = {name.removeprefix("language_model."): value for name, value in decoded.items()}
    return hub_logits(decoded, config, cast)


def error(folder: Path, truth: Logits) -> float:
    return max(relative_error(mlx_logits(folder), truth))


@pytest.mark.parametrize(("family", "fmt"), [pytest.param(*c, id=f"{c[0]}-{c[1]}") for c in CELLS])
def test_float32_is_the_decoded_source(family: str, fmt: str, tmp_path: Path) -> None:
    source, truth = cell(family, fmt)[0], truth_of(family, fmt)
    # The K half in floats: with the default of 8 bits the error is that of 8 bits.
    convert(source, tmp_path / "out", "--dtype", "float32", "--embed-q", "float")
    assert error(tmp_path / "out", truth) <= TOLERANCE
    shutil.rmtree(tmp_path / "out")


def theirs(family: str, fmt: str) -> str:
    """Return what mlx-lm makes of a checkpoint as it is."""
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            logits = mlx_logits(cell(family, fmt)[0])
    except Exception as reason:
        return f"does not load ({type(reason).__name__})"
    found = max(relative_error(logits, truth_of(family, fmt)))
    if found <= TOLERANCE:
        return f"{found:.0e}"
    rounded = max(relative_error(logits, truth_of(family, fmt, "bfloat16")))
    return f"{rounded:.0e} of the weights in bf16" if rounded <= TOLERANCE else f"{found:.0e}, **off**"


def ours(family: str, fmt: str) -> str:
    source, truth = cell(family, fmt)[0], truth_of(family, fmt)
    out = Path(mkdtemp(prefix="matrix-")) / "out"
    convert(source, out, "--dtype", "float32", "--embed-q", "float")
    found = error(out, truth)
    shutil.rmtree(out.parent)
    return f"{found:.0e}"


def table() -> str:
    lines = [
        "# Families and formats",
        "",
        "Relative error of the logits against transformers in float32 on the exactly decoded weights: the",
        "larger of a 24-token prefill and 6 cached decode steps, on tiny random checkpoints. First what",
        "`mla-sanitize convert --dtype float32 --embed-q float` makes of a checkpoint, then what mlx-lm",
        "0.32.2 makes of the same files by itself; off: neither the logits of these weights nor those of the",
        "weights rounded to bfloat16. MLX has no CPU kernel for experts with a global scale (NVFP4): there",
        "`mx.dequantize` decodes each expert and `mx.gather_mm` multiplies. Made by",
        "`python tests/test_matrix.py --write`.",
    ]
    for family in COLUMNS:
        lines += ["", f"## {family}", "", "| format | mla-tools | mlx-lm alone |", "|---|---|---|"]
        for fmt in FORMATS:
            lines.append(f"| {fmt} | {ours(family, fmt)} | {theirs(family, fmt)} |")
            print(lines[-1], file=sys.stderr, flush=True)
    return "\n".join(lines) + "\n"


if __name__ == "__main__" and sys.argv[1:] == ["--write"]:
    (Path(__file__).parents[1] / "docs" / "matrix.md").write_text(table())
