"""Mutations of output folders, finished and not, and what must hold after any action on them.

Driven by any source of choices: hypothesis, atheris or a seed. A folder is a conversion at one of its calls
that change the disk, with up to five mutations: damage, files of somebody else, links, pipes, forged JSON.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import re
import shutil
import socket
import stat
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

from attacks.mutations import VALUES, Pick

from mla_tools import execute as executing
from mla_tools.console import printable
from mla_tools.errors import CheckpointError, MlaToolsError
from mla_tools.execute import execute
from mla_tools.files.checkpoint import open_checkpoint
from mla_tools.files.place import shown
from mla_tools.options import Options
from mla_tools.output import check_output, writing
from mla_tools.plan import Plan, Workload, make_plan
from mla_tools.plan import files as plan_files
from mla_tools.samples import write_sample
from mla_tools.spec import DType
from mla_tools.verify import verify_output

RECORD = "mla_tools.json"
CLEARING = "mla_tools.journal-clearing.jsonl"
JOURNAL = re.compile(r"mla_tools\.journal-([0-9]{5,9}|clearing)\.jsonl")

# A model whose conversion takes 10 ms, into two files.
TINY = {
    "vocab_size": 8,
    "hidden_size": 32,
    "intermediate_size": 32,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "n_routed_experts": 2,
    "num_attention_heads": 2,
    "kv_lora_rank": 32,
    "q_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}
SHARD_BYTES = 25_000
CHECKPOINT_BYTES = 4000

SPARSE = 20 << 30
# All that an action may read: some times what the folder and the source hold, and none of a sparse file.
MOST_READ = 32 << 20
# All that an error may say.
MOST_SAID = 100_000

STRAYS = (
    *("chat_template.jinja", "modeling_x.py", "adapters.safetensors", "model.safetensors", "thesis.txt"),
    *(".hidden", "README.md", ".gitattributes", "model-00001-of-00009.safetensors", "x.partial", "a\nb"),
    *("\x1b[31mred\u202e.txt", "\udcff", "n" * 255, "mla_tools.journal-1.jsonl"),
    "config.json.partial.partial",
    "mla_tools.journal-\u0660\u0660\u0660\u0660\u0660.jsonl",
)  # fmt: skip
# What verify_output may pass beside a model: no reader of models opens it.
BESIDE = re.compile(r"\..*|README.*|LICENSE.*|NOTICE.*|.*\.(md|png|jpg|svg)", re.DOTALL)
NAMES = (
    *("..", ".", "", "/etc/passwd", "a/b", "a\\b", "../victim.txt", "\0", "a\0b", "\x1b[31mred", "\ud800"),
    *("x" * 300, "x" * 70_000, RECORD, CLEARING, "nobody.txt", "config.json.partial", "model.safetensors"),
)  # fmt: skip
ENTRIES = (
    *(None, 5, [], {}, {"bytes": 0, "sha256": hashlib.sha256(b"").hexdigest()}, {"bytes": 1}),
    *({"bytes": 10**30, "sha256": "0"}, {"bytes": -1, "sha256": ""}, {"bytes": True, "sha256": "0" * 64}),
    *({"bytes": 4, "sha256": "\x1b[31m\ud800"}, {"bytes": 1.0, "sha256": []}),
)  # fmt: skip
LINES: tuple[Any, ...] = (
    *({"output": 5}, {"output": {"files": 5}}, {"output": {"files": {}}}, {"output": {"files": [[], {}, 5]}}),
    *({"output": {"files": list(NAMES), "copied": "x", "added": {"": 1}}}, {"provenance": None}, {}),
    *({"provenance": {"output": {"files": dict.fromkeys(NAMES, 1)}}}, {"provenance": []}),
    *({"done": 5}, {"done": [5, [], [0], [0, 5], [0, [5]], [0, [[]]], [0, [[5]]], [True, [[[0, 1, 2]]]]]}),
    *({"done": [[10**30, [[[0, 10**30, 0]]]], [-1, []], [0, [[[0, 1, -1]], []]], [1, [[[0, 64, 0]]]]]},),
    *({"done": [[number, [[[0, 64, 0]]]] for number in range(40)]}, {"done": [["0", {}], [0.0, [[[]]]]]}),
    *({"file": 5, "sha256": "0"}, {"file": "..", "sha256": "0"}, {"file": "\ud800\x1b", "sha256": ""}),
    *({"file": "model-00001-of-00002.safetensors", "sha256": text} for text in ("0" * 64, "\x1b[31m", "")),
)  # fmt: skip

Files = dict[str, bytes]


def partial(name: str) -> str:
    return f"{name}.partial"


@dataclass
class Bench:
    """Plans of one source, the folders to begin with, and what a finished one holds."""

    home: TemporaryDirectory[str]
    plan: Plan
    states: dict[str, Files]
    wanted: Files
    other: Files
    begun: bytes  # the first line of its journal
    ours: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        names = {name.removesuffix(".partial") for files in self.states.values() for name in files}
        self.ours = names | {partial(name) for name in names}
        self.root = Path(self.home.name)
        self.source = _seen(self.root / "source", identity=True)


@dataclass
class Case:
    """A folder that is mutated, the files of somebody else beside it, and what was done."""

    bench: Bench
    folder: Path
    outside: Path
    done: list[str] = field(default_factory=list)
    # What a forged record or journal calls this tool's, and whether one with a sound digest is there.
    claimed: set[str] = field(default_factory=set)
    forged: bool = False


@cache
def bench() -> Bench:
    """Return the bench, made once."""
    shm = Path("/dev/shm")
    home = TemporaryDirectory(dir=shm if shm.is_dir() else None)
    root = Path(home.name)
    write_sample("deepseek_v3", root / "source", "bf16", changes=TINY)
    with patch.object(plan_files, "SHARD_BYTES", SHARD_BYTES):
        plan, other = (
            make_plan(open_checkpoint(root / "source"), options)
            for options in (Options(), Options(dtype=DType.F32))
        )
    states: dict[str, Files] = {"empty": {}}
    begun = b""
    for name, made in (("other", other), ("new", plan)):
        for number, files in enumerate(_moments(made, root / name)):
            states[f"{name} {number}"] = files
            begun = files.get("mla_tools.journal-00000.jsonl", begun).partition(b"\n")[0] + b"\n"
        if name == "other":  # an unfinished one, and a finished one
            states = {key: states[key] for key in ("empty", "other 9", "other 30")}
            states["other finished"] = _files(root / "other")
    wanted = _files(root / "new")
    for number, files in enumerate(_moments(plan, root / "other", overwrite=True)):
        states[f"replaced {number}"] = files
        if not files:  # what comes now is what comes to a new one
            break
    unique: dict[tuple[tuple[str, bytes], ...], str] = {}
    for name, files in {"finished": wanted, **states}.items():
        unique.setdefault(tuple(sorted(files.items())), name)
    for name in ("new", "other"):
        shutil.rmtree(root / name)
    return Bench(
        home,
        plan,
        {name: dict(files) for files, name in unique.items()},
        wanted,
        states["other finished"],
        begun,
    )


class _Numbered(Future[Any]):
    """A future that lies in a set where its number puts it, and not where its address does."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self._number = number

    def __hash__(self) -> int:
        return self._number


class _AtOnce:
    """An executor that does what it is given before it returns, so that each moment is the same each time."""

    def __init__(self, threads: int, *, initializer: Callable[[], None] | None = None) -> None:
        self._count = 0

    def __enter__(self) -> _AtOnce:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def submit(self, work: Callable[..., Any], *given: Any) -> Future[Any]:
        self._count += 1
        future = _Numbered(self._count)
        try:
            future.set_result(work(*given))
        except Exception as error:
            future.set_exception(error)
        return future

    def shutdown(self, **how: bool) -> None:
        pass


def _moments(plan: Plan, out: Path, **flags: bool) -> list[Files]:
    """Convert, and return what the folder holds before each call that changes the disk."""
    moments: list[Files] = []

    def logged(call: Callable[..., Any]) -> Callable[..., Any]:
        def telling(*args: Any, **kwargs: Any) -> Any:
            if out.is_dir():
                moments.append(_files(out))
            return call(*args, **kwargs)

        return telling

    with ExitStack() as stack:
        for name in ("write", "ftruncate", "fsync", "rename", "unlink"):
            stack.enter_context(patch.object(os, name, logged(getattr(os, name))))
        for module in (executing, writing):
            stack.enter_context(patch.object(module, "ThreadPoolExecutor", _AtOnce))
        stack.enter_context(patch.object(writing, "CHECKPOINT_BYTES", CHECKPOINT_BYTES))
        execute(plan, out, workload=Workload(1, 4000, 10**9), device="cpu", **flags)
    return moments


def _files(folder: Path) -> Files:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


# --- a case --------------------------------------------------------------------------------------------


def check(pick: Pick) -> str:
    """Mutate a folder, act on it and return what came of it; anything that must not be is a defect."""
    made = bench()
    states = sorted(made.states)
    with TemporaryDirectory(dir=made.root) as home:
        case = Case(made, Path(home) / "out", Path(home) / "outside")
        state = states[pick(len(states))]
        case.done.append(state)
        case.folder.mkdir()
        for name, data in made.states[state].items():
            (case.folder / name).write_bytes(data)
        _outside(case)
        for _ in range(pick(6)):
            mutation = MUTATIONS[pick(len(MUTATIONS))]
            case.done.append(mutation.__name__.strip("_"))
            with suppress(OSError):  # a folder where a file was to be changed, a name that is too long
                mutation(case, pick)
        action = list(ACTIONS)[pick(len(ACTIONS))]
        case.done.append(action)
        try:
            return _act(case, action)
        except BaseException as error:
            # libFuzzer shows no notes.
            steps = " -> ".join(ascii(step)[1:-1] for step in case.done)
            raise AssertionError(f"{steps}: {error!r}") from error


def _outside(case: Case) -> None:
    """Make the files of somebody else."""
    case.outside.mkdir()
    (case.outside / "folder").mkdir()
    for name in ("victim.txt", "folder/victim.txt", "victim.jsonl"):
        (case.outside / name).write_text("mine\n")
    for name in ("model-00001-of-00002.safetensors", RECORD, "config.json"):
        (case.outside / name).write_bytes(case.bench.wanted[name])
    (case.outside / "to zero").symlink_to("/dev/zero")


ACTIONS: dict[str, Callable[[Case], Any]] = {
    "resume": lambda case: _execute(case, resume=True),
    "overwrite": lambda case: _execute(case, overwrite=True),
    "plain": lambda case: _execute(case),
    "verify": lambda case: verify_output(case.folder),
    "verify quick": lambda case: verify_output(case.folder, quick=True),
    "check resume": lambda case: check_output(case.folder, resume=True),
    "check overwrite": lambda case: check_output(case.folder, overwrite=True),
    "check": lambda case: check_output(case.folder),
}


def _execute(case: Case, **flags: bool) -> bool:
    return execute(case.bench.plan, case.folder, workload=Workload(1, 4000, 10**9), device="cpu", **flags)


def _act(case: Case, action: str) -> str:
    made = case.bench
    others, before = _seen(case.outside, identity=True), _seen(case.folder)
    kept = {name: seen for name, seen in before.items() if not _may_go(case, name)}
    said, result = "", None
    try:
        with _bounded():
            result = ACTIONS[action](case)
    except MlaToolsError as error:
        said = "\n".join([str(error), *getattr(error, "__notes__", ())])
        assert len(said) < MOST_SAID, f"an error of {len(said):,} characters"
        text = printable(said)
        text.encode()
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", text)
    after = _seen(case.folder)
    now = _seen(case.outside, identity=True)
    changed = {name: (others.get(name), now.get(name)) for name in others.keys() | now.keys()
               if others.get(name) != now.get(name)}  # fmt: skip
    assert not changed, f"a file outside of the folder was changed: {changed}"
    assert _seen(made.root / "source", identity=True) == made.source, "the source was changed"
    lost = {name for name, seen in kept.items() if after.get(name) != seen}
    assert not lost, f"lost or changed: {lost}"
    if action not in ("resume", "overwrite"):
        assert after == before, "an action that only looks has changed the folder"
    if not said:
        if action == "plain":
            raise AssertionError("it was written into a folder that is there")
        if action in ("resume", "overwrite"):
            _check_written(case, bool(result), before, after)
        if action == "verify" and not case.forged:
            _check_verified(case, after)
    return said or "done"


def _may_go(case: Case, name: str) -> bool:
    """Return whether this tool may change or remove what lies there: files of its own, by their names."""
    status = (case.folder / name).lstat()
    own = name in case.bench.ours or bool(JOURNAL.fullmatch(name)) or name in case.claimed
    own = own or name.removesuffix(".partial") in case.claimed
    return own and stat.S_ISREG(status.st_mode) and status.st_nlink == 1


def _check_written(case: Case, worked: bool, before: dict[str, Any], after: dict[str, Any]) -> None:
    wanted = case.bench.wanted
    for name, data in wanted.items():
        path = case.folder / name
        assert stat.S_ISREG(path.lstat().st_mode), f"{name} is not a regular file"
        if worked:
            assert path.read_bytes() == data, f"{name} has other bytes"
        elif not case.forged:  # complete already, by its record and its sizes
            assert path.stat().st_size == len(data), f"{name} has another size"
    more = after.keys() - wanted.keys()
    assert all(before.get(name) == after[name] for name in more), f"left behind: {more}"
    assert not any(JOURNAL.fullmatch(name) for name in more), "a journal is left"
    try:
        verify_output(case.folder)
    except CheckpointError as error:
        found = {problem.subject for problem in error.problems}
        strays = {shown(name) for name in more}
        assert found <= strays or not worked, f"verify names {found - strays}"


def _check_verified(case: Case, after: dict[str, Any]) -> None:
    record = (case.folder / RECORD).read_bytes()
    wanted = case.bench.other if record == case.bench.other[RECORD] else case.bench.wanted
    for name, data in wanted.items():
        assert (case.folder / name).read_bytes() == data, f"{name} has other bytes, and verify passes"
    strange = {name for name in after.keys() - wanted.keys() if not BESIDE.fullmatch(name)}
    assert not strange, f"{strange} beside the model, and verify passes"


def _seen(folder: Path, *, identity: bool = False) -> dict[str, Any]:
    """Return what lies in a folder, by name: its kind, mode and content; with more to know it again by."""
    found: dict[str, Any] = {}
    for path in sorted(folder.iterdir()):
        status = path.lstat()
        content: Any = None
        if stat.S_ISREG(status.st_mode):
            content = path.read_bytes() if status.st_size < 1 << 20 else status.st_size
        elif stat.S_ISLNK(status.st_mode):
            content = os.readlink(path)  # noqa: PTH115
        elif stat.S_ISDIR(status.st_mode):
            content = _seen(path, identity=identity)
        known = (status.st_ino, status.st_mtime_ns, status.st_nlink) if identity else ()
        found[path.name] = (status.st_mode, content, known)
    return found


@contextmanager
def _bounded() -> Iterator[None]:
    """Count what is read, and spare the disk."""
    read = 0

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*args: Any) -> Any:
            nonlocal read
            found = call(*args)
            read += found if isinstance(found, int) else len(found)
            assert read <= MOST_READ, f"{read:,} bytes were read"
            return found

        return counting

    with ExitStack() as stack:
        for name in ("pread", "preadv", "read"):
            stack.enter_context(patch.object(os, name, counted(getattr(os, name))))
        stack.enter_context(patch.object(os, "fsync", lambda fd: None))
        stack.enter_context(patch.object(executing, "ThreadPoolExecutor", _AtOnce))
        stack.enter_context(patch.object(writing, "CHECKPOINT_BYTES", CHECKPOINT_BYTES))
        yield


# --- the mutations -----------------------------------------------------------------------------------


def _there(case: Case, pick: Pick) -> Path:
    """Return something that lies in the folder; if there is nothing, a file that is made for it."""
    names = sorted(path.name for path in case.folder.iterdir())
    if not names:
        (case.folder / STRAYS[0]).write_text("mine")
        names = [STRAYS[0]]
    return _path(case, names[pick(len(names))])


def _place(case: Case, pick: Pick) -> Path:
    """Return a path in the folder, whether something lies there or not: a name of this tool or a stray."""
    match pick(4):
        case 0:
            return _there(case, pick)
        case 1:
            return _path(case, STRAYS[pick(len(STRAYS))])
        case 2:
            journals = ("mla_tools.journal-00000.jsonl", "mla_tools.journal-00001.jsonl", CLEARING)
            return _path(case, journals[pick(len(journals))])
        case _:
            names = sorted(case.bench.ours)
            return _path(case, names[pick(len(names))])


def _path(case: Case, name: str) -> Path:
    case.done.append(name)
    return case.folder / name


def _clear(path: Path) -> None:
    """Remove whatever lies there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _put(path: Path, data: bytes) -> None:
    _clear(path)
    path.write_bytes(data)


def _regular(path: Path) -> bool:
    """Return whether a file may be changed in place: nobody else's, and of a size to be read."""
    status = path.lstat()
    return stat.S_ISREG(status.st_mode) and status.st_nlink == 1 and status.st_size < 1 << 20


def _flip(case: Case, pick: Pick) -> None:
    path = _there(case, pick)
    if _regular(path) and (data := bytearray(path.read_bytes())):
        for _ in range(1 + pick(3)):
            data[pick(len(data))] ^= 1 << pick(8)
        path.write_bytes(data)


def _cut(case: Case, pick: Pick) -> None:
    path = _there(case, pick)
    if _regular(path):
        os.truncate(path, pick(path.stat().st_size + 1))


def _extend(case: Case, pick: Pick) -> None:
    path = _there(case, pick)
    if _regular(path):
        tails = (b"\0", b"\n", b" ", b"{}", path.read_bytes(), b"\xff" * 100)
        with path.open("ab") as file:
            file.write(tails[pick(len(tails))])


def _remove(case: Case, pick: Pick) -> None:
    _clear(_there(case, pick))


def _rename(case: Case, pick: Pick) -> None:
    path, other = _there(case, pick), _place(case, pick)
    if path != other:
        _clear(other)
        path.rename(other)


def _duplicate(case: Case, pick: Pick) -> None:
    path, other = _there(case, pick), _place(case, pick)
    if path != other and _regular(path):
        _put(other, path.read_bytes())


def _stray(case: Case, pick: Pick) -> None:
    contents = (b"mine", b"", case.bench.wanted["model-00001-of-00002.safetensors"], b"{}", b"\n" * 5000)
    _put(_path(case, STRAYS[pick(len(STRAYS))]), contents[pick(len(contents))])


def _symlink(case: Case, pick: Pick) -> None:
    path = _place(case, pick)
    outside = ("victim.txt", "victim.jsonl", "folder", "to zero", "nothing", path.name)
    inside = (*sorted(case.bench.wanted)[:6], path.name, ".")
    targets = [*(case.outside / name for name in outside), *map(Path, inside), Path("/dev/null")]
    _clear(path)
    path.symlink_to(targets[pick(len(targets))])


def _hard_link(case: Case, pick: Pick) -> None:
    path = _place(case, pick)
    names = ("victim.txt", "victim.jsonl", path.name, RECORD)
    victim = case.outside / names[pick(len(names))]
    if victim.exists():
        _clear(path)
        path.hardlink_to(victim)


def _hard_link_inside(case: Case, pick: Pick) -> None:
    path, other = _there(case, pick), _place(case, pick)
    if path != other and path.is_file() and not path.is_symlink():
        _clear(other)
        other.hardlink_to(path)


def _pipe(case: Case, pick: Pick) -> None:
    path = _place(case, pick)
    _clear(path)
    if pick(4):
        os.mkfifo(path)
    else:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(str(path))


def _folder(case: Case, pick: Pick) -> None:
    path = _place(case, pick)
    _clear(path)
    path.mkdir()
    if pick(2):
        (path / "mine.txt").write_text("mine")


def _sparse(case: Case, pick: Pick) -> None:
    """Make a file of 20 GB: of zeros, or what was there with zeros after it."""
    path = _place(case, pick)
    if not (path.exists() and pick(2)) or not _regular(path):
        _put(path, b"")
    os.truncate(path, SPARSE)


def _plant(case: Case, pick: Pick) -> None:
    """Put a file of another folder, of this plan or another one, where it lay there or elsewhere."""
    states = sorted(case.bench.states)
    files = case.bench.states[states[pick(len(states))]]
    if files:
        name = sorted(files)[pick(len(files))]
        path = _path(case, name) if pick(3) else _place(case, pick)
        _put(path, files[name])


def _forge_record(case: Case, pick: Pick) -> None:
    """Put a record with a sound digest that says something else."""
    value = json.loads(case.bench.wanted[RECORD])
    if pick(6) == 0:
        shapes = ({"output": {"files": 5}, "files": {}}, {"output": {}, "files": []}, {}, {"format": 2})
        value = {"format": 2, **shapes[pick(len(shapes))]}
    for _ in range(pick(4)):
        _change(value, pick)
    if pick(12) == 0:
        entry = {"bytes": 1, "sha256": "0" * 64}
        value.setdefault("files", {})
        if isinstance(value["files"], dict):
            value["files"] |= {f"file {number}": entry for number in range(3000)}
    case.forged = True
    case.claimed |= _strings(value)
    with suppress(ValueError, RecursionError):  # not a number, nested too deeply: in no way a record
        _put(_path(case, RECORD), signed(value))


def _change(value: Any, pick: Pick) -> None:
    """Change a value inside of an object: delete it, replace it, or add a strange one."""
    holder: Any = value
    for _ in range(1 + pick(3)):
        inside = [item for item in (holder.values() if isinstance(holder, dict) else ()) if item]
        inside = [item for item in inside if isinstance(item, dict)]
        if not inside:
            break
        holder = inside[pick(len(inside))]
    keys = list(holder)
    key = keys[pick(len(keys))] if keys else "x"
    match pick(5):
        case 0:
            holder.pop(key, None)
        case 1:
            holder[key] = copy.deepcopy(VALUES[pick(len(VALUES))])
        case 2:
            holder[key] = copy.deepcopy(ENTRIES[pick(len(ENTRIES))])
        case 3:
            holder[NAMES[pick(len(NAMES))]] = copy.deepcopy(holder.get(key))
        case _:
            holder[NAMES[pick(len(NAMES))]] = copy.deepcopy(ENTRIES[pick(len(ENTRIES))])


def _strings(value: object) -> set[str]:
    """Return all texts in a value, its keys among them."""
    found, left = set[str](), [value]
    while left:
        item = left.pop()
        if isinstance(item, str):
            found.add(item)
        elif isinstance(item, dict):
            left += [*item, *item.values()]
        elif isinstance(item, list):
            left += item
    return found


def signed(value: dict[str, Any]) -> bytes:
    """Return a record with its own sha256."""
    rest = {key: item for key, item in value.items() if key != "sha256"}
    digest = hashlib.sha256(_pretty(rest)).hexdigest()
    return _pretty({**rest, "sha256": digest})


def _pretty(value: object) -> bytes:
    return (json.dumps(value, indent=4, allow_nan=False) + "\n").encode()


def line(value: object) -> bytes:
    """Return a line of a journal with its checksum."""
    text = json.dumps(value).encode()
    return hashlib.sha256(text).hexdigest()[:16].encode() + b" " + text + b"\n"


def _forge_journal(case: Case, pick: Pick) -> None:
    """Put a journal with sound checksums: strange lines, after a first one that is right or strange."""
    name = (CLEARING, "mla_tools.journal-00000.jsonl", "mla_tools.journal-00007.jsonl")[pick(3)]
    path = _path(case, name)
    begun = case.bench.begun
    own = path.read_bytes() if path.exists() and _regular(path) else begun
    lines = [LINES[pick(len(LINES))] for _ in range(1 + pick(3))]
    for value in lines:
        case.claimed |= _strings(value)
    _put(path, (b"", begun, own)[pick(3)] + b"".join(map(line, lines)))


def _mode(case: Case, pick: Pick) -> None:
    path = _there(case, pick)
    if not path.is_symlink() and _regular(path):
        path.chmod((0, 0o400, 0o777)[pick(3)])


MUTATIONS: tuple[Callable[[Case, Pick], None], ...] = (
    *(_flip, _cut, _extend, _remove, _rename, _duplicate, _stray, _symlink, _hard_link, _hard_link_inside),
    *(_pipe, _folder, _sparse, _plant, _forge_record, _forge_journal, _mode),
)  # fmt: skip
