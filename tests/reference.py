"""The oracle of the tests: tiny checkpoints in the hub's layout, and the logits that they stand for.

`make_checkpoint` writes a folder as it would come from the hub: the hub's config keys, the hub's tensor
names, dtypes and axis order, shards, an index, and a tokenizer that loads offline. `truth` reads such a
folder back, decodes every stored number exactly to float32, and lets transformers (float32, eager
attention, CPU) compute a prefill and a few cached decode steps. `mlx_logits` does the same with mlx-lm.
Nothing here imports mla_tools, so an error of the package cannot hide in what it is measured against.

The names between hub and transformers are mapped here by hand, in both directions. `from_pretrained`,
which has a mapping of its own, has to give the same logits; test_reference.py checks it.

Where the forward passes of mlx-lm and transformers themselves differ, the sizes and weights below keep
the difference under 1e-6 (the reasons stand beside the config they concern):

* transformers gives the norms inside MLA (q_a_layernorm, kv_a_layernorm) the eps 1e-6. mlx-lm uses 1e-6
  in the DeepSeek files, rms_norm_eps in glm4_moe_lite and kimi_linear, and 1e-5 in longcat_flash. The
  rows of the a-projections that feed these norms are therefore drawn `LATENT_GAIN` times larger than
  the others: the mean square that eps is added to is then about 25, and 9e-6 moves nothing.
* With several expert groups mlx-lm gives the experts of the losing groups the score 0, transformers
  minus infinity. All correction biases are drawn positive, so that no live score is below 0.
* mlx-lm takes eps 1e-5 for the LayerNorm of the V3.2 indexer, transformers 1e-6. Its output only ranks
  tokens, and `index_topk` (16) is smaller than the prompt, so that the ranking is exercised.
"""

from __future__ import annotations

import atexit
import functools
import importlib
import json
import math
import re
import shutil
import tempfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import numpy as np
import torch
from safetensors.torch import load_file, save_file

__all__ = [
    "FAMILIES",
    "FP8_FAMILIES",
    "KEPT",
    "STORAGES",
    "TOKENS",
    "Logits",
    "Storage",
    "checkpoint",
    "decoded",
    "hub_logits",
    "make_checkpoint",
    "mlx_logits",
    "model_type",
    "reference_truth",
    "relative_error",
    "second_scales_on_a_cpu",
    "truth",
]

Storage = Literal["f32", "bf16", "fp8"]
Config = dict[str, Any]
Tensors = dict[str, torch.Tensor]

VOCAB = 320
BOS, EOS = 256, 257  # the two special tokens come right after the 256 bytes
PREFILL, DECODE = 24, 6
# Fixed token ids: the prompt, then the tokens fed one by one.
TOKENS = tuple((37 * i * i + 101 * i + 5) % 251 + 3 for i in range(PREFILL + DECODE))
LATENT_GAIN = 5.0  # see the top of the file
FP8_BLOCK = 128
FP8_MAX = 448.0

_YARN = {
    "type": "yarn",
    "factor": 40,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 4096,
}

# What all hub configs of these families have in common. The widths differ from one another wherever they
# may (so that a transposed or swapped tensor has the shape mismatch), and every last axis of a tensor that
# could be quantized is a multiple of 64. hidden_size 192 and kv_a's 128 + 32 rows leave half-full FP8
# blocks on both axes.
_COMMON: Config = {
    "hidden_size": 192,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": VOCAB,
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "use_cache": True,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.46.3",
}

_MLA: Config = {
    "q_lora_rank": 128,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
}

_DEEPSEEK_V3: Config = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    **_COMMON,
    **_MLA,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "intermediate_size": 320,
    "moe_intermediate_size": 64,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "ep_size": 1,
    "num_nextn_predict_layers": 1,
    "max_position_embeddings": 163840,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "rope_scaling": _YARN,
}

_DEEPSEEK_V2_LITE: Config = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    **_COMMON,
    **_MLA,
    "q_lora_rank": None,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "intermediate_size": 320,
    "moe_intermediate_size": 64,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "greedy",
    "scoring_func": "softmax",
    # mlx-lm's deepseek_v2 and transformers' both ignore this key; no published V2 sets it.
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.0,
    "max_position_embeddings": 163840,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "rope_scaling": {**_YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
}

FAMILIES: dict[str, Config] = {
    "deepseek_v3": _DEEPSEEK_V3,
    # One expert group, another yarn factor, no MTP layer; the checkpoint carries rotary_emb.inv_freq.
    "kimi_k2": {
        **_DEEPSEEK_V3,
        "model_type": "kimi_k2",
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 2.827,
        "num_nextn_predict_layers": 0,
        "max_position_embeddings": 262144,
        "rms_norm_eps": 1e-5,
        "rope_theta": 50000.0,
        "rope_scaling": {**_YARN, "factor": 64.0, "beta_fast": 32.0, "beta_slow": 1.0},
    },
    # Many indexer heads: a token gets the score 0 exactly where no head is positive, and such ties may be
    # broken differently.
    "deepseek_v32": {
        **_DEEPSEEK_V3,
        "architectures": ["DeepseekV32ForCausalLM"],
        "model_type": "deepseek_v32",
        "index_head_dim": 64,
        "index_n_heads": 16,
        "index_topk": 16,
    },
    # No rope scaling, V heads wider than the nope part (as 256 and 192 in the real one), no quantization.
    "glm4_moe_lite": {
        "architectures": ["Glm4MoeLiteForCausalLM"],
        "model_type": "glm4_moe_lite",
        **_COMMON,
        **_MLA,
        "q_lora_rank": 64,
        "v_head_dim": 128,
        "num_hidden_layers": 3,
        "first_k_dense_replace": 1,
        "intermediate_size": 320,
        "moe_intermediate_size": 64,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 3,
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "noaux_tc",
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.8,
        "num_nextn_predict_layers": 1,
        "max_position_embeddings": 202752,
        "rms_norm_eps": 1e-5,
        "partial_rotary_factor": 1.0,
        "rope_interleave": True,
        "rope_theta": 1000000,
        "rope_scaling": None,
    },
    # The layer lists count from 1. moe_renormalize divides by the sum of the chosen scores in both.
    "kimi_linear": {
        "architectures": ["KimiLinearForCausalLM"],
        "model_type": "kimi_linear",
        **_COMMON,
        **_MLA,
        "q_lora_rank": None,
        "head_dim": 72,
        "mla_use_nope": True,
        "num_hidden_layers": 4,
        "pad_token_id": EOS,
        "linear_attn_config": {
            "full_attn_layers": [2, 4],
            "kda_layers": [1, 3],
            "head_dim": 64,
            "num_heads": 4,
            "short_conv_kernel_size": 4,
        },
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
        "intermediate_size": 320,
        "moe_intermediate_size": 64,
        "num_experts": 8,
        "num_experts_per_token": 3,
        "num_shared_experts": 1,
        "num_expert_group": 1,
        "topk_group": 1,
        "use_grouped_topk": True,
        "moe_renormalize": True,
        "moe_router_activation_func": "sigmoid",
        "routed_scaling_factor": 2.446,
        "num_nextn_predict_layers": 0,
        "model_max_length": 1048576,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "rope_scaling": None,
    },
    # No model_type, num_layers for num_hidden_layers; each layer holds two attentions and two dense MLPs.
    # q_lora and kv_lora differ, so that the two sqrt(hidden / rank) factors do.
    "longcat_flash": {
        "architectures": ["LongcatFlashForCausalLM"],
        **{k: v for k, v in _COMMON.items() if k not in ("num_key_value_heads", "hidden_act")},
        **_MLA,
        "q_lora_rank": 64,
        "attention_method": "MLA",
        "mla_scale_q_lora": True,
        "mla_scale_kv_lora": True,
        "num_layers": 2,
        "ffn_hidden_size": 320,
        "expert_ffn_hidden_size": 64,
        "n_routed_experts": 8,
        "moe_topk": 3,
        "zero_expert_num": 4,
        "zero_expert_type": "identity",
        "routed_scaling_factor": 6.0,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000000.0,
    },
    # The second and the fourth layer are MLA. rms_norm_eps is what transformers takes inside MLA as well.
    "bailing_hybrid": {
        "architectures": ["BailingMoeV3ForCausalLM"],
        "model_type": "bailing_hybrid",
        **_COMMON,
        **_MLA,
        "q_lora_rank": None,
        "pad_token_id": EOS,
        "num_hidden_layers": 4,
        "layer_group_size": 2,
        "head_dim": 64,
        "short_conv_kernel_size": 4,
        "kda_lower_bound": -5.0,
        "kda_safe_gate": True,
        "no_kda_lora": True,
        "first_k_dense_replace": 1,
        "intermediate_size": 320,
        "moe_intermediate_size": 64,
        "moe_shared_expert_intermediate_size": 64,
        "num_experts": 8,
        "num_shared_experts": 1,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "num_nextn_predict_layers": 1,
        "max_position_embeddings": 262144,
        "rms_norm_eps": 1e-6,
        "rope_interleave": True,
        "rope_theta": 6000000,
    },
    "deepseek_v2_lite": _DEEPSEEK_V2_LITE,
    "deepseek_v2": {
        **_DEEPSEEK_V2_LITE,
        "q_lora_rank": 64,
        "n_group": 4,
        "topk_group": 2,
        "topk_method": "group_limited_greedy",
        "routed_scaling_factor": 16.0,
    },
}

FAMILIES |= {
    # An indexer in each layer, with interleaved rope. The MTP layer has no copy of embedding and head.
    "glm_moe_dsa": {
        **{k: v for k, v in FAMILIES["deepseek_v32"].items() if k not in ("rope_theta", "rope_scaling")},
        "architectures": ["GlmMoeDsaForCausalLM"],
        "model_type": "glm_moe_dsa",
        "q_lora_rank": 64,
        "v_head_dim": 128,
        "n_group": 1,
        "topk_group": 1,
        "rms_norm_eps": 1e-5,
        "indexer_rope_interleave": True,
        "max_position_embeddings": 202752,
        "rope_parameters": {"rope_theta": 1000000, "rope_type": "default"},
    },
    # No experts; kv_b_proj stays whole.
    "youtu_llm": {
        "architectures": ["YoutuForCausalLM"],
        "model_type": "youtu_llm",
        **_COMMON,
        **_MLA,
        "num_hidden_layers": 3,
        "intermediate_size": 320,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1600000,
        "rope_scaling": None,
        "rope_interleave": True,
        "tie_word_embeddings": True,
    },
    # As in MiniCPM3-4B: no rope_theta, no v_head_dim and no word of the embedding being tied, which it is.
    "minicpm3": {
        "architectures": ["MiniCPM3ForCausalLM"],
        "model_type": "minicpm3",
        **{k: v for k, v in _COMMON.items() if k != "tie_word_embeddings"},
        **{k: v for k, v in _MLA.items() if k != "v_head_dim"},
        "num_hidden_layers": 3,
        "intermediate_size": 320,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-5,
        "scale_emb": 3,
        "scale_depth": 1.4,
        "dim_model_base": 64,
        "rope_scaling": {
            "type": "longrope",
            "long_factor": [1.0 + n / 16 for n in range(16)],
            "short_factor": [1.0 + n / 16 for n in range(16)],
            "original_max_position_embeddings": 32768,
        },
    },
    # Fused experts, a softmax router; attention scaled after 8 positions, so that the prompt sees it.
    "mistral4": {
        "architectures": ["Mistral4ForCausalLM"],
        "model_type": "mistral4",
        **_COMMON,
        **_MLA,
        "num_hidden_layers": 3,
        "first_k_dense_replace": 1,
        "intermediate_size": 320,
        "moe_intermediate_size": 64,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 3,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
        "max_position_embeddings": 1048576,
        "rms_norm_eps": 1e-6,
        "rope_interleave": True,
        "rope_parameters": {
            **_YARN,
            "rope_theta": 10000.0,
            "factor": 128.0,
            "original_max_position_embeddings": 8,
            "llama_4_scaling_beta": 0.1,
        },
    },
}
# The same beside a vision tower.
FAMILIES["mistral3"] = {
    "architectures": ["Mistral3ForConditionalGeneration"],
    "model_type": "mistral3",
    "image_token_index": 10,
    "spatial_merge_size": 2,
    "multimodal_projector_bias": False,
    "projector_hidden_act": "gelu",
    "vision_feature_layer": -1,
    "tie_word_embeddings": False,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.46.3",
    "text_config": {
        k: v
        for k, v in FAMILIES["mistral4"].items()
        if k not in ("architectures", "torch_dtype", "transformers_version")
    },
    "vision_config": {
        "model_type": "pixtral",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "head_dim": 16,
        "num_channels": 3,
        "patch_size": 14,
        "image_size": 56,
        "hidden_act": "gelu",
        "rope_theta": 10000.0,
    },
}

# Random weights put some token close to the edge between two experts, where rounding the weights to
# bfloat16 would choose another expert and change the logits by tenths. These salts of the random numbers
# were searched for: with them and seed 0 no choice changes, in any storage (what is left is about 0.01).
# They have to be searched for again when a config or `_draw` changes; test_reference.py notices. Without an
# entry it is 0.
_SALTS = {
    "deepseek_v3": 82,
    "kimi_k2": 151,
    "deepseek_v32": 71,
    "glm4_moe_lite": 384,
    "kimi_linear": 28,
    "longcat_flash": 324,
    "bailing_hybrid": 16,
    "deepseek_v2_lite": 359,
    "deepseek_v2": 330,
    "glm_moe_dsa": 31,
    "mistral4": 61,
    "mistral3": 13,
}

FP8_FAMILIES = ("deepseek_v3", "kimi_k2", "deepseek_v32", "glm_moe_dsa")

STORAGES: tuple[tuple[str, Storage], ...] = tuple(
    (family, storage)
    for family in FAMILIES
    for storage in ("f32", "bf16", "fp8")
    if storage != "fp8" or family in FP8_FAMILIES
)
"""Every (family id, storage) that `make_checkpoint` writes."""

KEPT: dict[str, tuple[str, ...]] = {
    "deepseek_v3": ("e_score_correction_bias",),
    "deepseek_v32": ("e_score_correction_bias",),
    "glm4_moe_lite": ("e_score_correction_bias",),
    "kimi_k2": ("e_score_correction_bias",),
    "kimi_linear": ("e_score_correction_bias", "A_log", "dt_bias"),
    "longcat_flash": ("e_score_correction_bias",),
    "glm_moe_dsa": ("e_score_correction_bias",),
}
"""Last parts of the names that the cast_predicate of mlx-lm's class leaves as stored; no entry: none."""

# What the hub stores in F32 in a checkpoint that is otherwise BF16; without an entry, nothing.
_STORED_F32: dict[str, re.Pattern[str]] = {
    "bailing_hybrid": re.compile(r"\.(expert_bias|A_log|dt_bias)$"),
    "deepseek_v3": re.compile(r"\.e_score_correction_bias$"),
    "kimi_k2": re.compile(r"\.(e_score_correction_bias|inv_freq)$"),
    "deepseek_v32": re.compile(r"\.e_score_correction_bias$|norm\.(weight|bias)$"),
    "glm4_moe_lite": re.compile(r"\.e_score_correction_bias$"),
    "kimi_linear": re.compile(r"\.(A_log|dt_bias)$"),
    "longcat_flash": re.compile(r"\.router\.(classifier\.weight|e_score_correction_bias)$"),
    "glm_moe_dsa": re.compile(r"\.e_score_correction_bias$"),
}

# What the hub stores in F8_E4M3 with block scales. Not eh_proj, the router, weights_proj, embeddings, head.
_STORED_FP8 = re.compile(
    r"\.(q_a_proj|q_b_proj|kv_a_proj_with_mqa|kv_b_proj|o_proj|gate_proj|up_proj|down_proj|wq_b|wk)\.weight$"
)

_CLASSES = {
    "bailing_hybrid": ("bailing_hybrid", "BailingHybrid"),
    "deepseek_v2": ("deepseek_v2", "DeepseekV2"),
    "deepseek_v3": ("deepseek_v3", "DeepseekV3"),
    "deepseek_v32": ("deepseek_v32", "DeepseekV32"),
    "glm4_moe_lite": ("glm4_moe_lite", "Glm4MoeLite"),
    "kimi_k2": ("deepseek_v3", "DeepseekV3"),
    "kimi_linear": ("kimi_linear", "KimiLinear"),
    "longcat_flash": ("longcat_flash", "LongcatFlash"),
    "glm_moe_dsa": ("glm_moe_dsa", "GlmMoeDsa"),
    "youtu_llm": ("youtu", "Youtu"),
    "minicpm3": ("minicpm3", "MiniCPM3"),
    "mistral4": ("mistral4", "Mistral4"),
    "mistral3": ("mistral3", "Mistral3"),
}

# The families whose files hold the experts of a layer as transformers does, as two tensors.
_FUSED = ("mistral4", "mistral3")

# Where the modules of a mistral3 model stand in the files. Source: transformers' conversion_mapping.py.
_WRAPPED = {
    "lm_head.": "language_model.lm_head.",
    "model.language_model.": "language_model.model.",
    "model.vision_tower.": "vision_tower.",
    "model.multi_modal_projector.": "multi_modal_projector.",
}


@dataclass(frozen=True)
class Logits:
    """Logits, float32, of the prompt and of the tokens that follow it, one position a row.

    prefill is [24, vocab], computed in one call; decode is [6, vocab], one cached call per row.
    """

    prefill: np.ndarray
    decode: np.ndarray


def model_type(config: Mapping[str, Any]) -> str:
    """The model_type of a hub config; LongCat's, which has none, is known by its architecture."""
    if "model_type" in config:
        return str(config["model_type"])
    if config["architectures"] == ["LongcatFlashForCausalLM"]:
        return "longcat_flash"
    raise ValueError(f"no model_type in {dict(config)}")


def _numbers(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a hub config that describes the language model."""
    numbers: Mapping[str, Any] = config.get("text_config", config)
    return numbers


def _tied(config: Mapping[str, Any]) -> bool:
    """Whether the files hold no output head; MiniCPM3's config leaves it to its class to say so."""
    return bool(config.get("tie_word_embeddings", model_type(config) == "minicpm3"))


# --------------------------------------------------------------------------------------------------
# The transformers side: class, config, and the names in both directions


def _transformers_config(config: Mapping[str, Any]) -> Any:
    """The transformers config that means the same as a hub config."""
    kind = model_type(config)
    package, prefix = _CLASSES[kind]
    drop = ("model_type", "architectures", "torch_dtype", "transformers_version", "quantization_config")
    keys = {key: value for key, value in config.items() if key not in drop}
    if "num_nextn_predict_layers" in keys:
        keys["num_nextn_predict_layers"] = 0
    if kind == "bailing_hybrid":
        # transformers computes the size of the shared experts from that of the others.
        assert keys.pop("moe_shared_expert_intermediate_size") == keys["moe_intermediate_size"]
    if kind == "longcat_flash":
        # The rotary embedding of transformers takes its width from here, and the hub's config has no such
        # key: the default happens to be the real model's qk_rope_head_dim.
        keys["head_dim"] = keys["qk_rope_head_dim"]
    module = importlib.import_module(f"transformers.models.{package}.configuration_{package}")
    return getattr(module, f"{prefix}Config")(
        **keys, attn_implementation="eager", experts_implementation="eager"
    )


def _transformers_model(config: Mapping[str, Any]) -> Any:
    """A float32 model of the transformers class for a hub config, weights as its constructor leaves them."""
    package, _ = _CLASSES[model_type(config)]
    module = importlib.import_module(f"transformers.models.{package}.modeling_{package}")
    return getattr(module, class_name(config))(_transformers_config(config)).float().eval()


def class_name(config: Mapping[str, Any]) -> str:
    """The transformers class that computes the logits of a hub config."""
    prefix = _CLASSES[model_type(config)][1]
    return prefix + ("ForConditionalGeneration" if "text_config" in config else "ForCausalLM")


FULL_ATTENTION = (1, 3)
"""The layers of MLA in the config of bailing_hybrid."""

_EXPERTS = re.compile(r"^(?P<block>.*\.mlp)\.experts\.(?P<part>gate_up_proj|down_proj)$")
_KDA_CONV = re.compile(r"^(?P<attn>.*\.self_attn)\.conv1d\.weight$")


def _expert_names(kind: str, block: str, expert: int) -> tuple[str, str, str]:
    """The hub's names of the gate, up and down projections of one expert."""
    if kind == "kimi_linear":
        block, parts = block.removesuffix(".mlp") + ".block_sparse_moe", ("w1", "w3", "w2")
    else:
        parts = ("gate_proj", "up_proj", "down_proj")
    gate, up, down = (f"{block}.experts.{expert}.{part}.weight" for part in parts)
    return gate, up, down


def _plain_name(kind: str, name: str, moe_blocks: set[str]) -> str:
    """The hub's name of a tensor that is one tensor in transformers too."""
    if kind == "kimi_linear":
        name = name.replace(".self_attn.forget_gate.", ".self_attn.")
        block, dot, rest = name.partition(".mlp.")
        if dot and f"{block}.mlp" in moe_blocks:
            name = f"{block}.block_sparse_moe.{rest}"
    if kind == "bailing_hybrid":
        name = name.replace("model.embed_tokens.", "model.word_embeddings.")
        name = name.replace(".gate.e_score_correction_bias", ".gate.expert_bias")
        name = name.replace(".self_attn.forget_gate.", ".attention.").replace(".self_attn.", ".attention.")
        # The last projection has one name in the layers of KDA and another in those of MLA.
        number = re.match(r"model\.layers\.(\d+)\.attention\.o_proj\.", name)
        if number and int(number[1]) in FULL_ATTENTION:
            name = name.replace(".o_proj.", ".dense.")
    if kind == "mistral3":
        ours = next(prefix for prefix in _WRAPPED if name.startswith(prefix))
        name = _WRAPPED[ours] + name.removeprefix(ours)
    return name


def _to_hub(state: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> Tensors:
    """The tensors of a transformers state dict under the hub's names, in the hub's shapes."""
    kind = model_type(config)
    moe_blocks = {match["block"] for name in state if (match := _EXPERTS.match(name))}
    hub: Tensors = {}
    for name, tensor in state.items():
        if name == "lm_head.weight" and _tied(config):
            continue
        if kind not in _FUSED and (match := _EXPERTS.match(name)):
            # LongCat's parameter has rows for the zero experts too; they are not stored.
            for expert in range(config.get("n_routed_experts") or config["num_experts"]):
                gate, up, down = _expert_names(kind, match["block"], expert)
                if match["part"] == "down_proj":
                    hub[down] = tensor[expert]  # [hidden, inner]
                else:
                    hub[gate], hub[up] = tensor[expert].chunk(2)  # [2 inner, hidden]
        elif match := _KDA_CONV.match(name):
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                name = _plain_name(kind, f"{match['attn']}.{letter}_conv1d.weight", moe_blocks)
                hub[name] = part  # [channels, 1, kernel]
        else:
            hub[_plain_name(kind, name, moe_blocks)] = tensor
    return hub


def _from_hub(hub: Mapping[str, torch.Tensor], config: Mapping[str, Any], like: Tensors) -> Tensors:
    """The transformers state dict for hub tensors; `like` is a state dict that has its names and shapes.

    Every hub tensor must be used, apart from the MTP layers and the rotary buffers.
    """
    kind = model_type(config)
    moe_blocks = {match["block"] for name in like if (match := _EXPERTS.match(name))}
    left = {name: tensor for name, tensor in hub.items() if not _is_extra(name, config)}
    state: Tensors = {}
    for name, old in like.items():
        if name == "lm_head.weight" and _tied(config):
            state[name] = hub["model.embed_tokens.weight"]
        elif kind not in _FUSED and (match := _EXPERTS.match(name)):
            new = torch.zeros_like(old)
            for expert in range(config.get("n_routed_experts") or config["num_experts"]):
                gate, up, down = _expert_names(kind, match["block"], expert)
                if match["part"] == "down_proj":
                    new[expert] = left.pop(down)
                else:
                    new[expert] = torch.cat([left.pop(gate), left.pop(up)])
            state[name] = new
        elif match := _KDA_CONV.match(name):
            names = [_plain_name(kind, f"{match['attn']}.{x}_conv1d.weight", moe_blocks) for x in "qkv"]
            state[name] = torch.cat([left.pop(part) for part in names])
        else:
            state[name] = left.pop(_plain_name(kind, name, moe_blocks))
    if left:
        raise ValueError(f"not used by transformers: {sorted(left)}")
    return state


def _is_extra(name: str, config: Mapping[str, Any]) -> bool:
    """Whether the forward pass has no use for a hub tensor: an MTP layer or a rotary buffer."""
    numbers = _numbers(config)
    layers = numbers.get("num_hidden_layers", numbers.get("num_layers"))
    match = re.match(r"model\.layers\.(\d+)\.", name)
    in_mtp = name.startswith("model.mtp.") or (match is not None and int(match[1]) >= layers)
    return in_mtp or name.endswith(".rotary_emb.inv_freq")


# --------------------------------------------------------------------------------------------------
# Weights


def _draw(name: str, shape: torch.Size, config: Mapping[str, Any], seed: str) -> torch.Tensor:
    """Random float32 values for a hub tensor; they depend on its name and the seed, not on the order."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))

    def uniform(low: float, high: float) -> torch.Tensor:
        return low + (high - low) * torch.rand(shape, generator=generator)

    def normal(deviation: float) -> torch.Tensor:
        return deviation * torch.randn(shape, generator=generator)

    if name.endswith((".e_score_correction_bias", ".expert_bias")):
        # Softmax scores of 12 experts are near 1/12, sigmoid scores anywhere in 0..1.
        return uniform(0.01, 0.06) if model_type(config) == "longcat_flash" else uniform(0.05, 0.35)
    if name.endswith(".A_log"):
        return uniform(1.0, 4.0).log()
    if name.endswith(".dt_bias"):
        return uniform(-4.0, -1.0)
    if name.endswith("norm.bias"):
        return normal(0.3)
    if len(shape) == 1:
        return uniform(0.6, 1.4)  # the gain of a norm
    if "embed_tokens" in name or "word_embeddings" in name:
        return normal(1.0)
    if name.endswith("conv1d.weight"):
        return normal(0.5)  # a convolution of four taps
    values = normal(shape[-1] ** -0.5)
    if name.endswith((".gate.weight", ".classifier.weight")):
        values *= 2.0  # so that the scores of the experts lie well apart
    elif name.endswith(".q_a_proj.weight"):
        values *= LATENT_GAIN
    elif name.endswith(".kv_a_proj_with_mqa.weight"):
        values[: _numbers(config)["kv_lora_rank"]] *= LATENT_GAIN  # the rope rows are not normed
    return values


def _mtp_shapes(hub: Mapping[str, torch.Size], config: Mapping[str, Any]) -> dict[str, torch.Size]:
    """Names and shapes of the multi-token prediction layer that the hub ships beside the model."""
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    vector, square = torch.Size([hidden]), torch.Size([hidden, 2 * hidden])
    table = torch.Size([vocab, hidden])
    if model_type(config) == "longcat_flash":
        layer = "model.mtp.layers.0"
        first = "model.layers.0.self_attn.0."
        attention = {f"{layer}.self_attn.{n.removeprefix(first)}": s for n, s in hub.items() if first in n}
        mlp = "model.layers.0.mlps.0."
        return {
            "model.mtp.embed_tokens.weight": table,
            f"{layer}.eh_proj.weight": square,
            f"{layer}.enorm.m.weight": vector,
            f"{layer}.hnorm.m.weight": vector,
            f"{layer}.input_layernorm.weight": vector,
            f"{layer}.post_attention_layernorm.weight": vector,
            **attention,
            **{f"{layer}.transformer_layer.mlp.{n.removeprefix(mlp)}": s for n, s in hub.items() if mlp in n},
            "model.mtp.norm.weight": vector,
        }
    layers = config["num_hidden_layers"]
    last, layer = f"model.layers.{layers - 1}.", f"model.layers.{layers}."
    block = {layer + name.removeprefix(last): shape for name, shape in hub.items() if name.startswith(last)}
    if model_type(config) == "bailing_hybrid":
        norms = ("enorm", "hnorm", "final_layernorm")
        return {**block, f"{layer}eh_proj.weight": square} | {f"{layer}{n}.weight": vector for n in norms}
    copies = {f"{layer}embed_tokens.weight": table, f"{layer}shared_head.head.weight": table}
    return {
        **block,
        f"{layer}eh_proj.weight": square,
        f"{layer}enorm.weight": vector,
        f"{layer}hnorm.weight": vector,
        f"{layer}shared_head.norm.weight": vector,
        **(copies if model_type(config) != "glm_moe_dsa" else {}),
    }


def _random_tensors(config: Mapping[str, Any], seed: str, mtp: bool) -> Tensors:
    """All tensors of a hub checkpoint in float32."""
    like = _to_hub(_transformers_model(config).state_dict(), config)
    shapes = {name: tensor.shape for name, tensor in like.items()}
    if mtp and (config.get("num_nextn_predict_layers") or model_type(config) == "longcat_flash"):
        shapes |= _mtp_shapes(shapes, config)
    tensors = {name: _draw(name, shape, config, seed) for name, shape in shapes.items()}
    if model_type(config) == "kimi_k2":
        rope = config["qk_rope_head_dim"]
        frequencies = config["rope_theta"] ** -(torch.arange(0, rope, 2, dtype=torch.float32) / rope)
        for layer in range(config["num_hidden_layers"]):
            tensors[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = frequencies.clone()
    return tensors


# --------------------------------------------------------------------------------------------------
# Storage


def _spread(scale: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """One block scale per element of a matrix; the last blocks may be cut."""
    rows = scale.repeat_interleave(FP8_BLOCK, 0).repeat_interleave(FP8_BLOCK, 1)
    return rows[: shape[0], : shape[1]]


def _encode_fp8(weight: torch.Tensor, powers_of_two: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix as F8_E4M3 [o, i] and its F32 scales [ceil(o / 128), ceil(i / 128)]."""
    o, i = weight.shape
    padded = torch.nn.functional.pad(weight, (0, -i % FP8_BLOCK, 0, -o % FP8_BLOCK))
    blocks = padded.unfold(0, FP8_BLOCK, FP8_BLOCK).unfold(1, FP8_BLOCK, FP8_BLOCK)
    scale = blocks.abs().amax((-1, -2)) / FP8_MAX
    if powers_of_two:
        scale = torch.exp2(scale.log2().ceil())
    return (weight / _spread(scale, weight.shape)).to(torch.float8_e4m3fn), scale


def _stored(tensors: Tensors, config: Mapping[str, Any], storage: Storage) -> Tensors:
    """The tensors as they are stored, scales included."""
    if storage == "f32":
        return tensors
    kind = model_type(config)
    stored: Tensors = {}
    for name, tensor in tensors.items():
        if storage == "fp8" and _STORED_FP8.search(name):
            weight, scale = _encode_fp8(tensor, powers_of_two=kind == "deepseek_v32")
            stored[name], stored[f"{name}_scale_inv"] = weight, scale
        elif _STORED_F32.get(kind, re.compile(r"(?!)")).search(name):
            stored[name] = tensor
        else:
            stored[name] = tensor.to(torch.bfloat16)
    return stored


def decoded(stored: Mapping[str, torch.Tensor]) -> Tensors:
    """The float32 numbers that stored tensors stand for; the scales are gone."""
    tensors: Tensors = {}
    for name, tensor in stored.items():
        if name.endswith("_scale_inv"):
            continue
        tensors[name] = tensor.to(torch.float32)
        if tensor.dtype == torch.float8_e4m3fn:
            tensors[name] *= _spread(stored[f"{name}_scale_inv"], tensor.shape)
    return tensors


def _layer_order(name: str) -> tuple[object, ...]:
    """Sorts names as the hub's shards hold them: embeddings, layers by number, final norm, head."""
    match = re.match(r"(?:language_model\.)?model\.layers\.(\d+)\.", name)
    place = 0 if "model.embed" in name else 1 if match else 2
    numbers = [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]
    return (place, int(match[1]) if match else 0, numbers)


def _tokenizer() -> tuple[Config, Config]:
    """tokenizer.json and tokenizer_config.json of a byte-level BPE that has no merges."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in plain]
    letters = {byte: chr(byte) for byte in plain} | {byte: chr(256 + n) for n, byte in enumerate(rest)}
    special = {BOS: "<s>", EOS: "</s>"}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    tokenizer: Config = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": token, "content": text, **flags} for token, text in special.items()],
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
            "ignore_merges": False,
            "vocab": {letter: byte for byte, letter in sorted(letters.items())}
            | {text: token for token, text in special.items()},
            "merges": [],
        },
    }
    settings: Config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": special[BOS],
        "eos_token": special[EOS],
        "clean_up_tokenization_spaces": False,
        "model_max_length": 131072,
    }
    return tokenizer, settings


def make_checkpoint(
    family_id: str,
    folder: Path | str,
    storage: Storage,
    seed: int = 0,
    shards: int = 2,
    *,
    mtp: bool = True,
) -> None:
    """Writes the checkpoint of a family of `FAMILIES` as the hub would have it.

    storage is "f32" (every tensor F32), "bf16" (BF16, but F32 where the real checkpoints have F32) or
    "fp8" (F8_E4M3 with F32 scales per 128x128 block where the real ones have it, the rest as "bf16"; only
    for `FP8_FAMILIES`; o_proj's scales lie in another shard than its weights if there are two). With one
    shard the file is model.safetensors and there is no index. The index's total_size is as wrong as the
    hub's: 2 bytes an element for the DeepSeek and Kimi K2 files, the number of elements for GLM. mtp says
    whether the layer for multi-token prediction is written, where the family has one; without it the
    config has num_nextn_predict_layers 0. The same arguments give the same bytes.
    """
    if storage == "fp8" and family_id not in FP8_FAMILIES:
        raise ValueError(f"{family_id} has no FP8 checkpoint")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = json.loads(json.dumps(FAMILIES[family_id]))
    kind = model_type(config)
    if not mtp and "num_nextn_predict_layers" in config:
        config["num_nextn_predict_layers"] = 0
    if storage == "fp8":
        config["quantization_config"] = {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "weight_block_size": [FP8_BLOCK, FP8_BLOCK],
        }
        if kind == "deepseek_v32":
            config["quantization_config"]["scale_fmt"] = "ue8m0"

    seeded = f"{_SALTS.get(family_id, 0)} {seed}"
    stored = _stored(_random_tensors(config, seeded, mtp), config, storage)
    names = sorted(stored, key=_layer_order)
    place = {name: index * shards // len(names) for index, name in enumerate(names)}
    for name in names:
        if name.endswith(".o_proj.weight_scale_inv"):
            place[name] = (place[name.removesuffix("_scale_inv")] + 1) % shards
    files = [f"model-{k + 1:05d}-of-{shards:05d}.safetensors" for k in range(shards)]
    if shards == 1:
        files = ["model.safetensors"]
    for k, file in enumerate(files):
        part = {name: stored[name].contiguous().clone() for name in names if place[name] == k}
        save_file(part, folder / file, metadata={"format": "pt"})

    elements = sum(tensor.numel() for tensor in stored.values())
    payload = sum(tensor.numel() * tensor.element_size() for tensor in stored.values())
    lies = {"deepseek_v3": 2 * elements, "kimi_k2": 2 * elements, "glm4_moe_lite": elements}
    texts: dict[str, Config] = {
        "config.json": config,
        "generation_config.json": {"_from_model_config": True, "bos_token_id": BOS, "eos_token_id": EOS},
    }
    texts["tokenizer.json"], texts["tokenizer_config.json"] = _tokenizer()
    if shards > 1:
        texts["model.safetensors.index.json"] = {
            "metadata": {"total_size": lies.get(kind, payload)},
            "weight_map": {name: files[place[name]] for name in names},
        }
    for file, value in texts.items():
        (folder / file).write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# --------------------------------------------------------------------------------------------------
# Logits


def _frozen(prefill: np.ndarray, decode: np.ndarray) -> Logits:
    for array in (prefill, decode):
        array.flags.writeable = False
    return Logits(prefill, decode)


def truth(folder: Path | str, cast: str | None = None) -> Logits:
    """The logits of a hub checkpoint: transformers, float32, eager attention, on the decoded weights.

    With cast ("bfloat16" or "float16") each decoded number is first rounded to that dtype, apart from
    those in `KEPT`; the computation is in float32 anyway. It shows what the rounding of the weights
    alone does. All model*.safetensors files of the folder are read, in any order.
    """
    folder = Path(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    stored: Tensors = {}
    for file in sorted(folder.glob("model*.safetensors")):
        stored |= load_file(file)
    assert stored, f"{folder} holds no weights"
    return hub_logits(decoded(stored), config, cast)


def hub_logits(hub: Tensors, config: Mapping[str, Any], cast: str | None) -> Logits:
    """The logits of decoded tensors under the hub's names, as `truth` computes them."""
    if cast is not None:
        dtype, kept = getattr(torch, cast), KEPT.get(model_type(config), ())
        hub = {
            name: tensor if name.rpartition(".")[2] in kept else tensor.to(dtype).to(torch.float32)
            for name, tensor in hub.items()
        }
    model = _transformers_model(config)
    model.load_state_dict(_from_hub(hub, config, model.state_dict()), strict=True)
    return torch_logits(model)


def torch_logits(model: Any) -> Logits:
    """The logits of a transformers model for `TOKENS`: one prefill, then cached decode steps."""
    tokens = torch.tensor([TOKENS])
    with torch.no_grad():
        out = model(tokens[:, :PREFILL], use_cache=True)
        prefill, rows = out.logits[0], []
        for i in range(PREFILL, PREFILL + DECODE):
            out = model(tokens[:, i : i + 1], past_key_values=out.past_key_values, use_cache=True)
            rows.append(out.logits[0, -1])
    return _frozen(prefill.numpy().copy(), torch.stack(rows).numpy().copy())


def mlx_logits(
    folder: Path | str, float32: bool = True, overrides: Mapping[str, Any] | None = None
) -> Logits:
    """The logits that mlx-lm computes from a folder which it must be able to load strictly.

    float32 widens all floating parameters after loading, so that only the rounding of the stored numbers
    is left. overrides are put over config.json (LongCat's hub config needs a model_type).
    """
    import mlx.core as mx
    from mlx.utils import tree_map
    from mlx_lm.models.cache import make_prompt_cache
    from mlx_lm.utils import load_model

    model, _ = load_model(Path(folder), strict=True, model_config=dict(overrides or {}))
    if float32:

        def widen(array: mx.array) -> mx.array:
            return array.astype(mx.float32) if mx.issubdtype(array.dtype, mx.floating) else array

        model.update(tree_map(widen, model.parameters()))
    cache = make_prompt_cache(model)
    tokens = mx.array([TOKENS])
    calls = [(0, PREFILL), *((i, i + 1) for i in range(PREFILL, PREFILL + DECODE))]
    outputs = []
    with second_scales_on_a_cpu():
        for start, stop in calls:
            logits = model(tokens[:, start:stop], cache=cache)[0].astype(mx.float32)
            mx.eval(logits)
            outputs.append(np.array(logits))
    return _frozen(outputs[0], np.concatenate(outputs[1:]))


def second_scales_on_a_cpu() -> Any:
    """A context in which MLX multiplies with the global scale of experts on a CPU too."""
    import mlx.core as mx

    return mock.patch.object(mx, "gather_qmm", functools.partial(_gather_qmm, mx.gather_qmm))


def _gather_qmm(kernel: Any, x: Any, w: Any, scales: Any, *rest: Any, **how: Any) -> Any:
    """MLX's gather_qmm, in two steps where it has no kernel: on a CPU there is none with a global scale.

    MLX itself decodes each expert, so what a global scale means is still MLX's word.
    """
    import mlx.core as mx

    on_cpu = mx.default_device().type == mx.DeviceType.cpu
    if not on_cpu or how.get("global_scale") is None:
        return kernel(x, w, scales, *rest, **how)
    quantization = {key: how[key] for key in ("group_size", "bits", "mode")}
    experts = [
        mx.dequantize(w[e], scales[e], global_scale=scale, dtype=x.dtype, **quantization)
        for e, scale in enumerate(how["global_scale"])
    ]
    indices = {key: how[key] for key in ("rhs_indices", "sorted_indices")}
    return mx.gather_mm(x, mx.stack(experts).swapaxes(-1, -2), **indices)


def relative_error(a: Logits, b: Logits) -> tuple[float, float]:
    """max|a - b| / max|b| of the prefill and of the decode steps; infinite where a is not finite."""

    def error(x: np.ndarray, y: np.ndarray) -> float:
        if x.shape != y.shape:
            raise ValueError(f"logits of shape {x.shape} and {y.shape}")
        value = float(np.abs(x.astype(np.float64) - y).max() / np.abs(y).max())
        return value if math.isfinite(value) else math.inf

    return error(a.prefill, b.prefill), error(a.decode, b.decode)


# --------------------------------------------------------------------------------------------------
# Once per session


@functools.cache
def _session_folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="mla-tools-reference-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@functools.cache
def checkpoint(family_id: str, storage: Storage, *, mtp: bool = True) -> Path:
    """The folder of `make_checkpoint`, written once per session. Do not change what is in it."""
    folder = _session_folder() / f"{family_id}-{storage}{'' if mtp else '-no-mtp'}"
    make_checkpoint(family_id, folder, storage, mtp=mtp)
    return folder


@functools.cache
def reference_truth(family_id: str, storage: Storage, cast: str | None = None) -> Logits:
    """`truth` of `checkpoint`, computed once per session. The MTP layer has no part in it."""
    return truth(checkpoint(family_id, storage), cast)
