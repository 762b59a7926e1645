"""Power cuts: an output that is resumed after one is right, and what is called done is on disk for good."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from forgetful import CUTS, FORGETS_ALL, Cut, Event, KilledError, Record, Tree, actual, key_of, rebuild
from tiny import TINY, computing_here, digests, planned, write_tiny

from mla_tools.errors import MlaToolsError
from mla_tools.execute import execute
from mla_tools.files.safetensors import layout
from mla_tools.files.writer import Writer
from mla_tools.output import INDEX
from mla_tools.output import writing as output_writing
from mla_tools.output.journal import CLEARING, parse_line
from mla_tools.plan import Plan, Workload
from mla_tools.plan import files as plan_files
from mla_tools.spec import DType, Spec
from mla_tools.verify import verify_output

# Two files, some lines of a journal, and no more, because each call makes a dozen states.
DIMS = {
    **TINY,
    "vocab_size": 8,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
}
SHARD_BYTES = 10_000
CHECKPOINT_BYTES = 4_000
ONE_THREAD = Workload(1, 1 << 20, 10**9)

# What is there before, and what is made.
OUT = "deep/er/out"


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_files, "SHARD_BYTES", SHARD_BYTES)
    monkeypatch.setattr(output_writing, "CHECKPOINT_BYTES", CHECKPOINT_BYTES)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sources") / "tiny"
    write_tiny(folder, DIMS)
    return folder


@pytest.fixture
def plan(source: Path) -> Plan:
    return planned(source)


@pytest.fixture
def other(source: Path) -> Plan:
    """Return the plan of what was there before."""
    return planned(source, dtype=DType.F32)


@pytest.fixture
def wanted(plan: Plan, tmp_path: Path) -> dict[str, str]:
    """Return what a conversion that nothing interrupts writes."""
    execute(plan, tmp_path / "wanted")
    made = digests(tmp_path / "wanted")
    assert len([name for name in made if name.endswith(".safetensors")]) == 2
    return made


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Return the folder on the disk that forgets."""
    folder = tmp_path / "disk"
    folder.mkdir()
    return folder


def convert(plan: Plan, out: Path, *, resume: bool = False, overwrite: bool = False) -> bool:
    return execute(plan, out, workload=ONE_THREAD, resume=resume, overwrite=overwrite)


def recorded(root: Path, *runs: Callable[[], object], ends_after: int = -1) -> tuple[Record, int]:
    """Record what runs do, the last but one killed after so many calls; return where the last began."""
    first = 0
    with pytest.MonkeyPatch.context() as patch:
        computing_here(patch)
        record = Record(root, patch)
        for number, run in enumerate(runs):
            record.ends_after = ends_after if number == len(runs) - 2 else -1
            first = len(record.events)
            try:
                run()
            except KilledError:
                assert number == len(runs) - 2
    return record, first


def digests_of(tree: Tree, folder: str = OUT) -> dict[str, str]:
    """Return the sha256 of each file in a folder of a tree."""
    return {
        path.rpartition("/")[2]: hashlib.sha256(data).hexdigest()
        for path, data in tree.items()
        if data is not None and path.rpartition("/")[0] == folder
    }


def without_journals(found: dict[str, str]) -> dict[str, str]:
    return {name: digest for name, digest in found.items() if ".journal-" not in name}


# What came of each state. Tests come to equal ones, as all of them convert the same model.
OUTCOMES: dict[str, str] = {}


class Cuts:
    """Resumes from all that a power cut leaves, each state once; counts the states by what came of them."""

    def __init__(self, root: Path, plan: Plan, wanted: dict[str, str], old: dict[str, str]) -> None:
        self._root, self._plan, self._wanted, self._old = root, plan, wanted, old
        self._keys: set[str] = set()

    def check(self, record: Record, first: int = 0, last: int | None = None) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "fsync", lambda fd: None)
            computing_here(patch)
            for text, tree in record.states(first, last):
                key = key_of(tree)
                self._keys.add(key)
                if key not in OUTCOMES:
                    self._root.mkdir()
                    rebuild(tree, self._root)
                    OUTCOMES[key] = self._check(text, self._root / OUT)
                    shutil.rmtree(self._root)

    def count(self, outcome: str) -> int:
        """Return how many states there were from which this came."""
        return sum(OUTCOMES[key] == outcome for key in self._keys)

    def _check(self, text: str, out: Path) -> str:
        """Resume, compare the bytes, and return what came of a state."""
        before = digests(out) if out.exists() else {}
        outcome = "resumed"
        if INDEX in before:
            # What has its final name is what a reader opens, whatever a journal says.
            assert without_journals(before) in (self._wanted, self._old), text
            if before in (self._wanted, self._old):
                verify_output(out)
                outcome = "complete"
        if refused := self._refusal(out):
            # Only what was there before is refused, as long as its removal is not on record.
            assert self._old, (text, refused)
            assert without_journals(before) == self._old, (text, refused)
            cleared = out / CLEARING
            assert not cleared.exists() or parse_line(cleared.read_bytes().rstrip(b"\n")) is None, text
            convert(self._plan, out, overwrite=True)
            outcome = "refused"
        assert digests(out) == self._wanted, text
        return outcome

    def _refusal(self, out: Path) -> str:
        """Resume, and return why that was refused."""
        try:
            convert(self._plan, out, resume=True)
        except MlaToolsError as error:
            return str(error)
        return ""


@pytest.fixture
def cuts(tmp_path: Path, plan: Plan, wanted: dict[str, str]) -> Cuts:
    return Cuts(tmp_path / "rebuilt", plan, wanted, {})


def assert_for_good(record: Record, wanted: dict[str, str], text: object = "") -> None:
    """Assert that no power cut takes anything from an output that was called done."""
    for cut in CUTS:
        assert digests_of(record.left(cut)) == wanted, (text, cut)


def test_a_new_output_survives_every_power_cut(
    root: Path, plan: Plan, wanted: dict[str, str], cuts: Cuts
) -> None:
    record, _ = recorded(root, lambda: convert(plan, root / OUT))
    assert digests(root / OUT) == wanted
    assert record.left(Cut("all", "all")) == actual(root)  # nothing was done that is not on record
    assert_for_good(record, wanted)
    cuts.check(record)
    assert cuts.count("resumed") > 100
    assert cuts.count("complete")
    assert not cuts.count("refused")


def test_an_output_that_replaces_another_survives_every_power_cut(
    root: Path, plan: Plan, other: Plan, wanted: dict[str, str], tmp_path: Path
) -> None:
    out = root / OUT
    convert(other, out)
    cuts = Cuts(tmp_path / "rebuilt", plan, wanted, digests(out))
    record, _ = recorded(root, lambda: convert(plan, out, overwrite=True))
    assert record.left(Cut("all", "all")) == actual(root)
    assert_for_good(record, wanted)
    cuts.check(record)
    assert cuts.count("resumed") > 100
    # As it was before, and while the line that says that it is removed is written: whole and in parts.
    assert cuts.count("refused") == 6


def kills(plan: Plan, root: Path, old: Plan | None = None) -> Iterator[tuple[Record, int]]:
    """Yield the record of a run that was killed after 0, 1, 2 … calls and then resumed, and where."""
    at, out = 0, root / OUT

    def finish() -> None:
        try:
            convert(plan, out, resume=True)
        except MlaToolsError:  # nothing was removed yet
            assert old is not None
            convert(plan, out, overwrite=True)

    while True:
        if old is not None:
            convert(old, out)
        record, first = recorded(root, lambda: convert(plan, out, overwrite=bool(old)), finish, ends_after=at)
        yield record, first
        if first < at:
            return
        shutil.rmtree(root / "deep")
        at += 1


def _says_what_is_not_synced(event: Event) -> bool:
    """Return whether a run that is killed after this leaves what the next one could rely on too early."""
    match event:
        case Event("mkdir", _, "out"):
            return True
        case Event("rename"):
            return event.name.startswith(("model-00001", "mla_tools.json", INDEX))
        case Event("write"):
            return b'"file":"' in event.data[:40]
    return False


def test_a_run_that_was_killed_and_resumed_is_on_disk_for_good(
    root: Path, plan: Plan, wanted: dict[str, str], cuts: Cuts
) -> None:
    """The system has what the killed process wrote, and the next one must not take that for synced."""
    for record, first in kills(plan, root):
        last = record.events[first - 1] if first else Event("sync", -1)
        assert_for_good(record, wanted, (first, last.call, last.name))
        if _says_what_is_not_synced(last):
            cuts.check(record, first)
    assert cuts.count("resumed") > 100
    assert not cuts.count("refused")


def test_a_run_that_was_killed_while_it_replaced_another_is_on_disk_for_good(
    root: Path, plan: Plan, other: Plan, wanted: dict[str, str], tmp_path: Path
) -> None:
    convert(other, root / OUT)
    cuts = Cuts(tmp_path / "rebuilt", plan, wanted, digests(root / OUT))
    shutil.rmtree(root / "deep")
    for record, first in kills(plan, root, other):
        calls = [event.call for event in record.events]
        begins = calls.index("truncate")  # the old output is gone, and what comes now is as for a new one
        if first > begins:
            break
        assert_for_good(record, wanted, first)
        cuts.check(record, first, begins)
    assert cuts.count("resumed") > 50
    assert cuts.count("refused") == 6


def test_a_file_with_its_final_name_is_whole_after_every_power_cut(root: Path, tmp_path: Path) -> None:
    tensors = {"a": Spec((4,), DType.F32), "b": Spec((2,), DType.F32)}

    def write() -> None:
        with Writer(root / "x.safetensors", layout(tensors, {})) as writer:
            writer.write("b", 0, b"b" * 8)
            writer.write("a", 0, b"a" * 16)
            writer.finish()

    record, _ = recorded(root, write)
    whole = (root / "x.safetensors").read_bytes()
    assert all(tree.get("x.safetensors", whole) == whole for _, tree in record.states())
    assert record.left(FORGETS_ALL) == {"x.safetensors": whole}
