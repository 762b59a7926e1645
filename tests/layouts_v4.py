"""DeepSeek V4 in the layouts of the hub: the numbers of `reference_v4` as checkpoints, and what they mean.

`write` makes a folder in a layout and returns the float32 numbers that are stored there, by the names of
the class. Names and packings are written out here by hand, the 8-bit floats are torch's, the 4-bit ones
those of ml_dtypes, and MLX's modes are MLX's own; nothing here imports mla_tools.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import mlx.core as mx
import numpy as np
import torch
from reference_v4 import Arrays, Config, Torch, renamed
from safetensors.torch import save_file

__all__ = ["GAPS", "LAYOUTS", "decoded_fp4", "decoded_fp8", "official", "truth", "write"]

Stored = dict[str, torch.Tensor]
Numbers = tuple[Stored, Arrays]

# Parts of the class's names -> of DeepSeek's.
_OFFICIAL = [
    ("model.embed_tokens.", "embed."),
    ("lm_head.", "head."),
    ("model.hc_head.", "hc_head_"),
    ("model.", ""),
    (".attn_hc.", ".hc_attn_"),
    (".ffn_hc.", ".hc_ffn_"),
    ("e_score_correction_bias", "bias"),
    ("shared_experts.gate_proj", "shared_experts.w1"),
    ("shared_experts.down_proj", "shared_experts.w2"),
    ("shared_experts.up_proj", "shared_experts.w3"),
]
_EXPERTS = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
# What the official checkpoints store in FP8 and FP4, and in F32.
_FP8 = (".wq_a", ".wq_b", "attn.wkv", ".wo_a", ".wo_b", ".w1", ".w2", ".w3")
_F32 = ("_fn", "_base", "_scale", "attn_sink", "gate.bias", ".ape")

_FP8_SECTION = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "scale_fmt": "ue8m0",
    "weight_block_size": [128, 128],
}


def official(name: str) -> str:
    """Return DeepSeek's name of a tensor that is not of routed experts."""
    for ours, theirs in _OFFICIAL:
        name = name.replace(ours, theirs)
    return name


def _tensors(weights: Arrays) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield DeepSeek's tensors one by one, the experts apart and wo_a with its blocks on end."""
    for name, array in weights.items():
        if ".switch_mlp." in name:
            layer, proj = name.split(".")[2], name.split(".")[-2]
            for e, each in enumerate(array):
                yield (
                    f"layers.{layer}.ffn.experts.{e}.{_EXPERTS[proj]}.weight",
                    torch.from_numpy(each.copy()),
                )
        elif name.endswith("wo_a.weight"):
            yield official(name), torch.from_numpy(array.reshape(-1, array.shape[-1]).copy())
        elif name.endswith("tid2eid"):
            yield official(name), torch.from_numpy(array.astype(np.int64))
        else:
            yield official(name), torch.from_numpy(array.copy())


# ---- formats: (stored parts, what they mean)


def _powers(largest: torch.Tensor, top: float) -> torch.Tensor:
    """Return the smallest powers of two that bring the largest numbers to `top` or below."""
    return torch.exp2(torch.ceil(torch.log2(largest.clamp_min(1e-12) / top)))


def _tiles(weight: torch.Tensor) -> Iterator[tuple[int, int, slice, slice]]:
    rows, columns = weight.shape
    for i in range(-(-rows // 128)):
        for j in range(-(-columns // 128)):
            yield i, j, slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128)


def fp8(weight: torch.Tensor, scales: torch.dtype) -> Stored:
    rows, columns = weight.shape
    factors = torch.zeros(-(-rows // 128), -(-columns // 128))
    codes = torch.zeros_like(weight)
    for i, j, down, across in _tiles(weight):
        tile = weight[down, across]
        # Base checkpoints have scales that are no powers of two.
        factor = _powers(tile.abs().max(), 448.0) if scales is not torch.float32 else tile.abs().max() / 448.0
        factors[i, j], codes[down, across] = factor, tile / factor
    return {"weight": codes.to(torch.float8_e4m3fn), "scale": factors.to(scales)}


def decoded_fp8(parts: Stored) -> np.ndarray[Any, Any]:
    weight, scales = parts["weight"].float(), parts["scale"].float()
    for i, j, down, across in _tiles(weight):
        weight[down, across] *= scales[i, j]
    return weight.numpy()


def fp4(weight: torch.Tensor) -> Stored:
    groups = weight.reshape(weight.shape[0], -1, 32)
    factors = _powers(groups.abs().amax(-1), 6.0)
    codes = (groups / factors[..., None]).numpy().astype(ml_dtypes.float4_e2m1fn).view(np.uint8)
    codes = codes.reshape(weight.shape)
    packed = (codes[:, 0::2] | codes[:, 1::2] << 4).view(np.int8)
    return {"weight": torch.from_numpy(packed.copy()), "scale": factors.to(torch.float8_e8m0fnu)}


def _halves(packed: torch.Tensor) -> np.ndarray[Any, Any]:
    """Return the E2M1 numbers of packed rows, the low half of each byte first."""
    octets = packed.view(torch.uint8).numpy()
    codes = np.stack([octets & 15, octets >> 4], axis=-1).reshape(octets.shape[0], -1)
    return codes.view(ml_dtypes.float4_e2m1fn).astype(np.float32)


def decoded_fp4(parts: Stored) -> np.ndarray[Any, Any]:
    scales = parts["scale"].float().numpy()
    return _halves(parts["weight"]) * np.repeat(scales, 32, axis=1)


def nvfp4(weight: torch.Tensor) -> Stored:
    second = weight.abs().max() / (6.0 * 448.0)
    groups = weight.reshape(weight.shape[0], -1, 16)
    scales = (groups.abs().amax(-1) / 6.0 / second).to(torch.float8_e4m3fn)
    steps = scales.float().clamp_min(1e-6) * second
    codes = (groups / steps[..., None]).numpy().astype(ml_dtypes.float4_e2m1fn).view(np.uint8)
    codes = codes.reshape(weight.shape)
    packed = codes[:, 0::2] | codes[:, 1::2] << 4
    return {
        "weight": torch.from_numpy(packed.copy()),
        "weight_scale": scales,
        "weight_scale_2": second,
        "input_scale": torch.tensor(0.5),
    }


def decoded_nvfp4(parts: Stored) -> np.ndarray[Any, Any]:
    scales = parts["weight_scale"].float().numpy()
    return _halves(parts["weight"]) * np.repeat(scales, 16, axis=1) * parts["weight_scale_2"].item()


def affine(weight: torch.Tensor) -> Stored:
    """Return MLX's own 4 bits in groups of 32, of matrices or stacks of them."""
    parts = mx.quantize(mx.array(weight.numpy()), group_size=32, bits=4)
    return {
        name: torch.from_numpy(np.array(part))
        for name, part in zip(("weight", "scales", "biases"), parts, strict=True)
    }


def decoded_affine(parts: Stored) -> np.ndarray[Any, Any]:
    arrays = [mx.array(parts[name].numpy()) for name in ("weight", "scales", "biases")]
    return np.array(mx.dequantize(*arrays, group_size=32, bits=4))


# ---- layouts


def _put(stored: Stored, name: str, parts: Stored) -> None:
    module = name.removesuffix(".weight")
    stored.update({f"{module}.{part}": tensor.contiguous() for part, tensor in parts.items()})


def _gather(weights: Arrays, numbers: Arrays) -> Arrays:
    """Return decoded numbers by DeepSeek's names in the names and shapes of the class."""
    found: Arrays = {}
    for name, array in weights.items():
        if ".switch_mlp." in name:
            layer, proj = name.split(".")[2], _EXPERTS[name.split(".")[-2]]
            each = [numbers[f"layers.{layer}.ffn.experts.{e}.{proj}.weight"] for e in range(len(array))]
            found[name] = np.stack(each)
        else:
            found[name] = numbers[official(name)].reshape(array.shape)
    return found


def _deepseek(weights: Arrays, experts: str) -> Numbers:
    stored: Stored = {}
    numbers: Arrays = {}
    kinds = {
        "fp4": (fp4, decoded_fp4),
        "base": (lambda weight: fp8(weight, torch.float32), decoded_fp8),
        "nvfp4": (nvfp4, decoded_nvfp4),
    }
    for name, tensor in _tensors(weights):
        module = name.removesuffix(".weight")
        if ".experts." in name:
            encode, decode = kinds[experts]
            parts = encode(tensor)
            _put(stored, name, parts)
            numbers[name] = decode(parts)
        elif tensor.ndim == 2 and module.endswith(_FP8) and ".compressor." not in name:
            parts = fp8(tensor, torch.float8_e8m0fnu)
            _put(stored, name, parts)
            numbers[name] = decoded_fp8(parts)
        else:
            keep = not tensor.is_floating_point() or name.endswith(_F32)
            stored[name] = tensor if keep else tensor.bfloat16()
            numbers[name] = stored[name].float().numpy() if tensor.is_floating_point() else tensor.numpy()
    return stored, _gather(weights, numbers)


def _dialect_a(weights: Arrays) -> Numbers:
    """Early mlx-community: DeepSeek's names, experts stacked, wo_a in pieces, embedding and head packed."""
    stored: Stored = {}
    found: Arrays = {}
    for name, array in weights.items():
        tensor, theirs = torch.from_numpy(array.copy()), official(name)
        module = theirs.removesuffix(".weight")
        if ".switch_mlp." in name:
            layer, proj = name.split(".")[2], name.split(".")[-2]
            theirs = f"layers.{layer}.ffn.experts.{_EXPERTS[proj]}.weight"
            pieces = {theirs: tensor}
        elif name.endswith("wo_a.weight"):
            pieces = {f"{module}.{g}.weight": each for g, each in enumerate(tensor)}
        elif module.endswith(_FP8) or module in ("embed", "head"):
            pieces = {theirs: tensor} if ".compressor." not in theirs else {}
        else:
            pieces = {}
        if not pieces:
            stored[theirs] = tensor
            found[name] = array
            continue
        decoded = []
        for piece, each in pieces.items():
            parts = affine(each)
            _put(stored, piece, parts)
            decoded.append(decoded_affine(parts))
        found[name] = np.stack(decoded).reshape(array.shape)
    return stored, found


def _dialect_c(weights: Arrays) -> Numbers:
    """exo: fused wq_a with wkv and wkv with wgate, hyper-connections in single modules."""
    stored: Stored = {}
    for name, array in weights.items():
        if name.endswith(("attn.wkv.weight", "wgate.weight")):
            continue
        name = name.replace(".attn_hc.", ".hc_attn.").replace(".ffn_hc.", ".hc_ffn.")
        if name.endswith("attn.wq_a.weight"):
            array = np.concatenate([array, weights[name.replace("wq_a", "wkv")]])
            name = name.replace("wq_a", "wqkv_a")
        elif name.endswith("compressor.wkv.weight"):
            array = np.concatenate([array, weights[name.replace("wkv", "wgate")]])
            name = name.replace("wkv", "wkv_gate")
        stored[name.removeprefix("model.")] = torch.from_numpy(array.copy())
    return stored, weights


def _dialect_b(weights: Arrays) -> Numbers:
    return {name: torch.from_numpy(array.copy()) for name, array in weights.items()}, weights


def _mlx_vlm(weights: Arrays) -> Numbers:
    stored, numbers = _dialect_b(weights)
    return {f"language_model.{name}": tensor for name, tensor in stored.items()}, numbers


def _plain(weights: Arrays) -> Numbers:
    return dict(_tensors(weights)), weights


Layout = Callable[[Arrays], Numbers]

LAYOUTS: dict[str, Layout] = {
    "official": lambda weights: _deepseek(weights, "fp4"),
    "base": lambda weights: _deepseek(weights, "base"),
    "nvfp4": lambda weights: _deepseek(weights, "nvfp4"),
    "official-f32": _plain,
    "dialect-a": _dialect_a,
    "dialect-b": _dialect_b,
    "dialect-b-mlx-vlm": _mlx_vlm,
    "dialect-c": _dialect_c,
    # Written by transformers: see `write`.
    "transformers": _plain,
    "save_pretrained": _plain,
}

# What mlx-lm PR 1195 does not load, in `dialect-a`.
GAPS = {
    "stacked experts": "layers.4.ffn.experts.w2.scales",
    "wo_a in pieces": "layers.3.attn.wo_a.1.weight",
    "the scales of the embedding": "embed.scales",
    "the biases of the head": "head.biases",
}

_SECTIONS: dict[str, Config] = {
    "official": {"quantization_config": _FP8_SECTION},
    "base": {"quantization_config": _FP8_SECTION},
    "nvfp4": {"quantization_config": {**_FP8_SECTION, "moe_quant_algo": "NVFP4"}},
    "dialect-a": {"quantization": {"group_size": 32, "bits": 4}},
}


def write(source: Torch, layout: str, folder: Path) -> Arrays:
    """Write the numbers of a model in a layout, and return what they are there."""
    stored, numbers = LAYOUTS[layout](source.weights)
    config = {**source.config, **_SECTIONS.get(layout, {})}
    if layout == "save_pretrained":
        source.model.save_pretrained(folder)
        return numbers
    if layout == "transformers":
        stored = {name: tensor.contiguous() for name, tensor in source.model.state_dict().items()}
    folder.mkdir()
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return numbers


def truth(source: Torch, numbers: Arrays, ids: list[int]) -> np.ndarray[Any, Any]:
    """Return the logits that transformers computes with other numbers, by the names of the class."""
    other = copy.copy(source)
    other.model = copy.deepcopy(source.model)
    state = {}
    for name, tensor in source.model.state_dict().items():
        ours = renamed(name)
        if ours.endswith("gate_up_proj"):
            pair = (f"{ours.removesuffix('gate_up_proj')}{half}_proj.weight" for half in ("gate", "up"))
            array = np.concatenate([numbers[half] for half in pair], axis=1)
        else:
            array = numbers[ours] if ours in numbers else numbers[f"{ours}.weight"]
        state[name] = torch.from_numpy(np.ascontiguousarray(array)).reshape(tensor.shape).to(tensor.dtype)
    other.model.load_state_dict(state, strict=True)
    return other.logits(ids)
