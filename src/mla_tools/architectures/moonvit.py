"""The image encoder of the Kimi models, which mlx-lm's classes leave out."""

from __future__ import annotations

from mla_tools.architectures.geometry import OPEN
from mla_tools.rules import Drop

__all__ = ["drops"]

_TOWER = ("patch_embed.pos_emb.weight", "patch_embed.proj.weight", "patch_embed.proj.bias")
_BLOCK = ("norm0", "norm1", "wqkv", "wo", "mlp.fc0", "mlp.fc1")
_PROJECTOR = ("pre_norm", "proj.{i}")


def drops() -> list[Drop]:
    """Return the drops of the image encoder and the projector after it, whatever their sizes.

    Source of the names: the header listing of Kimi K2.5.
    """
    reason = "part of the image encoder, and mlx-lm's class is the language model alone"
    modules = [f"encoder.blocks.{{l}}.{name}" for name in _BLOCK] + ["encoder.final_layernorm"]
    tower = [*_TOWER, *(f"{name}.{part}" for name in modules for part in ("weight", "bias"))]
    names = [f"vision_tower.{name}" for name in tower]
    names += [f"mm_projector.{name}.{part}" for name in _PROJECTOR for part in ("weight", "bias")]
    anywhere = range(OPEN)
    return [
        Drop(name, reason, {index: anywhere for index in "li" if f"{{{index}}}" in name}, usual=False)
        for name in names
    ]
