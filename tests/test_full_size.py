"""Formats of DeepSeek-V3 and R1 of which no header listing is public, planned at full size.

Their tensors are those of the FP8 listing, each weight in the parts that the format's loaders name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from listing import load

from mla_tools.codecs import MlxQuantized
from mla_tools.options import Options
from mla_tools.plan import make_steps
from mla_tools.spec import DType, Spec

Parts = dict[str, Spec]


def gptq(out: int, width: int) -> Parts:
    return {
        "qweight": Spec((width // 8, out), DType.I32),
        "qzeros": Spec((-(-width // 128), out // 8), DType.I32),
        "scales": Spec((-(-width // 128), out), DType.F16),
        "g_idx": Spec((width,), DType.I32),
    }


def quark(out: int, width: int) -> Parts:
    return {
        "weight": Spec((out, width // 2), DType.U8),
        "weight_scale": Spec((out, width // 32), DType.U8),
    }


def dense(out: int, width: int) -> Parts:
    return {"weight": Spec((out, width), DType.BF16)}


def moe_alone(name: str) -> bool:
    return ".mlp." in name and ".self_attn." not in name


GPTQ_CONFIG = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False}

# format -> its parts, which modules have it, the section of config.json, what embed_q becomes
FORMATS: dict[str, tuple[Callable[[int, int], Parts], Callable[[str], bool], dict[str, Any], str]] = {
    "gptq": (gptq, lambda name: True, GPTQ_CONFIG, "affine 8-bit g32"),
    "quark-mxfp4": (quark, moe_alone, {"quant_method": "quark"}, "bf16"),
    "quark-mxfp4-v2": (quark, lambda name: True, {"quant_method": "quark"}, "mxfp8"),
}


@pytest.mark.parametrize("fmt", FORMATS)
def test_a_full_size_table_leaves_no_unknown_and_no_missing_tensor(fmt: str) -> None:
    parts, chosen, section, embed_q = FORMATS[fmt]
    listing = load("deepseek_v3")
    stored: dict[str, Spec] = {}
    for name, spec in listing.stored.items():
        module, _, leaf = name.rpartition(".")
        if leaf == "weight_scale_inv":
            continue
        if spec.dtype is not DType.F8_E4M3:
            stored[name] = spec
            continue
        # The MTP layer is left in floats.
        packed = chosen(name) and not name.startswith("model.layers.61.")
        for part, held in (parts if packed else dense)(*spec.shape).items():
            stored[f"{module}.{part}"] = held
    made = make_steps(stored, {**listing.config, "quantization_config": section}, Options())
    assert made.problems == ()
    used = [part for step in made.steps for source in step.sources for part in source.parts.values()]
    used += [part for drop in made.drops for part in drop.source.parts.values()]
    assert sorted(used) == sorted(stored)
    words = {target.name: target for step in made.steps for target in step.targets}
    assert words["model.layers.60.self_attn.embed_q.weight"].codec.name == embed_q
    assert isinstance(words["model.layers.60.mlp.switch_mlp.up_proj.weight"].codec, MlxQuantized)
