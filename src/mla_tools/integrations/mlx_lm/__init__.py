"""The installed mlx-lm with our `sanitize`, `shard` and classes: `enable()`, and `disable()` to undo it.

    from mla_tools.integrations.mlx_lm import enable

    with enable():
        model, tokenizer = mlx_lm.load("DeepSeek-V3")  # as the hub has it, in any format that is read

No file of mlx-lm is touched. Two names of `mlx_lm.utils` are replaced: `load_model`, by which each of its
commands loads a model, and `_get_classes`. `python -m mla_tools.integrations.mlx_lm generate ...` runs a
command of mlx-lm so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Any

from mla_tools.architectures import MODEL_TYPES
from mla_tools.integrations.mlx_lm.classes import Classes, classes_for
from mla_tools.integrations.mlx_lm.sharding import shard, shard_layer

__all__ = ["disable", "enable", "shard", "shard_layer"]

# What was replaced in mlx_lm.utils, by name.
_replaced: dict[str, Any] = {}


class _Enabled:
    """What `enable` returns: the end of a with statement undoes it."""

    def __enter__(self) -> _Enabled:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        disable()


def enable() -> _Enabled:
    """Make the installed mlx-lm load models of the known families with our `sanitize`.

    It applies to everything that loads by `mlx_lm.utils`: `load`, `sharded_load`, generate, server, convert,
    lora, fuse and the quantizers. The tensors become those of `mla-sanitize convert` with its defaults, but
    keep their float dtypes, and the config that mlx-lm goes on with says how they are quantized. A class
    without a `shard` gets one, and DeepSeek V4 our class. A checkpoint's model file is run if the caller
    says trust_remote_code, and never otherwise. Other models load as before.

    The result is a context manager; `disable()` undoes it, too. A second call changes nothing. Code that
    has imported `load_model` from `mlx_lm.utils` by name keeps the one that it has.
    """
    utils = import_module("mlx_lm.utils")
    if not _replaced:
        _replaced.update({name: getattr(utils, name) for name in ("load_model", "_get_classes")})
        own = _own_classes(_replaced["_get_classes"])
        utils._get_classes = own  # type: ignore[attr-defined]
        utils.load_model = _own_load_model(_replaced["load_model"], own, utils)  # type: ignore[attr-defined]
    return _Enabled()


def disable() -> None:
    """Make mlx-lm what it was before `enable`; models that are loaded stay as they are."""
    utils = import_module("mlx_lm.utils")
    while _replaced:
        setattr(utils, *_replaced.popitem())


def _own_classes(theirs: Callable[[dict[str, Any]], Classes]) -> Callable[[dict[str, Any]], Classes]:
    @wraps(theirs)
    def get_classes(config: dict[str, Any]) -> Classes:
        return classes_for(config, theirs)

    return get_classes


def _own_load_model(
    theirs: Callable[..., Any], classes: Callable[[dict[str, Any]], Classes], utils: Any
) -> Callable[..., Any]:
    @wraps(theirs)
    def load_model(
        model_path: Path,
        lazy: bool = False,
        strict: bool = True,
        model_config: Mapping[str, Any] | None = None,
        get_model_classes: Callable[[dict[str, Any]], Classes] = classes,
        trust_remote_code: bool = False,
    ) -> Any:
        given = dict(model_config or {})
        if get_model_classes is _replaced.get("_get_classes"):
            get_model_classes = classes
        if get_model_classes is classes and not trust_remote_code:
            config = {**utils.load_config(model_path), **given}
            family = MODEL_TYPES.get(str(config.get("model_type")))
            if config.get("model_file") is not None and family is not None and family.runtime:
                # The class is ours, so the file that imports it need not be run.
                given["model_file"] = None
        return theirs(model_path, lazy, strict, given, get_model_classes, trust_remote_code)

    return load_model
