"""Damaged and hostile safetensors headers: each is refused with a sentence, and nothing else happens."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import safetensors
from attacks.hostile import entry, packed, sound, table
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mla_tools.errors import CheckpointError
from mla_tools.files.safetensors import read_header

GOOD = entry("U8", [4], [0, 4])
FOUR = bytes(4)

CASES = {
    "empty file": (b"", ["model.safetensors: is too short to be a safetensors file", "found   0 bytes"]),
    "seven bytes": (bytes(7), ["is too short", "found   7 bytes"]),
    "zeros": (bytes(64), ["does not start with the length of a header", "found   0 (the file starts with"]),
    "git lfs pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
        ["is a Git LFS pointer, not the weights", "git lfs pull"],
    ),
    "web page": (
        b"<!DOCTYPE html><html></html>",
        ["does not start with the length of a header", "<!DOCTYPE"],
    ),
    "length of 2^63": (packed(b"{}", length=1 << 63), ["a length from 2 to 100,000,000", "9,223,372,036,8"]),
    "length of 2^64 - 1": (packed(b"{}", length=(1 << 64) - 1), ["a length from 2 to 100,000,000"]),
    "length over 100 MB": (packed(b"{}", length=100_000_001), ["found   100,000,001"]),
    "length over the end": (
        packed(b"{}", length=3),
        ["truncated inside its header: 1 bytes of it are missing"],
    ),
    "not UTF-8": (packed(b'{"\xff":1}'), ["its header is not UTF-8 text (byte 2)"]),
    "not JSON": (packed(b'{"a":}'), ["its header is not JSON: Expecting value"]),
    "not an object": (packed(b"[1,2]"), ["its header does not start with '{'"]),
    "two objects": (packed(b"{}{}"), ["its header is not JSON: Extra data"]),
    "deep lists": (packed(b'{"a":' + b"[" * 200_000), ["its header is nested too deeply"]),
    "deep objects": (packed(b'{"a":' * 200_000), ["its header is nested too deeply"]),
    "deep and closed": (
        packed(b'{"a":' + b"[" * 500 + b"]" * 500 + b"}"),
        ["does not describe a tensor", "[[["],
    ),
    "number of 5000 digits": (packed(b'{"a":' + b"9" * 5000 + b"}"), ["its header is not JSON: Exceeds"]),
    "tensor twice": (
        packed(b'{"a":%b,"a":%b}' % ((json.dumps(GOOD).encode(),) * 2), FOUR),
        ["the header has a duplicate key: a"],
    ),
    "dtype twice": (
        packed(b'{"a":{"dtype":"U8","dtype":"U8","shape":[4],"data_offsets":[0,4]}}', FOUR),
        ["the header has a duplicate key: dtype"],
    ),
    "entry a list": (table({"a": [1]}), ["a: its header entry does not describe a tensor", "found   [1]"]),
    "entry null": (table({"a": None}), ["a: its header entry does not describe a tensor"]),
    "key missing": (table({"a": {"dtype": "U8", "shape": []}}), ["found   ['dtype', 'shape']"]),
    "key too many": (table({"a": GOOD | {"x": 1}}, FOUR), ["a: its header entry does not describe a tensor"]),
    "dtype unknown": (table({"a": entry("F4", [8], [0, 4])}, FOUR), ["a: the dtype is unknown", "'F4'"]),
    "dtype a list": (table({"a": entry(["U8"], [4], [0, 4])}, FOUR), ["a: the dtype is unknown", "['U8']"]),
    "dtype strange": (
        table({"a": entry("\x1b[2J\ud800" * 50, [4], [0, 4])}, FOUR),
        ["a: the dtype is unknown", "\\x1b[2J\\ud800", "..."],
    ),
    "shape a number": (table({"a": entry("U8", 4, [0, 4])}, FOUR), ["the shape is not valid", "found   4"]),
    "shape with true": (
        table({"a": entry("U8", [4, True], [0, 4])}, FOUR),
        ["the shape is not valid", "True"],
    ),
    "shape with true after 1": (
        table({"a": entry("U8", [1], [0, 1]), "b": entry("U8", [True], [1, 2])}, bytes(2)),
        ["b: the shape is not valid"],
    ),
    "shape with a float": (table({"a": entry("U8", [4.0], [0, 4])}, FOUR), ["the shape is not valid", "4.0"]),
    "shape with NaN": (
        packed(b'{"a":{"dtype":"U8","shape":[NaN],"data_offsets":[0,0]}}'),
        ["its header is not JSON: it holds NaN, and JSON has no such number"],
    ),
    "shape of 1e999": (
        packed(b'{"a":{"dtype":"U8","shape":[1e999],"data_offsets":[0,0]}}'),
        ["its header holds the number 1e999, which is read as infinity"],
    ),
    "shape negative": (table({"a": entry("U8", [-2, -2], [0, 4])}, FOUR), ["the shape is not valid", "-2"]),
    "shape of many axes": (table({"a": entry("U8", [1] * 65, [0, 1])}, b"\0"), ["at most 64 axes"]),
    "shape of 2^64": (table({"a": entry("U8", [1 << 64], [0, 4])}, FOUR), ["each from 0 to 2^63 - 1"]),
    "product wraps to the size": (
        table({"a": entry("U8", [1 << 32, 1 << 32], [0, 0])}),
        ["a: the number of bytes does not fit", "about 2^64 bytes for U8", "found   0"],
    ),
    "product of 64 huge axes": (
        table({"a": entry("U8", [(1 << 63) - 1] * 64, [0, 4])}, FOUR),
        ["does not fit the shape and the dtype", "about 2^4031 bytes"],
    ),
    "offsets a number": (table({"a": entry("U8", [4], 4)}, FOUR), ["a: data_offsets is not a range"]),
    "offsets of three": (table({"a": entry("U8", [4], [0, 2, 4])}, FOUR), ["data_offsets is not a range"]),
    "offsets of bools": (
        table({"a": entry("U8", [1], [False, True])}, b"\0"),
        ["data_offsets is not a range"],
    ),
    "offsets negative": (table({"a": entry("U8", [4], [-4, 0])}), ["data_offsets is not a range", "[-4, 0]"]),
    "offsets backwards": (table({"a": entry("U8", [4], [4, 0])}, FOUR), ["data_offsets is not a range"]),
    "offsets of 4000 digits": (
        packed(b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,' + b"9" * 4000 + b"]}}"),
        ["data_offsets is not a range", "999..."],
    ),
    "range too short": (
        table({"a": entry("BF16", [2, 4], [0, 15])}, bytes(15)),
        ["does not fit the shape and the dtype", "needed  16 bytes for BF16 [2, 4]", "found   15"],
    ),
    "overlap": (
        table({"a": GOOD, "b": entry("U8", [4], [2, 6])}, bytes(6)),
        ["b: the bytes overlap those of a", "It is stored in model.safetensors."],
    ),
    "same place": (table({"a": GOOD, "b": GOOD}, FOUR), ["b: the bytes overlap those of a"]),
    "inside another": (
        table({"a": entry("U8", [8], [0, 8]), "b": entry("U8", [2], [2, 4])}, bytes(8)),
        ["b: the bytes overlap those of a"],
    ),
    "gap": (
        table({"a": GOOD, "b": entry("U8", [4], [6, 10])}, bytes(10)),
        ["model.safetensors: 2 bytes after a belong to no tensor"],
    ),
    "not at the start": (
        table({"a": entry("U8", [4], [1, 5])}, bytes(5)),
        ["1 bytes at the start of the data belong to no tensor"],
    ),
    "truncated": (
        table({"a": entry("U8", [4000], [0, 4000])}, bytes(1500)),
        [
            "is truncated: 2,500 bytes are missing at the end",
            "needed  4,000 bytes of data",
            "Download the file",
        ],
    ),
    "longer": (
        table({"a": GOOD}, bytes(7)),
        ["is longer than its tensors: 3 bytes at the end belong to none"],
    ),
    "data without tensors": (packed(b"{}", b"x"), ["1 bytes at the end belong to none"]),
    "name empty": (table({"": GOOD}, FOUR), ["'': the name of a tensor is empty"]),
    "name with NUL": (table({"a\0b": GOOD}, FOUR), [r"'a\x00b': the name of a tensor contains", r"'\x00'"]),
    "name with escapes": (table({"a\x1b[2J": GOOD}, FOUR), [r"'a\x1b[2J': the name of a tensor contains"]),
    "name not Unicode": (table({"a\ud800": GOOD}, FOUR), [r"'a\ud800': the name of a tensor contains"]),
    "name too long": (
        table({"n" * 4097: GOOD}, FOUR),
        ["has more than 4096 characters", "(4,097 characters)"],
    ),
    "metadata a list": (table({"__metadata__": [1]}), ["__metadata__ is not an object of strings"]),
    "metadata of numbers": (table({"__metadata__": {"a": 1}}), ["is not an object of strings", "{'a': 1}"]),
    "metadata not Unicode": (table({"__metadata__": {"a": "\ud800"}}), ["is not an object of strings"]),
}


@pytest.mark.parametrize(("data", "texts"), CASES.values(), ids=CASES.keys())
def test_a_bad_header_is_refused_with_its_reason(tmp_path: Path, data: bytes, texts: list[str]) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    message = str(caught.value)
    for text in texts:
        assert text in message
    assert "model.safetensors" in message
    assert all(line.isprintable() for line in message.split("\n"))
    assert len(message) < 5000


def test_all_problems_of_a_file_are_reported_at_once(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    header = {
        "__metadata__": 3,
        "a": entry("F4", [8], [0, 4]),
        "b": entry("U8", [True], [4, 8]),
        "c": entry("U8", [3], [8, 12]),
        "d": entry("U8", [4], [14, 18]),
    }
    path.write_bytes(table(header, bytes(17)))
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    assert [(problem.subject, problem.what) for problem in caught.value.problems] == [
        ("a", "the dtype is unknown"),
        ("b", "the shape is not valid"),
        ("c", "the number of bytes does not fit the shape and the dtype"),
        ("model.safetensors", "2 bytes after c belong to no tensor"),
        ("model.safetensors", "is truncated: 1 bytes are missing at the end"),
        ("model.safetensors", "__metadata__ is not an object of strings"),
    ]


def test_what_lies_between_tensors_says_nothing_when_one_has_no_place(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(table({"a": entry("U8", [4], "?"), "b": entry("U8", [4], [4, 8])}, bytes(8)))
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    assert [problem.what for problem in caught.value.problems] == ["data_offsets is not a range"]


def test_the_list_of_problems_is_bounded(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(table({f"t.{i}": 0 for i in range(10_005)}))
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    assert len(caught.value.problems) == 10_001
    assert caught.value.problems[-1].what == "has 5 more problems"


def test_what_is_no_regular_file_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "gone").symlink_to("nowhere")
    for name, text in {
        "pipe": "pipe: is not a regular file\n  found   a pipe or a device",
        "": "is not a regular file\n  found   a folder",
        "loop": "loop: cannot be read\n  found   Too many levels of symbolic links",
        "gone": "gone: is not there",
        "none": "none: is not there",
        "a\0b": r"'a\x00b': cannot be read",
        "n" * 300: "cannot be read\n  found   File name too long",
    }.items():
        with pytest.raises(CheckpointError) as caught:
            read_header(tmp_path / name)
        assert text in str(caught.value)


def test_odd_but_sound_files_are_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(packed(b"{}    "))
    assert read_header(path).entries == {}
    header = {
        "scalar": entry("U8", [], [0, 1]),
        "empty": entry("F32", [0, 3], [1, 1]),
        "empty and vast": entry("F32", [1 << 40, 1 << 40, 0], [1, 1]),
        "名前.ü": entry("U8", [2], [1, 3]),
    }
    path.write_bytes(table(header, bytes(3)))
    read = read_header(path)
    start = path.stat().st_size - 3
    assert {name: item.offset - start for name, item in read.entries.items()} == {
        "scalar": 0,
        "empty": 1,
        "empty and vast": 1,
        "名前.ü": 1,
    }


SOUND = sound(
    {"a.0.weight": ("BF16", [2, 4]), "a.1.weight": ("F32", [3]), "b": ("U8", [])}, metadata={"format": "pt"}
)


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """Return a sound file after a few cuts, insertions and replacements."""
    data = bytearray(SOUND)
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(data)))
        stop = draw(st.integers(start, min(start + 6, len(data))))
        tokens = st.sampled_from(
            [b'"', b"[", b"]", b"{", b"}", b",", b"-", b"1e9", b"true", b"null", b'"b":']
        )
        data[start:stop] = draw(tokens | st.binary(max_size=6))
    if draw(st.booleans()):  # keep the first 8 bytes in step, so that the JSON is reached
        end = data.rfind(b"}") + 1
        data[:8] = max(end - 8, 0).to_bytes(8, "little")
    return bytes(data)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=8,
)
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["U8", "BF16", "F4", "F64"]) | JSON,
        "shape": st.lists(st.integers(0, 4), max_size=3) | st.lists(JSON, max_size=3) | JSON,
        "data_offsets": st.lists(st.integers(0, 40), min_size=2, max_size=2).map(sorted) | JSON,
    }
)
TABLES = st.dictionaries(st.text(max_size=6) | st.just("__metadata__"), ENTRIES | JSON, max_size=4)


@given(st.binary(max_size=200) | mutated() | st.builds(table, TABLES, st.binary(max_size=40)))
@example(SOUND)
@settings(deadline=None)
def test_any_bytes_are_read_or_refused(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    path.write_bytes(data)
    try:
        header = read_header(path)
    except CheckpointError as error:
        str(error).encode()  # raises for a message that cannot be printed
        return
    spans = sorted((item.offset, item.offset + item.spec.nbytes) for item in header.entries.values())
    start = 8 + int.from_bytes(data[:8], "little")
    assert [start, *(end for _, end in spans)] == [*(begin for begin, _ in spans), len(data)]
    # Whatever is read here, the library opens too.
    assert {name for name, _ in safetensors.deserialize(data)} == set(header.entries)
