"""The classes with which mlx-lm loads a model of a known family: its own, or ours, with our `sanitize`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

from mla_tools.architectures import Family, family_of
from mla_tools.errors import CheckpointError
from mla_tools.integrations.mlx_lm.sharding import shard
from mla_tools.weights import as_converted, quantization_of

if TYPE_CHECKING:
    import mlx.core as mx

__all__ = ["Classes", "classes_for"]

Classes = tuple[Any, Any]


def classes_for(config: dict[str, Any], theirs: Callable[[dict[str, Any]], Classes]) -> Classes:
    """Return the Model and ModelArgs for the config that mlx-lm's load_model holds.

    For a known family, `config` itself becomes the one that the class needs. When the model sanitizes its
    weights, `config` gets their quantization, which load_model reads next. For other models, and for those
    of which `theirs` takes another class than the family's, this is what `theirs` returns.
    """
    try:
        family = family_of(config)
    except CheckpointError:
        return theirs(config)
    found = _classes(family, config, theirs)
    if found is None:
        return theirs(config)
    model_class, args_class = found
    hub = copy.deepcopy(config)
    needed = copy.deepcopy(family.rewritten(hub))
    needed.pop("model_file", None)
    if place := family.place(hub):
        # load_model would look there, too.
        for key in ("quantization_config", "model_file"):
            needed[place].pop(key, None)
    config.clear()
    config.update(needed)

    def sanitized(self: Any, weights: Mapping[str, mx.array]) -> dict[str, mx.array]:
        del self
        made = as_converted(weights, hub)
        _announce(config, made, quantization_of(made, hub))
        return made

    members: dict[str, Any] = {"sanitize": sanitized, "__module__": model_class.__module__}
    if not hasattr(model_class, "shard"):
        members["shard"] = shard
    return type(model_class.__name__, (model_class,), members), args_class


def _classes(
    family: Family, config: Mapping[str, Any], theirs: Callable[[dict[str, Any]], Classes]
) -> Classes | None:
    """Return the classes of a family, None where mlx-lm has others for this config, or none at all."""
    if family.runtime:
        module = import_module(f"mla_tools.models.{family.runtime}")
        return module.Model, module.ModelArgs
    try:
        found = theirs({**config, "model_type": family.model_type})
    except ValueError:
        return None
    try:
        other = theirs(dict(config))
    except (KeyError, ValueError):  # it does not know the hub's model_type
        return found
    return found if other == found else None


def _announce(config: dict[str, Any], made: Mapping[str, Any], quantization: dict[str, Any] | None) -> None:
    """Say in the config of load_model how the weights are quantized."""
    # What the hub says of a format is no longer true, and load_model would act on it.
    config.pop("quantization_config", None)
    if quantization is not None:
        config["quantization"] = quantization
        config["quantization_config"] = dict(quantization)
    elif made:
        config.pop("quantization", None)
