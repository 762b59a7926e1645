"""Mutations of small sound checkpoints, driven by any source of choices: hypothesis, atheris or a seed.

Only headers, config and index exist: the data of a file is as long as its header says and is never made,
because planning reads none of it.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from math import inf, nan, prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from attacks.hostile import WIDTHS
from numpy.typing import NDArray

from mla_tools.errors import CheckpointError, MlaToolsError, Problem
from mla_tools.files.checkpoint import open_checkpoint
from mla_tools.files.place import Kind
from mla_tools.options import Options
from mla_tools.plan import make_plan
from mla_tools.quantization import QuantSpec
from mla_tools.report import plan_text
from mla_tools.samples import write_sample
from mla_tools.spec import DType

# Returns a number from 0 up to but not including the one that it is given.
Pick = Callable[[int], int]

INDEX = "model.safetensors.index.json"

# What is mutated: the families that differ most, each in a format with parts of its own.
SEEDS = (
    ("deepseek_v3", "bf16"),
    ("deepseek_v3", "fp8"),
    ("deepseek_v32", "ct-nvfp4"),
    ("kimi_k25", "ct-int4"),
    ("kimi_k3", "ct-mxfp4"),
    ("kimi_linear", "gptq"),
    ("longcat_flash_ngram", "ct-int8"),
    ("bailing_hybrid", "awq"),
    ("mistral3", "fp8-tensor"),
    ("deepseek_v41", "bf16"),
    ("minicpm3", "modelopt-nvfp4"),
)

VALUES: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 1, 2, 3, 8, 63, 4096, 1 << 28, 1 << 31, 1 << 62, 10**12, 10**30),
    *(1.5, 1e308, nan, inf, "", "x", "128", "\ud800", "bfloat16", "mxfp4", "yarn", "a" * 5000),
    *([], [0], [128, 128], [0, 0], [1 << 62, 1], [[]], ["x"], [None], {}, {"type": "yarn"}, {"": {}}),
    *({"bits": 4}, {"group_size": 0, "bits": 4}, {"quant_method": "fp8"}, {"config_groups": {"g": {}}}),
    *(json.loads("[" * 400 + "]" * 400), json.loads('{"a":' * 400 + "1" + "}" * 400)),
)
KEYS = ("quantization", "quantization_config", "text_config", "rope_scaling", "model_file", "auto_map", "x")
WORDS = ("weight", "scales", "biases", "weight_scale", "weight_scale_inv", "qweight", "qzeros", "g_idx")
DTYPES = (*sorted(WIDTHS), *sorted(DType.__members__.keys() - WIDTHS), "F4", "")
AXES = (0, 1, 2, 3, 8, 31, 64, 128, 1 << 20, 1 << 31, 1 << 62, -1)
OPTIONS = (
    Options(),
    Options(quantize=QuantSpec("affine", 4, 64)),
    Options(quantize=QuantSpec("affine", 4, 64), quant_predicate="mla_mixed_4_6"),
    Options(quantize=QuantSpec("mxfp4")),
    Options(dequantize=True, dtype=DType.F16),
    Options(embed_q="source", overrides=(("o_proj", QuantSpec("affine", 8, 32)),)),
    Options(keep_vision=True),
)


@dataclass
class Draft:
    """A checkpoint before it is written: config, header tables (file -> name -> entry) and weight_map."""

    config: Any
    files: dict[str, dict[str, list[Any]]]
    places: Any
    index: bool = True
    texts: dict[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class Hollow:
    """A file whose first bytes are given and whose others are zeros; it is its own open file."""

    name: str
    head: bytes
    size: int

    stamp = ""

    def open(self) -> Hollow:
        return self

    def pin(self, part: object = None) -> Hollow:
        return self

    def read(self, offset: int, nbytes: int) -> NDArray[np.uint8]:
        assert 0 <= offset <= offset + nbytes <= self.size
        assert nbytes <= len(self.head), "planning reads tensor data"
        return np.frombuffer(self.head[offset : offset + nbytes].ljust(nbytes, b"\0"), np.uint8)

    def close(self) -> None:
        pass


@dataclass(frozen=True)
class Shelf:
    """A place in memory."""

    files: dict[str, Hollow]
    local = True
    readers = 1
    revision = ""

    def __str__(self) -> str:
        return "shelf"

    def names(self) -> list[str]:
        return sorted(self.files)

    def others(self) -> list[str]:
        return []

    def kind(self, name: str) -> Kind:
        return "file" if name in self.files else "other"

    def file(self, name: str) -> Hollow:
        if name not in self.files:
            raise CheckpointError([Problem(name, "is not there")])
        return self.files[name]

    def tag(self, name: str) -> str:
        return ""

    def stop(self) -> None:
        pass


@cache
def seed(family: str, fmt: str) -> Draft:
    """Return the draft of a sample, of which only the headers are kept."""
    with TemporaryDirectory() as temporary:
        folder = Path(temporary) / "sample"
        write_sample(family, folder, fmt)
        files = {}
        for path in sorted(folder.glob("*.safetensors")):
            raw = path.read_bytes()
            table = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
            table.pop("__metadata__", None)
            files[path.name] = {name: [item["dtype"], item["shape"]] for name, item in table.items()}
        assert files
        config = json.loads((folder / "config.json").read_text())
        return Draft(config, files, {name: file for file, held in files.items() for name in held})


def mutated(pick: Pick) -> Draft:
    """Return one of the seeds after up to four mutations."""
    draft = copy.deepcopy(seed(*SEEDS[pick(len(SEEDS))]))
    for _ in range(pick(5)):
        _MUTATIONS[pick(len(_MUTATIONS))](draft, pick)
    return draft


def place(draft: Draft) -> Shelf:
    """Return the place in which a draft lies."""
    contents = {"config.json": _json(draft.config), **draft.texts}
    if draft.index:
        contents.setdefault(INDEX, _json({"metadata": {}, "weight_map": draft.places}))
    shelf = {name: Hollow(name, data, len(data)) for name, data in contents.items()}
    for file, tensors in draft.files.items():
        header: dict[str, Any] = {}
        reached = 0
        for name, (dtype, shape) in tensors.items():
            width = DType[dtype].nbytes if dtype in DType.__members__ else 1
            end = reached + max(prod(shape), 0) * width
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [reached, end]}
            reached = end
        text = _json(header)
        shelf.setdefault(file, Hollow(file, len(text).to_bytes(8, "little") + text, 8 + len(text) + reached))
    return Shelf(shelf)


def check(draft: Draft, options: Options) -> str:
    """Plan a draft; return "planned" or the refusal, which can be printed. Anything else is a defect."""
    try:
        checkpoint = open_checkpoint(place(draft))
        plan = make_plan(checkpoint, options)
    except MlaToolsError as error:
        text = str(error)
        text.encode()
        return text
    plan_text(plan).encode()
    json.dumps(plan.config, allow_nan=False)
    sources = [source for step in plan.steps for source in step.sources]
    sources += [drop.source for drop in plan.drops]
    used = [name for source in sources for name in source.parts.values()]
    assert sorted(used) == sorted(checkpoint.tensors), "a stored tensor is used twice or not at all"
    assert all(file.layout.size >= len(file.layout.header) for file in plan.files)
    return "planned"


def _json(value: object) -> bytes:
    return json.dumps(value).encode()


# --- the mutations -----------------------------------------------------------------------------------


def _spots(value: object, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the paths to everything inside a JSON value, not far down."""
    if len(path) > 5:
        return []
    items: Any = value.items() if isinstance(value, dict) else enumerate(value) if _is_list(value) else ()
    found = []
    for key, item in items:
        found += [(*path, key), *_spots(item, (*path, key))]
    return found


def _is_list(value: object) -> bool:
    return isinstance(value, list)


def _inside(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


def _change_config(draft: Draft, pick: Pick) -> None:
    """Delete a key, or replace its value by a strange one, a near one or one from elsewhere."""
    spots = _spots(draft.config)
    if not spots:
        return
    path = spots[pick(len(spots))]
    holder, key = _inside(draft.config, path[:-1]), path[-1]
    match pick(4):
        case 0:
            del holder[key]
        case 1:
            holder[key] = copy.deepcopy(VALUES[pick(len(VALUES))])
        case 2:
            holder[key] = copy.deepcopy(_inside(draft.config, spots[pick(len(spots))]))
        case 3 if isinstance(holder[key], int):
            holder[key] += pick(7) - 3
        case _:
            holder[key] = str(holder[key])


def _add_key(draft: Draft, pick: Pick) -> None:
    if isinstance(draft.config, dict):
        draft.config[KEYS[pick(len(KEYS))]] = copy.deepcopy(VALUES[pick(len(VALUES))])


def _replace_config(draft: Draft, pick: Pick) -> None:
    draft.config = copy.deepcopy(VALUES[pick(len(VALUES))])


def _tensor(draft: Draft, pick: Pick) -> tuple[dict[str, list[Any]], str]:
    """Return a tensor with the table that holds it; there is always one."""
    tables = [table for table in draft.files.values() if table]
    if not tables:
        draft.files["model.safetensors"] = {"a": ["BF16", [2]]}
        tables = [draft.files["model.safetensors"]]
    table = tables[pick(len(tables))]
    names = list(table)
    return table, names[pick(len(names))]


def _remove_tensor(draft: Draft, pick: Pick) -> None:
    table, name = _tensor(draft, pick)
    del table[name]


def _rename_tensor(draft: Draft, pick: Pick) -> None:
    """Rename a tensor: another leaf, another number, another place, or something absurd."""
    table, name = _tensor(draft, pick)
    pieces = name.split(".")
    match pick(6):
        case 0:
            pieces[-1] = WORDS[pick(len(WORDS))]
        case 1:
            pieces = [str(pick(1 << 40)) if piece.isdigit() else piece for piece in pieces]
        case 2:
            del pieces[pick(len(pieces))]
        case 3:
            pieces.insert(pick(len(pieces) + 1), str(pick(4)))
        case 4:
            pieces += ["0"] * pick(2000)
        case _:
            pieces = [("", "..", "/etc/passwd", "a\0b", "n" * 5000, "\ud800", "__metadata__")[pick(7)]]
    table[".".join(pieces)] = table[name] if pick(2) else table.pop(name)


def _reshape_tensor(draft: Draft, pick: Pick) -> None:
    table, name = _tensor(draft, pick)
    dtype, shape = table[name]
    shape = list(shape)
    match pick(4):
        case 0 if shape:
            shape[pick(len(shape))] = AXES[pick(len(AXES))]
        case 1:
            shape.append(AXES[pick(len(AXES))])
        case 2 if shape:
            del shape[pick(len(shape))]
        case _:
            shape.reverse()
    table[name] = [dtype, shape]


def _retype_tensor(draft: Draft, pick: Pick) -> None:
    table, name = _tensor(draft, pick)
    table[name] = [DTYPES[pick(len(DTYPES))], table[name][1]]


def _copy_tensor(draft: Draft, pick: Pick) -> None:
    """Put a tensor into another file too."""
    table, name = _tensor(draft, pick)
    files = list(draft.files)
    draft.files[files[pick(len(files))]][name] = table[name]


def _change_index(draft: Draft, pick: Pick) -> None:
    match pick(5):
        case 0:
            draft.index = False
        case 1:
            draft.places = copy.deepcopy(VALUES[pick(len(VALUES))])
        case 2 if isinstance(draft.places, dict) and draft.places:
            names = list(draft.places)
            strange = ("../x.safetensors", "", "gone.safetensors", "config.json", None, *draft.files)
            draft.places[names[pick(len(names))]] = strange[pick(len(strange))]
        case 3:
            draft.texts[INDEX] = b"{" * pick(3000)
        case _:
            draft.texts["config.json"] = _json(draft.config)[: -1 - pick(40)]


def _lose_file(draft: Draft, pick: Pick) -> None:
    files = list(draft.files)
    if files:
        del draft.files[files[pick(len(files))]]


_MUTATIONS = (
    *(_change_config,) * 4,
    _add_key,
    _replace_config,
    _remove_tensor,
    _rename_tensor,
    _rename_tensor,
    _reshape_tensor,
    _retype_tensor,
    _copy_tensor,
    _change_index,
    _lose_file,
)
