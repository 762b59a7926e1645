"""What an architecture is: its table, and what its config must say for mlx-lm's model class."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from mla_tools.architectures.geometry import Geometry
from mla_tools.architectures.rope import Config, flat_rope, lacking_in_rope, unlike_in_rope
from mla_tools.architectures.spelling import Spelled, Speller, mlp_layers
from mla_tools.errors import Problem
from mla_tools.models.bundle import bundled
from mla_tools.rules import Drop, Form, Rule

__all__ = ["NOT_FOR_MLX_VLM", "Family", "refusal", "vision_drops", "wrapped"]

# What can load an output with vision tensors. Source: loading both with mlx-vlm 0.7.10.
FOR_MLX_VLM = "mlx-vlm loads the whole model; mlx_lm.load ignores them and loads the language model"
NOT_FOR_MLX_VLM = (
    "mlx_lm.load ignores them and loads the language model; mlx-vlm 0.7.10 cannot load this output, because"
    " its class needs kv_b_proj in one piece"
)

# Makes the rules and drops of a family for one config.
Builder = Callable[[Geometry], tuple[list[Rule], list[Drop]]]


@dataclass(frozen=True)
class Family:
    """One architecture: its table, and what its config must say.

    `model_type` names mlx-lm's model class. `defaults` are keys that this class needs and that checkpoints
    leave out, with the value that the reference implementation uses then. `architectures` recognise a
    config without a model_type. `float32` are the endings of the tensors that the hub's checkpoints store
    in F32. `required` are the keys without which mlx-lm's ModelArgs cannot be made, those in `nullable` may
    be null, and of `rope` it makes its rope; None where it has none of mlx-lm's. `spelling` says in the hub's
    keys what a config of transformers 5 says in others; without it, mlp_layer_types alone.

    `section` is the key of config.json under which the language model's numbers stand in a multimodal
    config, and `inside` are the model_types that may stand there, none for any; with `flat` the numbers
    may also stand at the top, as mlx-lm's model class reads them without the section. `build`, `defaults`,
    `spelling`, `rewrite` and `refuse` all see that section. `rewrite` returns the keys that the
    output's config must have instead, because mlx-lm's model class reads them differently; without it,
    rope_parameters become rope_theta and rope_scaling. `refuse` returns what makes that class compute
    something else than the reference implementation, whatever the weights. `vision` says what
    can load an output with vision tensors. `runtime` is the module of `mla_tools.models` whose
    class loads the output where mlx-lm has none: a file that imports it is put beside the weights.
    `remarks` returns what a plan should say about a config that the tensors do not bear out.
    """

    name: str
    model_type: str
    build: Builder
    defaults: Mapping[str, Any] | None = None
    architectures: tuple[str, ...] = ()
    float32: tuple[str, ...] = ("e_score_correction_bias", "inv_freq")
    required: tuple[str, ...] = ()
    nullable: tuple[str, ...] = ()
    rope: str | None = "rope_scaling"
    spelling: Speller | None = None
    section: str | None = None
    inside: tuple[str, ...] = ()
    flat: bool = False
    rewrite: Callable[[Config], Config] | None = None
    refuse: Callable[[Config], list[Problem]] | None = None
    vision: str = ""
    runtime: str = ""
    remarks: Callable[[Config], list[str]] | None = None

    def place(self, config: Config) -> str | None:
        """Return the key under which the numbers stand in a config, None where they stand at the top."""
        return None if self.flat and self.section not in config else self.section

    def given(self, config: Config) -> Config:
        """Return the part of a config in which the numbers stand, as it is; {} where it is no object."""
        place = self.place(config)
        part = config.get(place) if place else config
        return part if isinstance(part, Mapping) else {}

    def numbers(self, config: Config) -> dict[str, Any]:
        """Return the part of a config that the table is made from, in the hub's words, with the defaults.

        A null is no value where there is a default.
        """
        given, defaults = self.given(config), self.defaults or {}
        spelled = {**given, **self._spelled(given).keys}
        return {**defaults, **{k: v for k, v in spelled.items() if v is not None or k not in defaults}}

    def misspelled(self, config: Config) -> list[Problem]:
        """Return what a config says in the words of transformers 5 and the hub's cannot say."""
        return self._spelled(self.given(config)).problems

    def _spelled(self, given: Config) -> Spelled:
        return (self.spelling or mlp_layers)(given)

    def rewritten(self, config: Config) -> dict[str, Any]:
        """Return the config that mlx-lm's class needs; neither the dtype nor the quantization is touched."""
        numbers = self.numbers(config)
        numbers |= (self.rewrite or flat_rope)(numbers)
        numbers = {k: v for k, v in numbers.items() if v is not None or k not in _NOT_NULL}
        place = self.place(config)
        whole = {**config, place: numbers} if place else numbers
        own = {"model_file": self.model_file} if self.runtime else {}
        return {**whole, **own, "model_type": self.model_type}

    @property
    def model_file(self) -> str:
        """The name of the file that brings the class into mlx-lm."""
        return f"{self.runtime}.py"

    def added(self) -> dict[str, str]:
        """Return the files that an output needs beside its weights, by name with their text."""
        if not self.runtime:
            return {}
        return {self.model_file: bundled(self.runtime)}

    def refusals(self, config: Config) -> list[Problem]:
        """Return what no conversion can correct in mlx-lm's model class."""
        numbers = self.numbers(config)
        found = self.refuse(numbers) if self.refuse else []
        return [*found, *(unlike_in_rope(numbers) if self.rope else [])]

    def lacking(self, config: Config) -> list[Problem]:
        """Return a problem for each key without which mlx-lm's model class cannot be made."""
        if not self.required and self.rope is None:
            return []
        rewritten = self.rewritten(config)
        place = self.place(config)
        numbers = rewritten[place] if place else rewritten
        given = self.given(config)
        return [
            Problem(
                "config.json",
                f"{key} is missing",
                f"{key}, which mlx-lm's model class asks for",
                "null" if key in given else "no such key",
            )
            for key in self.required
            if numbers.get(key) is None and (key not in numbers or key not in self.nullable)
        ] + (lacking_in_rope(self.rope, numbers.get(self.rope)) if self.rope else [])

    def remarked(self, config: Config) -> list[str]:
        """Return what is worth saying about a config."""
        return self.remarks(self.numbers(config)) if self.remarks else []


# Keys of which a null is no value to mlx-lm's model classes: they compute with it. Without the key they
# take a default, as the table does and as the class of transformers.
_NOT_NULL = frozenset(
    (
        "compress_rope_theta",
        "emb_neighbor_num",
        "emb_split_num",
        "first_k_dense_replace",
        "hc_eps",
        "hc_mult",
        "hidden_act",
        "index_source_layer_ids",
        "kda_safe_gate",
        "kv_source_layer_ids",
        "mla_use_nope",
        "moe_layer_freq",
        "moe_router_activation_func",
        "ngram_vocab_size_ratio",
        "no_kda_lora",
        "num_shared_experts",
        "qk_rope_head_dim",
        "rms_norm_eps",
        "rope_interleave",
        "rope_theta",
        "short_conv_kernel_size",
        "topk_method",
    )
)


def refusal(what: str, *, needed: str = "", found: str = "", cause: str = "") -> Problem:
    """Return the problem of a config that mlx-lm's model class would compute wrongly."""
    return Problem(
        "config.json", f"mlx-lm's model class computes something else: {what}", needed, found, cause
    )


def wrapped(
    inner: Family,
    model_type: str,
    *,
    inside: tuple[str, ...] = (),
    flat: bool = False,
    dropped: Mapping[str, str],
    architectures: tuple[str, ...] = (),
    layouts: Mapping[str, tuple[str, str]] | None = None,
    vision: str = FOR_MLX_VLM,
) -> Family:
    """Return the family of a multimodal config whose text_config is one of `inner`.

    The tensors are those of `inner` with "language_model." before their names. `dropped` are the other
    modules of the checkpoint, with the reason. `layouts` are others than the hub's, with what they write
    for "language_model.model." before what is in the decoder, and for "language_model." before the rest.
    """
    prefix = "language_model"

    def build(g: Geometry) -> tuple[list[Rule], list[Drop]]:
        inside, inside_drops = inner.build(g)
        rules, drops = under(prefix, inside, inside_drops)
        for layout, (model, rest) in (layouts or {}).items():
            rules = [
                rule.also(*(_elsewhere(form, layout, model, rest) for form in plain.forms))
                for plain, rule in zip(inside, rules, strict=True)
            ]
            # The other modules stand beside "language_model", wherever that stands.
            drops += vision_drops(dropped, model.removesuffix(f"{prefix}."), usual=False)
        return rules, drops + vision_drops(dropped)

    return replace(
        inner,
        name=model_type,
        model_type=model_type,
        build=build,
        architectures=architectures,
        section="text_config",
        inside=inside,
        flat=flat,
        vision=vision,
    )


def _elsewhere(form: Form, layout: str, model: str, rest: str) -> Form:
    """Return the form of a layout that writes something else before names, in the decoder and outside."""
    source = tuple(
        model + text.removeprefix("model.") if text.startswith("model.") else rest + text
        for text in form.source
    )
    return replace(form, layout=layout, source=source)


def vision_drops(modules: Mapping[str, str], place: str = "", *, usual: bool = True) -> list[Drop]:
    """Return the drops of the vision modules, by name with the reason, wherever they are.

    The names are also those of mlx-vlm's classes.
    """
    return [
        Drop(place + name, reason, usual=usual, inside=("patch_embed.weight",), vision=name)
        for name, reason in modules.items()
    ]


def under(prefix: str, rules: Iterable[Rule], drops: Iterable[Drop]) -> tuple[list[Rule], list[Drop]]:
    """Return a table for a model that stands under `prefix` in the checkpoint and in mlx-lm's model class."""

    def inside(texts: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(f"{prefix}.{text}" for text in texts)

    moved = [
        replace(
            rule,
            target=inside(rule.target),
            forms=tuple(replace(form, source=inside(form.source)) for form in rule.forms),
        )
        for rule in rules
    ]
    dropped = [
        replace(drop, source=f"{prefix}.{drop.source}", marker=drop.marker and f"{prefix}.{drop.marker}")
        for drop in drops
    ]
    return moved, dropped
