"""DeepSeek V3, R1, V3.1, and Kimi K2, which has the same modules."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from mla_tools.architectures import blocks
from mla_tools.architectures.geometry import Geometry
from mla_tools.rules import Domain, Drop, Rule

__all__ = ["FAMILY", "SAMPLE", "decoder"]


def decoder(
    g: Geometry,
    attention: Callable[[Geometry, blocks.Where], list[Rule]] = blocks.mla_attention,
    *,
    correction: bool = True,
    mtp: bool = True,
    rotary: bool = False,
) -> tuple[list[Rule], list[Drop]]:
    """Return the table of a DeepSeek-style decoder; the later families differ in the attention alone."""
    hidden, inner = g.dim("hidden_size"), g.dim("moe_intermediate_size")
    dense, sparse = g.moe_layers()
    mlp = "model.layers.{l}.mlp"

    def common(layers: Domain) -> list[Rule]:
        where = {"l": layers}
        return blocks.decoder_norms(g, where) + attention(g, where)

    def moe(layers: Domain) -> list[Rule]:
        where = {"l": layers}
        count, shared = g.count("n_routed_experts"), g.optional("n_shared_experts")
        rules = blocks.router(f"{mlp}.gate", count, hidden, where, correction=correction)
        rules += blocks.experts(f"{mlp}.experts", f"{mlp}.switch_mlp", count, hidden, inner, where)
        if shared:
            rules += blocks.mlp(f"{mlp}.shared_experts", hidden, inner * shared, where)
        return rules

    rules = blocks.embeddings(g) + common(g.layers())
    rules += blocks.mlp(mlp, hidden, g.dim("intermediate_size"), {"l": dense})
    drops = blocks.rotary_buffers(g, usual=rotary)
    layer = common(g.layers())
    if g.optional("n_routed_experts"):
        rules += moe(sparse)
        layer += moe(sparse)
    if mtp:
        drops += blocks.mtp_layers(g, layer)
    return rules, drops


SAMPLE = {
    "model_type": "deepseek_v3",
    "architectures": ["DeepseekV3ForCausalLM"],
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 4,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "q_lora_rank": 128,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
    "num_nextn_predict_layers": 1,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_scaling": {
        "type": "yarn",
        "factor": 4,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 1024,
    },
    "attention_bias": False,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}

FAMILY = blocks.Family(
    "deepseek_v3", "deepseek_v3", decoder, SAMPLE, architectures=("DeepseekV3ForCausalLM",)
)
KIMI_K2 = blocks.Family(
    "kimi_k2",
    "kimi_k2",
    partial(decoder, rotary=True),
    # Without yarn: transformers does not know this model_type, and its tokenizer loader ends in an
    # AttributeError on such a config with yarn unless it may run the checkpoint's own code.
    {
        **SAMPLE,
        "model_type": "kimi_k2",
        "n_group": 1,
        "num_nextn_predict_layers": 0,
        "rope_scaling": None,
    },
)
