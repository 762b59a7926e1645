"""Tiny random checkpoints in the hub's real layout, for demos, tests and bug reports.

They are made by running a family's table backwards: random values for every tensor of the model, the
inverse of each rule, and the format asked for. So they need neither torch nor transformers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mla_tools.architectures import MODEL_TYPES, Family, family_of, table_of
from mla_tools.architectures.geometry import OPEN
from mla_tools.codecs import FORMATS, Codec, Dense, part_name
from mla_tools.errors import MlaToolsError, UsageError
from mla_tools.files.safetensors import layout
from mla_tools.files.writer import Writer
from mla_tools.ops import Indices
from mla_tools.rules import Drop, Param, Table, name
from mla_tools.spec import DType, Spec

if TYPE_CHECKING:
    import mlx.core as mx
    import numpy as np

__all__ = ["FORMATS", "format_of", "write_checkpoint", "write_sample", "write_tokenizer"]

# What quantized checkpoints leave in floats, by the ending of the module's name.
# Source: the header listings of DeepSeek V3, V3.2 and V4.
_NEVER_QUANTIZED = (
    "embed_tokens",
    "embed",
    "head",
    "eh_proj",
    "weights_proj",
    ".gate",
    "compressor.wkv",
    "compressor.wgate",
)

# The modules beside a language model, which nobody quantizes either.
_BESIDE = ("vision_tower.", "multi_modal_projector.", "mm_projector.")

_TORCH_DTYPES = {DType.F16: "float16", DType.F32: "float32"}

_EOS = "<|end|>"


def write_sample(family: str, folder: Path, fmt: str = "bf16", *, seed: int = 0, shards: int = 2) -> None:
    """Write a checkpoint folder of a family: config, weights in shards with an index, tokenizer.

    The same arguments give the same bytes. Raises UsageError for an unknown family or format, and
    MlaToolsError if the folder exists.
    """
    if family not in MODEL_TYPES:
        raise UsageError(f"{family}: no such family; known are {', '.join(MODEL_TYPES)}")
    if fmt not in FORMATS:
        raise UsageError(f"{fmt}: no such format; known are {', '.join(FORMATS)}")
    if folder.exists():
        raise MlaToolsError(f"{folder} already exists; a sample is written to a new folder.")
    config = dict(MODEL_TYPES[family].sample)
    found, table = table_of(config)
    write_checkpoint(folder, config, _tensors(table, found.numbers(config), seed), fmt, shards=shards)


def write_checkpoint(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, mx.array], fmt: str, *, shards: int = 2
) -> None:
    """Write tensors under the hub's names as a checkpoint in a format, with a tokenizer.

    `tensors` are float32 or whole numbers; `config` is in the hub's spelling and gets the section of the
    format.
    """
    import mlx.core as mx

    family = family_of(config)
    sample = FORMATS[fmt]
    stored: dict[str, tuple[Spec, mx.array]] = {}
    for tensor, array in tensors.items():
        codec, dtype = format_of(tensor, tuple(array.shape), family, fmt)
        if mx.issubdtype(array.dtype, mx.integer):
            codec, dtype = Dense(DType.I64), DType.I64
        # MLX has no 8-bit floats, so only the codec knows what its bytes are.
        specs = codec.encoded(Spec(tuple(array.shape), dtype))
        for part, value in codec.encode(array.astype(getattr(mx, dtype.mlx))).items():
            stored[part_name(tensor, part)] = specs[part], value
    written = {**config, "torch_dtype": _TORCH_DTYPES.get(sample.dtype, "bfloat16")}
    if sample.section is not None:
        written["quantization_config"] = dict(sample.section)
    folder.mkdir(parents=True)
    _write_shards(folder, stored, shards)
    _write_json(folder / "config.json", written)
    write_tokenizer(folder)


def _tensors(table: Table, config: Mapping[str, Any], seed: int) -> dict[str, mx.array]:
    """Return random values for every tensor that a checkpoint of this config holds, the floats in float32."""
    import mlx.core as mx
    import numpy as np

    rng = np.random.default_rng(seed)
    known = table.targets()
    tensors: dict[str, mx.array] = {}
    for rule in table.inverse().rules:
        for key in rule.applications():
            arrays = [mx.array(_values(rng, source, *known[source])) for source in rule.sources(key)]
            if isinstance(rule.op, Indices):
                arrays = [mx.array(rng.integers(rule.op.below, size=array.shape)) for array in arrays]
            tensors |= zip(rule.targets(key), rule.op.apply(arrays), strict=True)
    for drop in table.drops:
        for tensor in drop.inside if drop.usual else ():
            # What a dropped module is made of is nobody's business here: the names are enough.
            tensors[f"{drop.source}.{tensor}"] = mx.array(_values(rng, tensor, (64,), Param()))
        if drop.usual and drop.shape is not None:
            for tensor in _dropped(drop, config):
                tensors[tensor] = mx.array(_values(rng, tensor, drop.shape, Param()))
    return tensors


def _dropped(drop: Drop, config: Mapping[str, Any]) -> list[str]:
    """Return the names that a drop stands for in a checkpoint whose MTP layers the config counts."""
    count = config.get("num_nextn_predict_layers", 1)
    template = name(drop.source)
    # An open range is one of MTP layers.
    domains = [
        range(domain.start, domain.start + count)
        if isinstance(domain, range) and domain.stop == OPEN
        else sorted(domain)
        for domain in (drop.where[index] for index in template.indices)
    ]
    return [template.format(dict(zip(template.indices, values, strict=True))) for values in product(*domains)]


def _values(
    rng: np.random.Generator, tensor: str, shape: tuple[int, ...], param: Param
) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Return values of a size at which a random model's logits stay finite and differ."""
    import numpy as np

    values = rng.standard_normal(shape, dtype=np.float32)
    if tensor.endswith("A_log"):
        return np.log(1 + 15 * rng.random(shape, dtype=np.float32))
    if tensor.endswith("norm.weight"):
        return 1 + values / np.float32(10)
    if len(shape) < 2:
        return values / np.float32(10)
    return values / np.float32(math.sqrt(shape[-1]))


def format_of(tensor: str, shape: tuple[int, ...], family: Family, fmt: str) -> tuple[Codec, DType]:
    """Return how a tensor is stored in the real checkpoints of a format, and its float dtype."""
    sample = FORMATS[fmt]
    codec, dtype = sample.codec, sample.dtype
    if sample.experts is not None and ".experts." in tensor:
        codec = sample.experts
    module = tensor.removesuffix(".weight")
    never = module == tensor or len(shape) != 2 or module.endswith(_NEVER_QUANTIZED)
    if codec.quantized and (never or module.startswith(_BESIDE)):
        codec = Dense(dtype)
    if tensor.endswith(family.float32):
        return Dense(DType.F32), DType.F32
    try:
        codec.encoded(Spec(shape, dtype))
    except ValueError:
        # Groups or words do not divide it, so it stays dense.
        codec = Dense(dtype)
    return codec, dtype


def _write_shards(folder: Path, stored: Mapping[str, tuple[Spec, mx.array]], count: int) -> None:
    import mlx.core as mx
    import numpy as np

    names = sorted(stored)
    weight_map = {}
    for number in range(count):
        # Every count-th name, so that a weight and its scale lie in different files, as they may.
        held = names[number::count]
        file = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
        specs = {tensor: stored[tensor][0] for tensor in held}
        writer = Writer(folder / file, layout(specs, {"format": "pt"}))
        for tensor in held:
            flat = mx.contiguous(stored[tensor][1]).reshape(-1).view(mx.uint8)
            writer.write(tensor, 0, np.array(flat, copy=False))
            weight_map[tensor] = file
        writer.finish()
    total = sum(spec.nbytes for spec, _ in stored.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    _write_json(folder / "model.safetensors.index.json", index)


def write_tokenizer(folder: Path) -> None:
    """Write a tokenizer of bytes, which knows every text and needs no training: 257 entries."""
    # The printable stand-ins for bytes that byte-level tokenizers use: bytes that are printable stand
    # for themselves, the others for the characters from 256 on.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {byte: chr(byte) for byte in printable}
    letters |= {byte: chr(256 + n) for n, byte in enumerate(b for b in range(256) if b not in letters)}
    vocab = {letters[byte]: byte for byte in range(256)} | {_EOS: 256}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    _write_json(
        folder / "tokenizer.json",
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [{"id": 256, "content": _EOS, **special}],
            "normalizer": None,
            "pre_tokenizer": byte_level,
            "post_processor": None,
            "decoder": byte_level,
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": False,
                "byte_fallback": False,
                "vocab": vocab,
                "merges": [],
            },
        },
    )
    _write_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": _EOS, "model_max_length": 4096},
    )
    _write_json(folder / "generation_config.json", {"eos_token_id": 256})


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n")
