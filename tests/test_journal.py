"""What is resumed is what was begun, and a journal or a file that was damaged never makes a wrong output."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny import JOURNALS, SHARD_BYTES, begun, computing_here, digests, lines_of, planned, write_tiny

from mla_tools.errors import MlaToolsError
from mla_tools.execute import execute
from mla_tools.files.parsing import parse_object
from mla_tools.output import writing as output_writing
from mla_tools.output.journal import line_of
from mla_tools.output.record import sha256_hex
from mla_tools.plan import OutputFile, Plan
from mla_tools.plan import files as plan_files
from mla_tools.spec import DType
from mla_tools.verify import verify_output

# Of what is written when the run is interrupted: the first file is sealed then, and the others begun.
SHARE = 0.8
SEALED, BEGUN, LAST = (f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3))
JOURNAL = JOURNALS.replace("*", "00000")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_files, "SHARD_BYTES", SHARD_BYTES)
    monkeypatch.setattr(output_writing, "CHECKPOINT_BYTES", 1)
    monkeypatch.setattr("os.fsync", lambda fd: None)
    computing_here(monkeypatch)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sources") / "tiny"
    write_tiny(folder)
    return folder


@pytest.fixture
def plan(source: Path) -> Plan:
    return planned(source)


@pytest.fixture
def wanted(plan: Plan, tmp_path: Path) -> dict[str, str]:
    execute(plan, tmp_path / "wanted")
    return digests(tmp_path / "wanted")


@pytest.fixture
def unfinished(plan: Plan, tmp_path: Path) -> Path:
    out = tmp_path / "unfinished"
    lines = lines_of(begun(plan, out, SHARE))
    assert [line["file"] for line in lines if "file" in line] == [SEALED]
    assert _done_in(plan, lines, plan.files[1])
    return out


def _done_in(plan: Plan, lines: list[dict[str, Any]], file: OutputFile) -> list[str]:
    """Return the stored tensors of a file that a journal calls done, in the order of the file."""
    targets = [target for step in plan.steps for target in step.targets]
    done = {
        name
        for line in lines
        for number, _ in line.get("done", ())
        for name in targets[number].parts.values()
    }
    return [name for name in file.layout.offsets if name in done]


class Resumed:
    """Resumes copies of an unfinished folder, each with its damage."""

    def __init__(self, unfinished: Path, plan: Plan, wanted: dict[str, str]) -> None:
        self._unfinished, self._plan, self._wanted = unfinished, plan, wanted

    def __call__(self, damage: Callable[[Path], object]) -> str:
        """Return "" for the same bytes, or why it was refused, which leaves the folder unfinished."""
        out = self._unfinished.with_name("out")
        shutil.copytree(self._unfinished, out)
        try:
            damage(out)
            try:
                execute(self._plan, out, resume=True)
            except MlaToolsError as error:
                assert not [path for path in out.iterdir() if path.suffix in (".safetensors", ".json")]
                execute(self._plan, out, overwrite=True)
                assert digests(out) == self._wanted
                return str(error).replace(str(out), "OUT")
            assert digests(out) == self._wanted
            verify_output(out)
            return ""
        finally:
            shutil.rmtree(out)


@pytest.fixture
def resumed(unfinished: Path, plan: Plan, wanted: dict[str, str]) -> Resumed:
    return Resumed(unfinished, plan, wanted)


def changed(path: Path, at: int, data: bytes) -> None:
    before = path.read_bytes()
    path.write_bytes(before[:at] + data + before[at + len(data) :])


# --- what was begun ------------------------------------------------------------------------------------


def test_a_number_of_the_sources_config_that_changed_is_named(
    source: Path, wanted: dict[str, str], tmp_path: Path
) -> None:
    copy, out = tmp_path / source.name, tmp_path / "out"
    shutil.copytree(source, copy)
    begun(planned(copy), out)
    before = digests(out)
    config = json.loads((copy / "config.json").read_text())
    for theta in (config["rope_theta"] + 1, config["rope_theta"]):
        (copy / "config.json").write_text(json.dumps({**config, "rope_theta": theta}))
        if theta == config["rope_theta"]:  # as it was, but for spaces
            execute(planned(copy), out, resume=True)
            assert digests(out) == wanted
            return
        with pytest.raises(MlaToolsError) as caught:
            execute(planned(copy), out, resume=True)
        first, *lines, _ = str(caught.value).splitlines()
        assert first == f"{out} was begun with another plan, so it cannot be resumed:"
        assert [line.partition(":")[0].strip() for line in lines] == [
            "source.config_sha256",
            "output.config_sha256",
        ]
        assert digests(out) == before


def test_another_config_for_the_same_input_is_named(unfinished: Path, plan: Plan) -> None:
    before = digests(unfinished)
    with pytest.raises(MlaToolsError) as caught:
        execute(replace(plan, config={**plan.config, "new_key": 1}), unfinished, resume=True)
    first, line, _ = str(caught.value).splitlines()
    assert first == f"{unfinished} was begun with another plan, so it cannot be resumed:"
    assert line.startswith("  output.config_sha256: was '")
    assert digests(unfinished) == before


# --- damage --------------------------------------------------------------------------------------------


def test_a_digit_of_any_line_that_changed_makes_no_other_output(unfinished: Path, resumed: Resumed) -> None:
    whole = (unfinished / JOURNAL).read_bytes()
    at, places = 0, []
    for line in whole.splitlines(keepends=True):
        digits = [match.start() for match in re.finditer(rb"[0-9]", line)]
        places += [at + digits[0], at + digits[len(digits) // 2], at + digits[-1]]
        at += len(line)
    assert len(places) > 30
    for place in places:
        digit = b"%d" % ((whole[place] - ord("0") + 1) % 10)
        assert resumed(lambda out, at=place, digit=digit: changed(out / JOURNAL, at, digit)) == "", place


def test_bytes_that_changed_in_a_file_are_refused_where_a_journal_calls_them_done(
    plan: Plan, unfinished: Path, resumed: Resumed
) -> None:
    lines = lines_of(unfinished / JOURNAL)
    for file, sentence in (
        (plan.files[0], "its bytes have changed"),
        (plan.files[1], "have changed since they were written"),
    ):
        partial, offsets = f"{file.name}.partial", file.layout.offsets
        done = _done_in(plan, lines, file)
        for name in (done[0], done[-1]):
            said = resumed(lambda out, at=offsets[name], p=partial: changed(out / p, at, b"\x55" * 16))
            assert said.startswith(f"OUT/{partial} is damaged: "), name
            assert sentence in said
    for file in plan.files[1:]:
        todo = file.layout.offsets.keys() - set(_done_in(plan, lines, file))
        assert todo
        for name in todo:  # is written again, whatever is there
            at, partial = file.layout.offsets[name], f"{file.name}.partial"
            assert resumed(lambda out, at=at, p=partial: changed(out / p, at, b"\x55" * 16)) == "", name


def edited(change: Callable[[list[bytes]], list[bytes]]) -> Callable[[Path], object]:
    def damage(out: Path) -> None:
        journal = out / JOURNAL
        journal.write_bytes(b"".join(change(journal.read_bytes().splitlines(keepends=True))))

    return damage


def test_lines_that_are_gone_or_twice_or_elsewhere_make_no_other_output(
    unfinished: Path, resumed: Resumed
) -> None:
    count = len((unfinished / JOURNAL).read_bytes().splitlines())
    for n in range(count):
        assert resumed(edited(lambda lines, n=n: lines[:n] + lines[n + 1 :])) == "", n
        assert resumed(edited(lambda lines, n=n: lines[: n + 1] + lines[n:])) == "", n
        assert resumed(edited(lambda lines, n=n: lines + [lines[n]])) == "", n
        swapped = edited(lambda lines, n=n: lines[:n] + lines[n : n + 2][::-1] + lines[n + 2 :])
        assert resumed(swapped) == "", n


OTHERS: dict[str, tuple[dict[str, Any], bool]] = {
    "other weights": ({}, True),  # of the same names and sizes, and so they are compared
    "another dtype": ({"dtype": DType.F32}, False),
}


@pytest.mark.parametrize(("options", "compared"), OTHERS.values(), ids=OTHERS)
def test_a_line_of_the_journal_of_another_output_makes_no_other_output(
    options: dict[str, Any],
    compared: bool,
    source: Path,
    plan: Plan,
    unfinished: Path,
    resumed: Resumed,
    tmp_path: Path,
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(source, copy)
    if not options:
        for path in copy.glob("*.safetensors"):
            data = path.read_bytes()
            start = 8 + int.from_bytes(data[:8], "little")
            path.write_bytes(data[:start] + bytes(byte ^ 1 for byte in data[start:]))
    other = begun(planned(copy, **options), tmp_path / "other", 0.9).read_bytes().splitlines(keepends=True)
    said = [resumed(edited(lambda lines, line=line: [*lines, line])) for line in other]
    refused = [text for text in said if text]
    assert all("OUT/model-0000" in text and "start again with --overwrite" in text for text in refused)
    assert bool(refused) == compared
    assert said[0] == ""  # where no first line is expected, it says nothing


# --- sound lines that say what no run writes -------------------------------------------------------------

HUGE = 10**30


def shapes(n: int, size: int) -> dict[str, Any]:
    """Return lines that no run writes, about a target that is not done, with one tensor of this size."""
    return {
        "no entry": {"done": [1]},
        "no list": {"done": 1},
        "nothing": {"done": []},
        "null": {"done": None},
        "an object": {"done": {"0": []}},
        "backwards": {"done": [[n, [[[5, 1, 2]]]]]},
        "empty range": {"done": [[n, [[[0, 0, 0]]]]]},
        "no ranges": {"done": [[n, [[]]]]},
        "no tensors": {"done": [[n, []]]},
        "a tensor too many": {"done": [[n, [[[0, size, 2]], [[0, size, 2]]]]]},
        "there and back": {"done": [[n, [[[0, 5, 2], [5, -10, 2], [-10, size, 2]]]]]},
        "empty in between": {"done": [[n, [[[0, 5, 2], [5, 5, 2], [5, size, 2]]]]]},
        "with a gap": {"done": [[n, [[[0, 5, 2], [6, size, 2]]]]]},
        "too short": {"done": [[n, [[[0, size - 1, 2]]]]]},
        "text for a number": {"done": [[str(n), [[[0, size, 2]]]]]},
        "null for a number": {"done": [[None, [[[0, size, 2]]]]]},
        "a list for a number": {"done": [[[n], [[[0, size, 2]]]]]},
        "two of a range": {"done": [[n, [[[0, 1]]]]]},
        "four of a range": {"done": [[n, [[[0, 1, 2, 3]]]]]},
        "three of an entry": {"done": [[n, [[[0, size, 2]]], 5]]},
        "no numbers": {"done": [["0", [[["0", "1", "2"]]]]]},
        "fractions": {"done": [[float(n), [[[0.0, 1.0, 2.0]]]]]},
        "truth": {"done": [[True, [[[False, True, True]]]]]},
        "negative": {"done": [[-1, [[[-5, -1, -2]]]]]},
        "negative target": {"done": [[-1, [[[0, 5, 2]]]]]},
        "negative start": {"done": [[n, [[[-5, 5, 2]]]]]},
        "huge target": {"done": [[HUGE, [[[0, 5, 2]]]]]},
        "huge range": {"done": [[n, [[[0, HUGE, 2]]]]]},
        "huge start": {"done": [[n, [[[HUGE, HUGE + 1, 2]]]]]},
        "a number too many": {"done": [[10**6, [[[0, 5, 2]]]]]},
        "file is a number": {"file": 5},
        "file without sha256": {"file": SEALED},
        "sha256 is a number": {"file": SEALED, "sha256": 5},
        "no such file": {"file": "../x", "sha256": "0" * 64},
        "file is null": {"file": None, "sha256": None},
        "a list": {"file": [SEALED], "sha256": ["0" * 64]},
        "unknown": {"what": {"is": ["this"]}},
    }


# These say that something is done which the file contradicts.
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "sha256 of a sealed file": ({"file": SEALED, "sha256": "0" * 64}, f"OUT/{SEALED}.partial is damaged"),
    "no sha256": ({"file": SEALED, "sha256": ""}, f"OUT/{SEALED}.partial is damaged"),
    "a file that is begun": ({"file": BEGUN, "sha256": "0" * 64}, f"OUT/{BEGUN}.partial is damaged"),
    "the last file": ({"file": LAST, "sha256": "0" * 64}, f"OUT/{LAST}.partial is damaged"),
}


@pytest.mark.parametrize("case", shapes(0, 1))
def test_a_sound_line_of_another_shape_says_nothing(
    case: str, plan: Plan, unfinished: Path, resumed: Resumed
) -> None:
    done = _done_in(plan, lines_of(unfinished / JOURNAL), plan.files[1])
    todo = next(name for name in plan.files[1].layout.offsets if name not in done)
    targets = [target for step in plan.steps for target in step.targets]
    ((number, target),) = [(n, target) for n, target in enumerate(targets) if todo in target.stored()]
    line = line_of(shapes(number, target.stored()[todo].nbytes)[case])
    assert parse_object(line.partition(b" ")[2])
    assert resumed(edited(lambda lines: [*lines, line])) == ""
    assert resumed(edited(lambda lines: [lines[0], line, *lines[1:]])) == ""
    # As the first line it is one that no conversion begins with.
    assert resumed(edited(lambda lines: [line, *lines])) == ""
    said = resumed(lambda out: (out / JOURNALS.replace("*", "00001")).write_bytes(line))
    assert said == ""


RAW = {
    "deep": b'{"done":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "digits": b'{"done":[[' + b"9" * 100_000 + b",[[[0,5,2]]]]]}",
    "no JSON": b"{]",
    "infinite": b'{"done":[[Infinity,[[[NaN,1e999,2]]]]]}',
    "twice": b'{"file":"x","file":5}',
    "no text": b'{"file":"\xff"}',
}


@pytest.mark.parametrize("case", RAW)
def test_a_sound_line_that_is_no_json_to_speak_of_says_nothing(case: str, resumed: Resumed) -> None:
    line = sha256_hex(RAW[case])[:16].encode() + b" " + RAW[case] + b"\n"
    assert resumed(edited(lambda lines: [*lines, line])) == ""
    assert resumed(edited(lambda lines: [line, *lines])) == ""


@pytest.mark.parametrize("case", WRONG)
def test_a_sound_line_that_a_file_contradicts_is_refused(case: str, resumed: Resumed) -> None:
    value, sentence = WRONG[case]
    assert resumed(edited(lambda lines: [*lines, line_of(value)])).startswith(sentence)


def test_numbers_of_a_range_that_a_file_contradicts_are_refused(
    plan: Plan, unfinished: Path, resumed: Resumed
) -> None:
    targets = [target for step in plan.steps for target in step.targets]
    of = {name: number for number, target in enumerate(targets) for name in target.parts.values()}
    offsets = plan.files[1].layout.offsets
    done = _done_in(plan, lines_of(unfinished / JOURNAL), plan.files[1])
    for name in (done[0], next(name for name in offsets if name not in done)):
        (spec,) = targets[of[name]].stored().values()
        for checksum in (0, -1, True, HUGE):
            line = line_of({"done": [[of[name], [[[0, spec.nbytes, checksum]]]]]})
            said = resumed(edited(lambda lines, line=line: [*lines, line]))
            assert said.startswith(f"OUT/{BEGUN}.partial is damaged: bytes 0 to {spec.nbytes:,} of {name}")


FIRST: dict[str, Any] = {
    "provenance is a number": {"provenance": 5},
    "provenance is empty": {"provenance": {}},
    "output is a number": {"provenance": {"output": 5}},
    "files are numbers": {"provenance": {"output": {"files": [1, HUGE, True, None]}}},
    "files lie elsewhere": {"provenance": {"output": {"files": ["../x", "/etc/x", ""]}}},
    "seen is a number": {"provenance": {}, "seen": 5, "host": 5},
}


@pytest.mark.parametrize("case", FIRST)
def test_a_first_line_of_another_shape_is_another_plan(case: str, resumed: Resumed) -> None:
    line = line_of(FIRST[case])
    said = resumed(edited(lambda lines: [line, *lines[1:]]))
    assert said.startswith("OUT was begun with another plan, so it cannot be resumed:\n")
