"""Tensors to a checkpoint: the format asked for, shards with an index, config and tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mla_tools.architectures import Family, family_of
from mla_tools.codecs import FORMATS, Dense, TargetCodec, part_name
from mla_tools.files.safetensors import layout
from mla_tools.files.writer import Writer
from mla_tools.samples.tokenizer import write_json, write_tiktoken, write_tokenizer
from mla_tools.spec import DType, Spec

if TYPE_CHECKING:
    import mlx.core as mx

__all__ = ["format_of", "write_checkpoint"]

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

# The families whose repositories have a vocabulary for tiktoken, and code of their own that reads it.
_TIKTOKEN = ("kimi_k2", "kimi_k25", "kimi_k3", "kimi_linear")

_TORCH_DTYPES = {DType.F16: "float16", DType.F32: "float32"}


def write_checkpoint(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, mx.array], fmt: str, *, shards: int = 2
) -> None:
    """Write tensors under the hub's names as a checkpoint in a format, with a tokenizer.

    `tensors` are float32 or integers; `config` is as on the hub and gets the section of the
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
    write_json(folder / "config.json", written)
    if family.name in _TIKTOKEN:
        write_tiktoken(folder)
    else:
        write_tokenizer(folder)


def format_of(tensor: str, shape: tuple[int, ...], family: Family, fmt: str) -> tuple[TargetCodec, DType]:
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
        # Groups or words do not divide it, so it stays unquantized.
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
    write_json(folder / "model.safetensors.index.json", index)
