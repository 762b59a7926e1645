"""The installed mlx-lm with our `sanitize`, `shard` and classes: `enable()`, and `disable()` to undo it.

    from mla_tools.integrations.mlx_lm import enable

    with enable():
        model, tokenizer = mlx_lm.load("DeepSeek-V3")  # as the hub has it, in any format that is read

No file of mlx-lm is touched. Three names of `mlx_lm.utils` are replaced: `load_model`, by which each of its
commands loads a model, `_get_classes`, and `create_model_card`, the last thing that `save` calls.
`python -m mla_tools.integrations.mlx_lm generate ...` runs a command of mlx-lm so.
"""

from __future__ import annotations

import json
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

# What was replaced in mlx_lm.utils, by name: what it was, and what we put there.
_replaced: dict[str, tuple[Any, Any]] = {}


class _Enabled:
    """What `enable` returns: the end of a with statement undoes what this call changed."""

    def __init__(self, *, changed: bool) -> None:
        self._changed = changed

    def __enter__(self) -> _Enabled:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._changed:
            disable()


def enable() -> _Enabled:
    """Make the installed mlx-lm load models of the known families with our `sanitize`.

    It applies to everything that loads by `mlx_lm.utils`: `load`, `sharded_load`, generate, server, convert,
    lora, fuse and the quantizers. The tensors become those of `mla-sanitize convert` with its defaults, but
    keep their float dtypes, and the config that mlx-lm goes on with says how they are quantized. A class
    without a `shard` gets one, and DeepSeek V4 our class. A checkpoint's model file is run if the caller
    says trust_remote_code, and never otherwise. Other models load as before. A folder that mlx-lm's `save`
    writes (convert, fuse, the quantizers) of a model of our class has the model file of `mla-sanitize
    convert`, and its config.json names it.

    The result is a context manager: its end undoes this call, and nothing if this call found it enabled.
    `disable()` undoes it always. A second call changes nothing. Code that has imported `load_model` from
    `mlx_lm.utils` by name keeps the one that it has.
    """
    utils: Any = import_module("mlx_lm.utils")
    if _replaced:
        return _Enabled(changed=False)
    classes = _own_classes(utils._get_classes)
    own = {
        "_get_classes": classes,
        "load_model": _own_load_model(utils.load_model, utils._get_classes, classes, utils),
        "create_model_card": _own_create_model_card(utils.create_model_card),
    }
    _replaced.update({name: (getattr(utils, name), function) for name, function in own.items()})
    for name, function in own.items():
        setattr(utils, name, function)
    return _Enabled(changed=True)


def disable() -> None:
    """Make mlx-lm what it was before `enable`; models that are loaded stay as they are.

    A name of `mlx_lm.utils` that somebody else has replaced since then is left as it is. If that calls the
    function of ours that it found, it goes on to do so.
    """
    utils = import_module("mlx_lm.utils")
    while _replaced:
        name, (before, own) = _replaced.popitem()
        if getattr(utils, name) is own:
            setattr(utils, name, before)


def _own_classes(theirs: Callable[[dict[str, Any]], Classes]) -> Callable[[dict[str, Any]], Classes]:
    @wraps(theirs)
    def get_classes(config: dict[str, Any]) -> Classes:
        return classes_for(config, theirs)

    return get_classes


def _own_load_model(
    theirs: Callable[..., Any],
    their_classes: Callable[[dict[str, Any]], Classes],
    classes: Callable[[dict[str, Any]], Classes],
    utils: Any,
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
        if get_model_classes is their_classes:
            get_model_classes = classes
        if get_model_classes is classes and not trust_remote_code:
            config = {**utils.load_config(model_path), **given}
            family = MODEL_TYPES.get(str(config.get("model_type")))
            if config.get("model_file") is not None and family is not None and family.runtime:
                # The class is ours, so the file that imports it need not be run.
                given["model_file"] = None
        return theirs(model_path, lazy, strict, given, get_model_classes, trust_remote_code)

    return load_model


def _own_create_model_card(theirs: Callable[..., None]) -> Callable[..., None]:
    @wraps(theirs)
    def create_model_card(path: str | Path, *arguments: Any, **named: Any) -> None:
        _add_model_file(Path(path))
        theirs(path, *arguments, **named)

    return create_model_card


def _add_model_file(folder: Path) -> None:
    """Give a folder that mlx-lm has saved the file with our class, if its model is of that class.

    A config that names a model file is that of a model whose own file was run, so both are left as they are.
    Any other file of the same name has come from the source, and was not run.
    """
    place = folder / "config.json"
    if not place.is_file():
        return
    config = json.loads(place.read_text())
    family = MODEL_TYPES.get(str(config.get("model_type")))
    if family is None or not family.runtime or config.get("model_file") is not None:
        return
    for name, text in family.added().items():
        (folder / name).write_text(text, encoding="utf-8")
    # As mlx-lm writes it.
    place.write_text(json.dumps(dict(sorted({**config, "model_file": family.model_file}.items())), indent=4))
