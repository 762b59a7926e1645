"""Families in formats: converted, run by mlx-lm, and compared with transformers.

The cells come from the two registries: the families of tests/reference.py, which transformers has a model
for, with two of them beside a vision encoder, and the formats that a sample can be written in. A new one
joins automatically. Truth is transformers in
float32 on the decoded weights; that each codec decodes to the right numbers is shown in tests/codecs,
against implementations of others.

Pairs stand for the product. With `--all` every cell runs, and docs/matrix.md is written, with what mlx-lm
makes of the same files; without it, the cells that run are compared with what stands there.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from conversion import convert
from pairs import ONLY_IN_ALL, PUBLISHED, pairs, product
from reference import FAMILIES, Logits, checkpoint, hub_logits, mlx_logits, relative_error

from mla_tools.codecs import FORMATS
from mla_tools.files.checkpoint import open_checkpoint
from mla_tools.options import Options
from mla_tools.plan import make_steps
from mla_tools.samples import write_checkpoint
from mla_tools.spec import DType

TOLERANCE = 1e-5
# The families whose language model is one of the others, under another name and beside vision tensors.
WRAPPED = {"kimi_k25": "kimi_k2", "kimi_vl": "deepseek_v3"}
COLUMNS = [*FAMILIES, *WRAPPED]
# And that the two agree with each other, beside vision tensors too.
PAIRS = pairs(COLUMNS, FORMATS, [*PUBLISHED, ("deepseek_v3", "deepseek-v4"), ("kimi_vl", "fp8")], times=1)
CELLS = product(COLUMNS, FORMATS, PAIRS)

TABLE = Path(__file__).parents[1] / "docs" / "matrix.md"


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


@cache
def ours(family: str, fmt: str) -> str:
    """Return how far what we make of a checkpoint lies from the truth."""
    with TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        # The K half in floats: with the default of 8 bits the error is that of 8 bits.
        convert(cell(family, fmt)[0], out, "--dtype", "float32", "--embed-q", "float")
        found = max(relative_error(mlx_logits(out), truth_of(family, fmt)))
    return f"{found:.0e}"


@pytest.mark.parametrize(("family", "fmt"), CELLS)
def test_float32_is_the_decoded_source(family: str, fmt: str) -> None:
    assert float(ours(family, fmt)) <= TOLERANCE


@cache
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


def table() -> str:
    lines = [
        "# Families and formats",
        "",
        "Relative error of the logits against transformers in float32 on the exactly decoded weights: the",
        "larger of the errors of a 24-token prefill and of 6 cached decode steps, on tiny random",
        "checkpoints. The first column is the output of `mla-sanitize convert --dtype float32 --embed-q",
        "float`, the second is mlx-lm 0.32.2 on the same files; off: neither the logits of these weights nor",
        "those of the weights rounded to bfloat16. MLX has no CPU kernel for experts with a global scale",
        "(NVFP4): there `mx.dequantize` decodes each expert and `mx.gather_mm` multiplies. Made by",
        "`make test-all`.",
    ]
    for family in COLUMNS:
        lines += ["", f"## {family}", "", "| format | mla-tools | mlx-lm alone |", "|---|---|---|"]
        lines += [f"| {fmt} | {ours(family, fmt)} | {theirs(family, fmt)} |" for fmt in FORMATS]
    return "\n".join(lines) + "\n"


@ONLY_IN_ALL
def test_the_table_is_written() -> None:
    TABLE.write_text(table())


def read() -> dict[tuple[str, str], tuple[str, str]]:
    """Return what the table says of us and of mlx-lm alone, for each family and format."""
    said: dict[tuple[str, str], tuple[str, str]] = {}
    for section in TABLE.read_text().split("\n## ")[1:]:
        family, *rows = section.splitlines()
        for fmt, *both in re.findall(r"^\| (\S+) \| (\S+) \| (.+) \|$", "\n".join(rows), re.MULTILINE):
            if fmt != "format":
                assert (family, fmt) not in said, "a duplicate row"
                said[family, fmt] = both[0], both[1]
    return said


def test_the_table_has_every_family_and_format() -> None:
    assert list(read()) == [(family, fmt) for family in COLUMNS for fmt in FORMATS], "run `make test-all`"


@pytest.mark.parametrize(("family", "fmt"), product(COLUMNS, FORMATS, PAIRS))
def test_the_table_says_what_is_found(family: str, fmt: str) -> None:
    for said, found in zip(read()[family, fmt], (ours(family, fmt), theirs(family, fmt)), strict=True):
        number, words = parts(said)
        again, same_words = parts(found)
        assert words == same_words, "run `make test-all`"
        # The last bits of float32 are not the same on every machine.
        assert number == again or 0.1 < again / number < 10, "run `make test-all`"


def parts(entry: str) -> tuple[float | None, str]:
    """Return the number with which an entry of the table begins, if it does, and the rest."""
    found = re.match(r"\d+e[+-]\d+", entry)
    return (float(found[0]), entry[found.end() :]) if found else (None, entry)
