"""The oracle of the DeepSeek V4 tests: random weights under the model's names, and transformers' logits.

`CONFIG` is a tiny model: compress ratios 0, 0, 4, 128, 4, 128, the first three layers routed by token
id. `Torch` holds transformers' class (float32, eager attention, CPU) with the same numbers. The names
are mapped here by hand; nothing here imports mla_tools.
"""

from __future__ import annotations

import copy
import functools
import zlib
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache
from transformers.models.deepseek_v4.configuration_deepseek_v4 import DeepseekV4Config
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4ForCausalLM

__all__ = ["CONFIG", "CONFIGS", "Torch", "reference", "relative", "renamed", "tokens"]

Config = dict[str, Any]
Arrays = dict[str, np.ndarray[Any, Any]]

# The keys of the hub's config.json. The list of ratios has one more, for the MTP layer.
CONFIG: Config = {
    "model_type": "deepseek_v4",
    "architectures": ["DeepseekV4ForCausalLM"],
    "vocab_size": 320,
    "hidden_size": 64,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "qk_rope_head_dim": 8,
    "q_lora_rank": 32,
    "o_lora_rank": 16,
    "o_groups": 2,
    "moe_intermediate_size": 32,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "routed_scaling_factor": 1.5,
    "scoring_func": "sqrtsoftplus",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "swiglu_limit": 0.7,
    "num_hash_layers": 3,
    "sliding_window": 16,
    "hc_mult": 4,
    "hc_sinkhorn_iters": 20,
    "hc_eps": 1e-6,
    # With few heads many scores would be exactly 0, and which of equal ones are chosen is nobody's truth.
    "index_n_heads": 16,
    "index_head_dim": 16,
    "index_topk": 8,
    "rope_theta": 10000,
    "compress_rope_theta": 160000,
    "rope_scaling": None,
    "max_position_embeddings": 4096,
    "num_nextn_predict_layers": 1,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "compress_ratios": [0, 0, 4, 128, 4, 128, 0],
}
YARN = {
    "type": "yarn",
    "factor": 16,
    "beta_fast": 32,
    "beta_slow": 1,
    "original_max_position_embeddings": 256,
}
CONFIGS: dict[str, Config] = {"plain": CONFIG, "yarn": {**CONFIG, "rope_scaling": YARN}}

# Parts of transformers' names -> of ours, in the order in which they are replaced.
NAMES = [
    ("self_attn.compressor.indexer.q_b_proj", "attn.indexer.wq_b"),
    ("self_attn.compressor.indexer.scorer.weights_proj", "attn.indexer.weights_proj"),
    ("self_attn.compressor.indexer.", "attn.indexer.compressor."),
    ("self_attn.", "attn."),
    ("compressor.kv_norm", "compressor.norm"),
    ("compressor.gate_proj", "compressor.wgate"),
    ("position_bias", "ape"),
    ("q_a_proj", "wq_a"),
    ("q_a_norm", "q_norm"),
    ("q_b_proj", "wq_b"),
    ("kv_proj", "wkv"),
    ("o_a_proj", "wo_a"),
    ("o_b_proj", "wo_b"),
    ("sinks", "attn_sink"),
    ("input_layernorm", "attn_norm"),
    ("post_attention_layernorm", "ffn_norm"),
    ("hc_head.hc_", "hc_head."),
    (".mlp.experts.", ".ffn.switch_mlp."),
    (".mlp.", ".ffn."),
]


def tokens(count: int, seed: int = 0) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(3, 251, count)]


def renamed(name: str) -> str:
    for theirs, ours in NAMES:
        name = name.replace(theirs, ours)
    return name


def to_ours(state: dict[str, torch.Tensor], config: Config) -> Arrays:
    """Return transformers' state under our names, in our shapes."""
    ours: Arrays = {}
    for name, tensor in state.items():
        array = tensor.numpy()
        if name.endswith("experts.gate_up_proj"):
            gate, up = np.split(array, 2, axis=1)
            base = renamed(name).removesuffix("gate_up_proj")
            ours[f"{base}gate_proj.weight"], ours[f"{base}up_proj.weight"] = gate, up
        elif name.endswith("experts.down_proj"):
            ours[f"{renamed(name)}.weight"] = array
        elif name.endswith("o_a_proj.weight"):
            ours[renamed(name)] = array.reshape(config["o_groups"], config["o_lora_rank"], -1)
        elif name.endswith("tid2eid"):
            ours[renamed(name)] = array.astype(np.int32)
        else:
            ours[renamed(name)] = array
    return ours


def _draw(name: str, shape: torch.Size, config: Config) -> torch.Tensor:
    """Return the numbers of a tensor: of the sizes at which every part of the model matters."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    if name.endswith("tid2eid"):
        rows = [rng.permutation(config["n_routed_experts"])[: shape[1]] for _ in range(shape[0])]
        return torch.tensor(np.stack(rows))
    values = rng.standard_normal(tuple(shape))
    if name.endswith(("norm.weight", "layernorm.weight", "scale")):
        values = 1 + 0.2 * values
    elif name.endswith(("e_score_correction_bias", "base")):
        values = 0.3 * values
    elif not name.endswith(("sinks", "position_bias", "embed_tokens.weight")):
        values = 1.2 * values / np.sqrt(shape[-1])
    return torch.tensor(values, dtype=torch.float32)


def _given(name: str, drawn: torch.Tensor, given: Arrays) -> torch.Tensor:
    """Return what is given for a tensor of transformers, or what was drawn."""
    ours = [renamed(name), f"{renamed(name)}.weight"]
    if name.endswith("experts.gate_up_proj"):
        base = renamed(name).removesuffix("gate_up_proj")
        halves = [given.get(f"{base}{half}_proj.weight") for half in ("gate", "up")]
        return drawn if halves[0] is None else torch.tensor(np.concatenate(halves, axis=1))
    found = [given[key] for key in ours if key in given]
    return torch.tensor(found[0]).reshape(drawn.shape) if found else drawn


class Torch:
    """Transformers' model of a config with drawn weights, or others that are given under our names."""

    def __init__(self, config: Config, given: Arrays | None = None) -> None:
        keys = {key: value for key, value in copy.deepcopy(config).items() if value is not None}
        self.config = config
        settings = DeepseekV4Config(**keys, attn_implementation="eager")
        self.model = DeepseekV4ForCausalLM(settings).eval()
        state = {name: _draw(name, tensor.shape, config) for name, tensor in self.model.state_dict().items()}
        if given is not None:
            state = {name: _given(name, tensor, given) for name, tensor in state.items()}
        self.model.load_state_dict(state, strict=True)
        self.weights = to_ours(state, config)

    def logits(self, ids: list[int]) -> np.ndarray[Any, Any]:
        """Return the logits [L, V] of one forward pass."""
        with torch.no_grad():
            return self.model(torch.tensor([ids]), use_cache=False).logits[0].numpy()

    def cached(self, ids: list[int], sizes: list[int]) -> np.ndarray[Any, Any]:
        """Return the same logits, from calls of these sizes with a cache."""
        cache, parts, start = DynamicCache(config=self.model.config), [], 0
        with torch.no_grad():
            for size in sizes:
                chunk = torch.tensor([ids[start : start + size]])
                parts.append(self.model(chunk, past_key_values=cache, use_cache=True).logits[0].numpy())
                start += size
        return np.concatenate(parts)


@functools.cache
def reference(name: str) -> Torch:
    """Return the model of CONFIGS[name], made once."""
    return Torch(CONFIGS[name])


def relative(ours: np.ndarray[Any, Any], truth: np.ndarray[Any, Any]) -> float:
    """Return the largest difference over the largest number."""
    return float(np.abs(ours - truth).max() / np.abs(truth).max())
