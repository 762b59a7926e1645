"""The output's config.json, and what changes in it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from mla_tools.architectures import Family
from mla_tools.codecs import Quantized, config_keys
from mla_tools.options import DTYPES, Options
from mla_tools.plan.encoding import Encoded

__all__ = ["brief", "changes", "output_config", "quantization_keys"]


def output_config(
    config: Mapping[str, Any], family: Family, encoded: Encoded, options: Options
) -> dict[str, Any]:
    """Return the config.json that mlx-lm reads the output with, keys sorted as mlx-lm writes them."""
    new = copy.deepcopy(family.rewritten(config) if options.layout == "mlx" else dict(config))
    old = new.pop("quantization", None)
    for key in ("quantization_config", "_name_or_path"):
        new.pop(key, None)
    if not family.runtime or options.layout != "mlx":
        # With model_file, mlx_lm.load would run that file of the checkpoint; the only one that an output
        # asks for is ours.
        new.pop("model_file", None)
    if not options.keep_vision:
        # With this key some readers would look for the modules that are left out.
        new.pop("vision_config", None)
    if place := family.place(config):
        for key in ("quantization_config", "model_file"):
            new[place].pop(key, None)
    if options.dtype is not None:
        new["torch_dtype"] = next(name for name, dtype in DTYPES.items() if dtype is options.dtype)
    new |= quantization_keys(encoded, options, old)
    return dict(sorted(new.items()))


def quantization_keys(encoded: Encoded, options: Options, source: object) -> dict[str, Any]:
    """Return the keys of config.json that say how the tensors are stored; {} where all are floats.

    `source`: what MLX wrote of the quantization into the source's config, if it did.
    """
    return config_keys(_quantized(encoded, options, source if isinstance(source, Mapping) else {}))


def _quantized(encoded: Encoded, options: Options, source: Mapping[str, Any]) -> Quantized:
    targets = [target for step in encoded.steps for target in step.targets]
    params = encoded.params
    return Quantized(
        {target.label: target.codec for target in targets if target.codec.quantized},
        options.quantize,
        moved=[target.label for target in targets if target.moved and target.codec.quantized],
        named=encoded.named,
        floats=[
            target.label
            for target in targets
            if not target.codec.quantized and target.name in params and params[target.name].quantizable
        ],
        copied=encoded.vision,
        source=source,
    )


def changes(old: Mapping[str, Any], new: Mapping[str, Any], place: str = "") -> tuple[str, ...]:
    """Return a line for each key that differs; of an object with further objects, for each of its keys."""
    lines = [f"{place}{key}: removed" for key in sorted(old.keys() - new.keys())]
    lines += [f"{place}{key}: added, {brief(new[key])}" for key in sorted(new.keys() - old.keys())]
    for key in sorted(old.keys() & new.keys()):
        before, after = old[key], new[key]
        if before == after:
            continue
        if isinstance(before, Mapping) and isinstance(after, Mapping) and "model_type" in after:
            lines += changes(before, after, f"{place}{key}.")
        else:
            lines.append(f"{place}{key}: {brief(before)} -> {brief(after)}")
    return tuple(lines)


def brief(value: object) -> str:
    """Return a value of config.json for a line of text: of an object, its plain keys alone."""
    if isinstance(value, Mapping):
        plain = {key: item for key, item in value.items() if not isinstance(item, Mapping)}
        more = len(value) - len(plain)
        return f"{plain}" + (f" and entries of {more} module{'s' if more > 1 else ''}" if more else "")
    return repr(value)
