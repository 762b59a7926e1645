"""Layout, Writer, read_header and Reader against one another, the safetensors library and mx.load."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import resource
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise, permutations
from pathlib import Path

import ml_dtypes
import mlx.core as mx
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from mla_tools.errors import CheckpointError, MlaToolsError
from mla_tools.files.parsing import parse_object
from mla_tools.files.place import LocalFile, shown
from mla_tools.files.reader import Reader
from mla_tools.files.safetensors import Layout, layout, read_header
from mla_tools.files.writer import Writer
from mla_tools.spec import DType, Spec

NAMES = st.text(st.characters(exclude_categories=["Cc", "Cs"]), min_size=1, max_size=12).filter(
    lambda name: name != "__metadata__"
)
SPECS = st.builds(Spec, st.lists(st.integers(0, 5), max_size=4).map(tuple), st.sampled_from(DType))
METADATA = st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), st.text('a{"é\n'), max_size=3)


def content(tensors: dict[str, Spec], seed: int = 0) -> dict[str, bytes]:
    """Return random bytes for each tensor; a BOOL gets zeros and ones."""
    rng = np.random.default_rng(seed)
    tops = {name: 2 if spec.dtype is DType.BOOL else 256 for name, spec in tensors.items()}
    return {
        name: rng.integers(0, tops[name], spec.nbytes, np.uint8).tobytes() for name, spec in tensors.items()
    }


def written(path: Path, tensors: dict[str, Spec], metadata: dict[str, str]) -> dict[str, bytes]:
    """Write a file of random content in one go and return the content."""
    data = content(tensors)
    with Writer(path, layout(tensors, metadata)) as writer:
        for name, value in data.items():
            writer.write(name, 0, value)
        writer.finish()
    return data


@given(st.dictionaries(NAMES, SPECS, max_size=6), METADATA)
@settings(deadline=None)
def test_a_written_file_reads_back_and_the_library_agrees(
    tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, Spec], metadata: dict[str, str]
) -> None:
    path = tmp_path_factory.getbasetemp() / "round.safetensors"
    path.unlink(missing_ok=True)
    data = written(path, tensors, metadata)
    header = read_header(path)
    assert {name: entry.spec for name, entry in header.entries.items()} == tensors
    assert header.metadata == metadata
    assert header.size == path.stat().st_size
    with Reader() as reader:
        for name, entry in header.entries.items():
            assert entry.offset % entry.spec.dtype.nbytes == 0
            assert reader.read(path, entry.offset, entry.spec.nbytes).tobytes() == data[name]
    theirs = dict(safetensors.deserialize(path.read_bytes()))
    assert {name: bytes(item["data"]) for name, item in theirs.items()} == data
    assert {name: (tuple(item["shape"]), item["dtype"]) for name, item in theirs.items()} == {
        name: (spec.shape, spec.dtype.name) for name, spec in tensors.items()
    }
    with safetensors.safe_open(path, "np") as file:
        assert (file.metadata() or {}) == metadata


@given(st.permutations([("b", "F32"), ("a", "U8"), ("c", "I64"), ("aa", "F32"), ("d", "BF16")]))
def test_the_order_of_the_input_does_not_change_the_layout(order: list[tuple[str, str]]) -> None:
    def of(names: list[tuple[str, str]], metadata: dict[str, str]) -> Layout:
        return layout({name: Spec((3,), DType[dtype]) for name, dtype in names}, metadata)

    made = of(order, {"x": "1", "a": "2"})
    assert made == of(sorted(order), {"a": "2", "x": "1"})
    text = made.header[8:]
    assert len(made.header) % 8 == 0
    assert text.startswith(
        b'{"__metadata__":{"a":"2","x":"1"},"c":{"dtype":"I64","shape":[3],"data_offsets":[0,24]}'
    )
    assert list(json.loads(text)) == ["__metadata__", "c", "aa", "b", "d", "a"]
    assert made.size == len(made.header) + 24 + 12 + 12 + 6 + 3


NUMPY = {
    DType.F64: np.float64,
    DType.F32: np.float32,
    DType.F16: np.float16,
    DType.BF16: ml_dtypes.bfloat16,
    DType.I64: np.int64,
    DType.U32: np.uint32,
    DType.I16: np.int16,
    DType.U8: np.uint8,
    DType.BOOL: np.bool_,
}


def test_numpy_and_the_library_load_the_same_values(tmp_path: Path) -> None:
    tensors = {f"t.{dtype.name}": Spec((3, 5), dtype) for dtype in NUMPY}
    data = written(tmp_path / "a.safetensors", tensors, {})
    loaded = safetensors.numpy.load_file(tmp_path / "a.safetensors")
    assert loaded.keys() == tensors.keys()
    for dtype, kind in NUMPY.items():
        array = loaded[f"t.{dtype.name}"]
        assert (array.dtype, array.shape) == (kind, (3, 5))
        assert array.tobytes() == data[f"t.{dtype.name}"]


def test_mlx_loads_the_same_bits(tmp_path: Path) -> None:
    refused = (DType.F64, DType.F8_E5M2)  # by mx.load
    tensors = {f"t.{dtype.name}": Spec((3, 8), dtype) for dtype in DType if dtype not in refused}
    data = written(tmp_path / "a.safetensors", tensors, {"format": "mlx"})
    loaded, metadata = mx.load(str(tmp_path / "a.safetensors"), return_metadata=True)
    assert metadata == {"format": "mlx"}
    assert loaded.keys() == tensors.keys()
    for name, spec in tensors.items():
        assert loaded[name].shape == spec.shape
        assert loaded[name].dtype == getattr(mx, spec.dtype.mlx)
        assert np.array(loaded[name].view(mx.uint8)).tobytes() == data[name]


def test_a_file_of_the_library_is_read(tmp_path: Path) -> None:
    path = tmp_path / "theirs.safetensors"
    arrays = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.arange(3, dtype=np.int8)}
    safetensors.numpy.save_file(arrays, path, metadata={"format": "np"})
    header = read_header(path)
    assert header.metadata == {"format": "np"}
    with Reader() as reader:
        for name, array in arrays.items():
            entry = header.entries[name]
            assert (entry.spec.shape, entry.spec.dtype.numpy) == (array.shape, array.dtype.name)
            assert reader.read(path, entry.offset, entry.spec.nbytes).tobytes() == array.tobytes()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        pytest.param("", "'': the name of a tensor is empty", id="empty"),
        pytest.param("a\0", r"'a\x00': the name of a tensor contains the character '\x00'", id="NUL"),
        pytest.param("a\ud800", r"'a\ud800': the name of a tensor contains", id="surrogate"),
        pytest.param("n" * 4097, "has more than 4096 characters", id="long"),
        pytest.param("__metadata__", "__metadata__: the name of a tensor is reserved", id="reserved"),
    ],
)
def test_a_name_that_no_header_can_hold_is_refused(name: str, text: str) -> None:
    with pytest.raises(MlaToolsError) as caught:
        layout({name: Spec((1,), DType.U8)}, {})
    assert text in str(caught.value)


def test_metadata_that_is_not_unicode_is_refused() -> None:
    with pytest.raises(MlaToolsError, match="text that is not Unicode"):
        layout({}, {"a": "\udfff"})


@given(st.lists(st.integers(0, 60), max_size=12), st.randoms())
@settings(deadline=None)
def test_slabs_in_any_order_make_the_same_file(
    tmp_path_factory: pytest.TempPathFactory, cuts: list[int], random: object
) -> None:
    path = tmp_path_factory.getbasetemp() / "slabs.safetensors"
    path.unlink(missing_ok=True)
    tensors = {"a": Spec((3, 10), DType.BF16), "b": Spec((60,), DType.U8)}
    data = content(tensors)
    edges = sorted({0, 60, *cuts})
    slabs = [(name, start, end) for name in tensors for start, end in pairwise(edges)]
    random.shuffle(slabs)  # type: ignore[attr-defined]
    with Writer(path, layout(tensors, {})) as writer:
        for name, start, end in slabs:
            writer.write(name, start, data[name][start:end])
        writer.finish()
    made = dict(safetensors.deserialize(path.read_bytes()))
    assert {name: bytes(item["data"]) for name, item in made.items()} == data


def test_many_threads_write_one_file(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    tensors = {f"experts.{e}": Spec((64, 32), DType.F32) for e in range(8)}
    data = content(tensors)
    slabs = [(name, start) for name in tensors for start in range(0, 64 * 128, 128)]
    with Writer(path, layout(tensors, {})) as writer, ThreadPoolExecutor(8) as pool:
        jobs = [pool.submit(writer.write, name, at, data[name][at : at + 128]) for name, at in slabs]
        for job in jobs:
            job.result()
        writer.finish()
    with Reader(limit=1) as reader, ThreadPoolExecutor(8) as pool:
        entries = read_header(path).entries
        reads = [
            (name, at, pool.submit(reader.read, path, entries[name].offset + at, 128)) for name, at in slabs
        ]
        for name, at, read in reads:
            assert read.result().tobytes() == data[name][at : at + 128]


@pytest.mark.parametrize(
    "value",
    [
        pytest.param(np.arange(16, dtype=np.uint16).reshape(4, 4), id="numpy"),
        pytest.param(np.zeros((4, 4), ml_dtypes.bfloat16).view(np.uint16), id="bfloat16 as its bits"),
        pytest.param(mx.arange(16, dtype=mx.uint16).reshape(4, 4), id="mlx"),
        pytest.param(bytearray(32), id="bytearray"),
    ],
)
def test_any_contiguous_buffer_can_be_written(tmp_path: Path, value: object) -> None:
    path = tmp_path / "a.safetensors"
    with Writer(path, layout({"a": Spec((4, 4), DType.U16)}, {})) as writer:
        writer.write("a", 0, value)
        writer.write("a", 32, np.empty((0, 4)))
        writer.finish()
    assert path.read_bytes()[-32:] == memoryview(value).tobytes()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("slabs", "text"),
    [
        pytest.param([], "a: bytes 0..8 were not written", id="nothing"),
        pytest.param([(0, 4)], "a: bytes 4..8 were not written", id="no end"),
        pytest.param([(2, 8)], "a: bytes 0..2 were not written", id="no start"),
        pytest.param([(0, 2), (5, 8)], "a: bytes 2..5 were not written", id="hole"),
        pytest.param([(0, 8), (0, 8)], "a: bytes 0..8 were written twice", id="twice"),
        pytest.param([(4, 8), (0, 5)], "a: bytes 4..5 were written twice", id="overlap"),
        pytest.param([(0, 8), (2, 4)], "a: bytes 2..4 were written twice", id="inside"),
    ],
)
def test_finish_refuses_what_was_not_written_exactly_once(
    tmp_path: Path, slabs: list[tuple[int, int]], text: str
) -> None:
    path = tmp_path / "a.safetensors"
    with Writer(path, layout({"a": Spec((8,), DType.U8), "b": Spec((0,), DType.U8)}, {})) as writer:
        for start, end in slabs:
            writer.write("a", start, bytes(end - start))
        with pytest.raises(MlaToolsError) as caught:
            writer.finish()
        assert str(caught.value) == f"a.safetensors was not written exactly once:\n  {text}"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "start", "size", "text"),
    [
        pytest.param("b", 0, 1, "b: a.safetensors has no place for this tensor", id="unknown"),
        pytest.param("a", 5, 4, "a: bytes 5..9 are outside of its 8 bytes", id="beyond"),
        pytest.param("a", -1, 2, "a: bytes -1..1 are outside of its 8 bytes", id="before"),
    ],
)
def test_a_write_outside_of_a_tensor_is_refused(
    tmp_path: Path, name: str, start: int, size: int, text: str
) -> None:
    with Writer(tmp_path / "a.safetensors", layout({"a": Spec((8,), DType.U8)}, {})) as writer:
        with pytest.raises(MlaToolsError) as caught:
            writer.write(name, start, bytes(size))
        assert str(caught.value) == text
        with pytest.raises(MlaToolsError, match=r"a: bytes 0\.\.8 were not written"):
            writer.finish()


EIGHT = layout({"a": Spec((8,), DType.U8)}, {})


def test_the_final_name_appears_only_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    writer = Writer(path, EIGHT)
    assert [item.name for item in tmp_path.iterdir()] == ["a.safetensors.partial"]
    assert writer.partial.stat().st_size == EIGHT.size
    writer.write("a", 0, bytes(8))
    writer.finish()
    writer.abort()
    assert [item.name for item in tmp_path.iterdir()] == ["a.safetensors"]
    with pytest.raises(MlaToolsError, match=r"a\.safetensors is closed; nothing more"):
        writer.write("a", 0, bytes(8))
    with pytest.raises(MlaToolsError, match="closed already"):
        writer.finish()


def test_an_existing_file_is_never_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"kept")
    with pytest.raises(MlaToolsError, match="exists already; remove it or choose another place"):
        Writer(path, EIGHT)
    path.unlink()
    with Writer(path, EIGHT) as writer:
        writer.write("a", 0, bytes(8))
        path.write_bytes(b"kept")
        with pytest.raises(MlaToolsError, match="exists already"):
            writer.finish()
    assert path.read_bytes() == b"kept"
    assert [item.name for item in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_second_run_takes_over_and_the_first_cannot_finish(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    first = Writer(path, EIGHT)
    first.write("a", 0, b"1" * 8)
    with Writer(path, EIGHT) as second:
        with pytest.raises(MlaToolsError, match="was removed or replaced while it was written"):
            first.finish()
        first.abort()
        second.write("a", 0, b"2" * 8)
        second.finish()
    assert path.read_bytes().endswith(b"2" * 8)


TWO = layout({"a": Spec((8,), DType.U8), "b": Spec((8,), DType.U8)}, {})


def test_a_file_is_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    first = Writer(path, TWO)
    first.write("a", 0, b"1" * 8)
    first.write("b", 0, b"2" * 4)
    first.sync()
    first.suspend()
    assert [item.name for item in tmp_path.iterdir()] == ["a.safetensors.partial"]
    with Writer(path, TWO, {"a": first.ranges("a")}) as second:
        with pytest.raises(MlaToolsError, match="closed"):
            first.write("b", 4, b"2" * 4)
        second.write("b", 0, b"2" * 8)
        digest = second.seal()
    # Sealed, it is complete, and still has its temporary name.
    assert [item.name for item in tmp_path.iterdir()] == ["a.safetensors.partial"]
    data = second.partial.read_bytes()
    assert digest == hashlib.sha256(data).hexdigest()
    assert data == TWO.header + b"1" * 8 + b"2" * 8


THREE = layout({name: Spec((8,), DType.U8) for name in "abc"}, {})


@pytest.mark.parametrize("order", list(permutations("abc")), ids="".join)
@pytest.mark.parametrize("done", [None, "a", "b"], ids=str)
def test_a_sha256_begun_early_is_that_of_the_file(
    order: tuple[str, ...], done: str | None, tmp_path: Path
) -> None:
    path = tmp_path / "a.safetensors"
    held = None
    if done:
        first = Writer(path, THREE)
        first.write(done, 0, done.encode() * 8)
        first.suspend()
        held = {done: first.ranges(done)}
    writer = Writer(path, THREE, held)
    for name in order:
        for half in (0, 4) if name != done else ():
            writer.hash()
            writer.write(name, half, name.encode() * 4)
    writer.hash()
    assert writer.seal() == hashlib.sha256(THREE.header + b"a" * 8 + b"b" * 8 + b"c" * 8).hexdigest()


def test_a_sha256_is_begun_with_what_has_no_gap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[tuple[int, int]] = []
    original = os.preadv

    def noted(fd: int, buffers: list[memoryview], offset: int) -> int:
        count = original(fd, buffers, offset)
        read.append((offset - len(THREE.header), count))
        return count

    writer = Writer(tmp_path / "a.safetensors", THREE)
    writer.write("c", 0, b"c" * 8)
    writer.write("a", 0, b"a" * 8)
    monkeypatch.setattr(os, "preadv", noted)
    writer.hash()
    assert sum(count for _, count in read) == len(THREE.header) + 8
    writer.write("b", 0, b"b" * 8)
    read.clear()
    writer.seal()
    assert [(start, count) for start, count in read if count] == [(8, 16)]


@pytest.mark.parametrize("done", [{"a"}, set(), {"a", "b"}], ids=["one", "none", "all"])
def test_what_is_done_must_not_be_written_again_and_the_rest_must(tmp_path: Path, done: set[str]) -> None:
    path = tmp_path / "a.safetensors"
    first = Writer(path, TWO)
    for name in done:
        first.write(name, 0, b"1" * 8)
    first.suspend()
    writer = Writer(path, TWO, {name: first.ranges(name) for name in done})
    writer.write("a", 0, b"1" * 8)
    with pytest.raises(MlaToolsError) as caught:
        writer.seal()
    assert ("a: bytes 0..8 were written twice" in str(caught.value)) == ("a" in done)
    assert ("b: bytes 0..8 were not written" in str(caught.value)) == ("b" not in done)
    assert writer.partial.exists()


@pytest.mark.parametrize("damage", ["gone", "shorter", "longer", "another"])
def test_a_file_that_is_not_the_one_that_was_begun_is_not_gone_on_with(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "a.safetensors"
    writer = Writer(path, TWO)
    writer.suspend()
    partial = writer.partial
    if damage == "gone":
        partial.unlink()
    elif damage == "another":
        partial.write_bytes(bytes(TWO.size))
    else:
        os.truncate(partial, TWO.size + (1 if damage == "longer" else -1))
    before = partial.read_bytes() if partial.exists() else None
    text = "is gone, so it cannot be resumed" if damage == "gone" else "is not the file that was begun"
    with pytest.raises(MlaToolsError, match=f"{text}.*; start again with --overwrite"):
        Writer(path, TWO, {"a": []})
    assert (partial.read_bytes() if partial.exists() else None) == before


def test_a_file_that_cannot_be_opened_now_is_not_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.safetensors"
    Writer(path, TWO).suspend()

    def fail(*args: object) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pread", fail)
        with pytest.raises(MlaToolsError, match="cannot be written: Input/output error"):
            Writer(path, TWO, {"a": []})
    Writer(path, TWO, {"a": []}).suspend()


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """Limit how large a file may become: a stand-in for a full disk.

    The limit holds for the test runner's own output too, so nothing is printed within.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_without_room_is_a_sentence(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    laid = layout({"a": Spec((4000,), DType.U8)}, {})
    sentence = rf"File too large; it needs {laid.size:,} bytes; free some space"
    with pytest.raises(MlaToolsError, match=sentence), files_up_to(1000):
        Writer(path, laid)
    assert list(tmp_path.iterdir()) == []
    with Writer(path, laid) as writer:
        # The first part of the write still succeeds, and the rest is tried again.
        with pytest.raises(MlaToolsError, match="cannot be written: File too large"), files_up_to(2000):
            writer.write("a", 0, bytes(4000))
        with pytest.raises(MlaToolsError, match=r"a: bytes 0\.\.4000 were not written"):
            writer.finish()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(
        MlaToolsError, match=r"cannot be written: No such file or directory; check the folder"
    ):
        Writer(tmp_path / "no" / "a.safetensors", EIGHT)


@pytest.mark.parametrize(("offset", "nbytes"), [(0, 9), (8, 1), (1 << 62, 1 << 62), (-1, 4), (0, -1)])
def test_a_read_outside_of_a_file_is_refused(tmp_path: Path, offset: int, nbytes: int) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(bytes(8))
    with Reader() as reader, pytest.raises(CheckpointError) as caught:
        reader.read(path, offset, nbytes)
    assert "a.safetensors: truncated while reading" in str(caught.value)
    assert "found   8 bytes" in str(caught.value)


def test_a_file_that_shrinks_under_the_reader_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(bytes(8))
    with Reader() as reader:
        assert reader.read(path, 0, 8).tobytes() == bytes(8)
        with path.open("r+b") as file:
            file.truncate(5)
        with pytest.raises(CheckpointError, match="truncated while reading"):
            reader.read(path, 0, 8)


def test_the_reader_keeps_few_files_open(tmp_path: Path) -> None:
    paths = [tmp_path / str(number) for number in range(10)]
    for number, path in enumerate(paths):
        path.write_bytes(bytes([number]))
    with Reader(limit=3) as reader:
        for path in paths + paths[::-1]:
            assert reader.read(path, 0, 1)[0] == int(path.name)
            assert len(reader._files) <= 3
        assert list(reader._files) == [LocalFile(path) for path in (paths[2], paths[1], paths[0])]
    assert not reader._files
    with pytest.raises(MlaToolsError, match="the reader is closed"):
        reader.read(paths[0], 0, 1)


def test_a_file_that_cannot_be_opened_is_a_problem_of_the_checkpoint(tmp_path: Path) -> None:
    with Reader() as reader:
        with pytest.raises(CheckpointError, match="gone: is not there"):
            reader.read(tmp_path / "gone", 0, 1)
        with pytest.raises(CheckpointError, match="is not a regular file"):
            reader.read(tmp_path, 0, 1)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.b", "a.b"),
        ("", "''"),
        ("a\nb", r"'a\nb'"),
        ("n" * 256, "n" * 256),
        ("n" * 1000, "'" + "n" * 256 + "'... (1,000 characters)"),
    ],
)
def test_strange_names_are_escaped_and_shortened(name: str, text: str) -> None:
    assert shown(name) == text


def test_parse_object_tells_each_repeated_key() -> None:
    assert parse_object(b'{"a":{"b":1,"b":2},"c":1.5,"a":3,"a":4}')[1] == ["b", "a", "a"]


def test_null_metadata_as_mlx_writes_it_is_none(tmp_path: Path) -> None:
    mx.save_safetensors(str(tmp_path / "a.safetensors"), {"x": mx.zeros((2,))})
    assert b'"__metadata__":null' in (tmp_path / "a.safetensors").read_bytes()
    assert read_header(tmp_path / "a.safetensors").metadata == {}
