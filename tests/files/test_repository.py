"""A repository read by ranges: the same as its folder, whatever the network and the server do to it."""

from __future__ import annotations

import gzip
import itertools
import json
import os
import random
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest
from attacks.hostile import entry, folder_with_config, index, packed, shard, table
from hub_server import COMMIT, LATER, NAME, Call, Hub, Slow, running

from mla_tools import cli
from mla_tools.errors import CheckpointError, MlaToolsError
from mla_tools.execute import execute
from mla_tools.files.checkpoint import open_checkpoint
from mla_tools.files.hub import Repository, open_repository
from mla_tools.files.network import Arrival, Pace, PassingError
from mla_tools.files.place import read_whole
from mla_tools.files.reader import Reader
from mla_tools.options import Options
from mla_tools.output import RECORD
from mla_tools.plan import make_plan
from mla_tools.quantization import QuantSpec
from mla_tools.samples import write_sample

WINDOW = 1 << 17  # what a repository reads beyond what it is asked for

DATA = random.Random(1).randbytes(1_000_000)
CONFIG = b'{"model_type": "deepseek_v3"}'


@pytest.fixture(autouse=True)
def online(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Let requests reach this machine, and nothing of the user's (token, cache, proxy) take part."""
    from huggingface_hub.utils import close_session

    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    close_session()
    yield
    close_session()


@pytest.fixture
def hub() -> Iterator[Hub]:
    """Return a hub with a repository of a config and one large file."""
    with running({"config.json": CONFIG, "model.safetensors": DATA}) as hub:
        yield hub


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("samples") / "deepseek_v3"
    write_sample("deepseek_v3", folder, "fp8", shards=3)
    return folder


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def opened(hub: Hub, waits: list[float] | None = None, revision: str | None = None) -> Repository:
    """Return the hub's repository; the waits between tries are noted instead of waited for."""
    note = [] if waits is None else waits
    return open_repository(NAME, revision, endpoint=hub.url, sleep=note.append)


def read(repository: Repository, offset: int, nbytes: int) -> bytes:
    with Reader() as reader:
        return reader.read(repository.file("model.safetensors"), offset, nbytes).tobytes()


# --- the same as the folder --------------------------------------------------------------------------


def test_a_repository_is_its_files_at_one_commit(hub: Hub) -> None:
    repository = opened(hub)
    assert str(repository) == f"hf://{NAME}@{COMMIT}"
    assert (repository.revision, repository.names()) == (COMMIT, ["config.json", "model.safetensors"])
    hub.commit = LATER  # a push: what is open stays what it was
    assert read(repository, 0, len(DATA)) == DATA
    assert {asked.path for asked in hub.ranges()} == {f"/{NAME}/resolve/{COMMIT}/model.safetensors"}
    assert opened(hub, revision="main").revision == LATER


def test_inspecting_reads_headers_alone(sample: Path) -> None:
    files = files_of(sample)
    shards = [name for name in files if name.endswith(".safetensors")]
    headers = sum(8 + int.from_bytes(files[name][:8], "little") for name in shards)
    small = len(files["config.json"]) + len(files["model.safetensors.index.json"])
    for cdn in (False, True):
        with running(files) as hub:
            hub.cdn = cdn
            found, wanted = open_checkpoint(opened(hub)), open_checkpoint(sample)
            assert {asked.path.rsplit("/", 1)[1] for asked in hub.ranges()} == {
                *shards,
                "config.json",
                "model.safetensors.index.json",
            }
            # A listing, two small files, and a header each; half of the requests are redirected.
            assert len(hub.asked) == 1 + (2 + len(shards)) * (2 if cdn else 1)
            assert hub.served <= headers + small + len(shards) * (WINDOW + 64)
            assert hub.served < sum(len(files[name]) for name in shards) / 2
        assert {
            name: (stored.file.name, stored.offset, stored.spec) for name, stored in found.tensors.items()
        } == {name: (stored.file.name, stored.offset, stored.spec) for name, stored in wanted.tensors.items()}
        assert (found.config, found.notes, found.problems) == (wanted.config, wanted.notes, wanted.problems)
        for ours, theirs in zip(found.shards, wanted.shards, strict=True):
            assert (ours.name, ours.size, ours.digest) == (theirs.name, theirs.size, theirs.digest)
        assert [file.name for file in found.companions] == [file.name for file in wanted.companions]


def test_a_shard_carries_the_hash_that_the_hub_lists(sample: Path) -> None:
    files = files_of(sample)
    with running(files) as hub:
        shards = open_checkpoint(opened(hub)).shards
        listed = {item["rfilename"]: item.get("lfs", {}).get("sha256") for item in hub.siblings()}
    assert [shard.tag for shard in shards] == [listed[shard.name] for shard in shards]


def test_headers_longer_than_the_first_request_are_read_whole(tmp_path: Path) -> None:
    folder = folder_with_config(tmp_path)
    shard(folder, "model.safetensors", *(f"model.layers.{k}.weight" for k in range(3000)))
    with running(files_of(folder)) as hub:
        found = open_checkpoint(opened(hub))
        assert [asked.range for asked in hub.ranges()][1:] == [
            "bytes=0-131135",
            f"bytes=131136-{end_of(folder)}",
        ]
    assert found.tensors.keys() == open_checkpoint(folder).tensors.keys()


def end_of(folder: Path) -> int:
    """Return the last byte that is asked for with the rest of a header."""
    data = (folder / "model.safetensors").read_bytes()
    return min(8 + int.from_bytes(data[:8], "little") + WINDOW, len(data)) - 1


def test_headers_are_read_side_by_side(sample: Path) -> None:
    files = files_of(sample)
    together = threading.Barrier(3)

    def wait(call: Call) -> None:
        together.wait(timeout=60)  # broken, and an error, unless three requests are under way
        call.serve()

    with running(files) as hub:
        hub.faults = [None, None, wait, wait, wait]  # after the config and the index
        assert len(open_checkpoint(opened(hub)).shards) == 3


def assert_same_but_for_the_source(found: Path, wanted: Path) -> None:
    """Compare two outputs byte for byte; of the record, all but what it says of the place of the source."""
    made = [files_of(folder) for folder in (found, wanted)]
    record, other = (json.loads(files.pop(RECORD)) for files in made)
    assert made[0] == made[1]
    assert record.pop("sha256") != other.pop("sha256")  # of the rest
    place = record["source"].pop("name"), record["source"].pop("revision")
    assert place[0] == f"hf://{NAME}"
    assert len(place[1]) == 40
    del other["source"]["name"], other["source"]["revision"]
    tags = [file.pop("hub_hash") for file in record["source"]["files"].values()]
    assert all(tags)
    assert not any(file.pop("hub_hash") for file in other["source"]["files"].values())
    assert record == other


@pytest.mark.parametrize("cdn", [False, True], ids=["hub", "cdn"])
@pytest.mark.parametrize("options", [Options(), Options(quantize=QuantSpec())], ids=["kept", "q"])
def test_a_conversion_is_that_of_the_folder_byte_for_byte(
    sample: Path, tmp_path: Path, cdn: bool, options: Options
) -> None:
    execute(make_plan(open_checkpoint(sample), options), tmp_path / "wanted")
    with running(files_of(sample)) as hub:
        hub.cdn = cdn
        plan = make_plan(open_checkpoint(opened(hub)), options)
        broken: list[Any] = [Faults.drop, Faults.cut, Faults.status(503), Faults.short]
        hub.faults = [fault for fault in broken for _ in range(2) for fault in (fault, None, None)]
        execute(plan, tmp_path / "found")
    assert_same_but_for_the_source(tmp_path / "found", tmp_path / "wanted")


def test_any_range_from_any_thread(hub: Hub) -> None:
    dice = random.Random(2)
    ranges = []
    for _ in range(200):
        offset = dice.randrange(len(DATA))
        ranges.append((offset, dice.randrange(min(len(DATA) - offset, 100_000) + 1)))
    repository = opened(hub)
    with Reader() as reader, ThreadPoolExecutor(8) as pool:
        file = repository.file("model.safetensors")
        for (offset, nbytes), data in zip(
            ranges, pool.map(lambda span: reader.read(file, *span), ranges), strict=True
        ):
            assert data.tobytes() == DATA[offset : offset + nbytes]


def test_what_follows_a_range_is_not_asked_for_again(hub: Hub) -> None:
    repository = opened(hub)
    assert read(repository, 1000, 100_000) == DATA[1000:101_000]
    assert read(repository, 101_000, WINDOW) == DATA[101_000 : 101_000 + WINDOW]
    assert len(hub.ranges()) == 1
    assert read(repository, 200_000, 100_000) == DATA[200_000:300_000]
    assert [asked.range for asked in hub.ranges()][1:] == [f"bytes={101_000 + WINDOW}-{300_000 + WINDOW - 1}"]


@pytest.mark.parametrize(
    ("offset", "nbytes"), [(0, 1_000_001), (1_000_000, 1), (1 << 62, 1 << 62), (-1, 4), (0, -1)]
)
def test_a_range_outside_of_a_file_is_refused_unasked(hub: Hub, offset: int, nbytes: int) -> None:
    with pytest.raises(CheckpointError, match="truncated while reading"):
        read(opened(hub), offset, nbytes)
    assert hub.ranges() == []


def test_nothing_is_asked_for_to_read_nothing(hub: Hub) -> None:
    hub.files["empty.json"] = b""
    repository = opened(hub)
    assert read(repository, 7, 0) == b""
    assert read_whole(repository.file("empty.json"), 10) == b""
    assert hub.ranges() == []


# --- what passes -------------------------------------------------------------------------------------


class Faults:
    """Ways to answer badly."""

    @staticmethod
    def drop(call: Call) -> None:
        call.handler.close_connection = True

    @staticmethod
    def cut(call: Call) -> None:
        body = call.data[call.first : call.stop]
        call.serve(body[: len(body) // 2], length=len(body))

    @staticmethod
    def short(call: Call) -> None:
        """Answer with a part of the range, and say so, which a server may."""
        call.stop -= (call.stop - call.first) // 2
        call.serve()

    @staticmethod
    def status(status: int, **headers: str) -> Any:
        named = {key.replace("_", "-"): text for key, text in headers.items()}
        return lambda call: call.answer(status, headers=named)


PASSING = [
    pytest.param(Faults.drop, 0.5, id="dropped"),
    pytest.param(Faults.cut, 0.5, id="cut"),
    pytest.param(Faults.short, 0.5, id="short"),
    *(pytest.param(Faults.status(status), 0.5, id=str(status)) for status in (408, 429, 500, 502, 503, 504)),
    pytest.param(Faults.status(429, Retry_After="7"), 7, id="retry_after"),
    pytest.param(Faults.status(503, Retry_After="7"), 7, id="retry_after_503"),
    pytest.param(Faults.status(429, RateLimit='"resolvers";r=0;t=41'), 42, id="rate_limit"),
    pytest.param(Faults.status(429, Retry_After="soon"), 0.5, id="retry_after_nonsense"),
    pytest.param(Faults.status(429, Retry_After=formatdate(0, usegmt=True)), 0, id="retry_after_date"),
]


@pytest.mark.parametrize("cdn", [False, True], ids=["hub", "cdn"])
@pytest.mark.parametrize(("fault", "wait"), PASSING)
def test_a_failure_that_passes_costs_a_wait(hub: Hub, fault: Any, wait: float, cdn: bool) -> None:
    hub.cdn, hub.faults = cdn, [fault]
    waits: list[float] = []
    assert read(opened(hub, waits), 5, 200_000) == DATA[5:200_005]
    assert waits == [wait]


# Reasons at a time: the seconds since the request, those for the body when its head is there, the bytes.
PACES = [
    pytest.param([(60, None, 0)], "", id="head"),
    pytest.param([(61, None, 0)], "no answer came in 60 seconds", id="no_head"),
    pytest.param([(50, 500, 0), (80, 500, 0)], "", id="quiet"),
    pytest.param([(50, 500, 0), (81, 500, 0)], "fewer than 1,024 bytes a second come", id="too_quiet"),
    pytest.param([(0, 500, 0), (30, 500, 30_720), (60, 500, 61_440)], "", id="slow"),
    pytest.param(
        [(0, 500, 0), (30, 500, 30_720), (61, 500, 61_439)], "fewer than 1,024 bytes a second", id="too_slow"
    ),
    pytest.param(
        [(0, 500, 0), (1, 500, 1 << 30), (32, 500, 1 << 30)], "fewer than 1,024 bytes a second", id="burst"
    ),
    pytest.param([(60, 25, 0), (85, 25, 1)], "", id="in_time"),
    pytest.param(
        [(60, 25, 0), (70, 25, 1 << 20), (86, 25, 1 << 21)], "not complete after 25 seconds", id="too_long"
    ),
]


@pytest.mark.parametrize(("looks", "reason"), PACES)
def test_an_answer_has_so_much_time(looks: list[tuple[float, float | None, int]], reason: str) -> None:
    pace = Pace(1000.0, 30.0)
    *before, last = [pace.breach(1000 + now, seconds, count) for now, seconds, count in looks]
    assert not any(before)
    assert (reason in last) if reason else last == ""


OK = b"HTTP/1.1 200 OK\r\n"
FRAMED = b"Transfer-Encoding: chunked\r\n\r\n1;"
PIECES = [
    pytest.param(b"HTTP/1.1 2", b"0", id="status_line"),
    pytest.param(OK + b"X-Slow: ", b"x", id="header"),
    pytest.param(b"", b"HTTP/1.1 100 Continue\r\n\r\n", id="interim"),
    pytest.param(OK + FRAMED, b"x", id="frame"),
    pytest.param(OK + b"Content-Length: 1000000\r\n\r\n", None, id="body"),
]


@pytest.mark.parametrize(("head", "piece"), PIECES)
def test_a_server_that_sends_a_byte_a_second_is_asked_again(
    hub: Hub, head: bytes, piece: bytes | None
) -> None:
    slow = Slow()
    repository = open_repository(NAME, endpoint=hub.url, sleep=slow.sleep, clock=slow.clock)
    data = itertools.repeat(piece) if piece else (DATA[k : k + 1] for k in itertools.count())
    hub.faults = [lambda call: slow.drip(call, head, data)]
    assert read(repository, 0, len(DATA)) == DATA
    assert slow.waits == [0.5]
    assert slow.now < Slow.LIMIT


@pytest.mark.parametrize(("head", "piece"), PIECES)
def test_a_listing_that_comes_a_byte_a_second_is_asked_for_again(
    hub: Hub, head: bytes, piece: bytes | None
) -> None:
    slow = Slow()

    def once(call: Call) -> None:
        hub.listing = None
        slow.drip(call, head, itertools.repeat(piece or b" "))

    hub.listing = once
    repository = open_repository(NAME, endpoint=hub.url, sleep=slow.sleep, clock=slow.clock)
    assert repository.names() == ["config.json", "model.safetensors"]
    assert slow.waits == [0.5]
    assert slow.now < Slow.LIMIT


def test_what_comes_after_all_have_left_is_not_stored() -> None:
    stored: list[bytes] = []
    arrival = Arrival()
    arrival.take(b"ab", stored.append)
    arrival.leave()
    with pytest.raises(PassingError):
        arrival.take(b"c", stored.append)
    assert (stored, arrival.count) == ([b"ab"], 2)


def test_late_bytes_do_not_get_into_what_was_read_since(hub: Hub) -> None:
    slow = Slow()
    repository = open_repository(NAME, endpoint=hub.url, sleep=slow.sleep, clock=slow.clock)

    def late(call: Call) -> None:
        said = f"Content-Length: {len(DATA)}\r\n\r\n".encode()
        slow.drip(call, OK + said, itertools.repeat(b""), last=bytes(100_000))

    hub.faults = [late]
    assert read(repository, 0, len(DATA)) == DATA
    assert slow.waits == [0.5]


def assert_stopped(repository: Repository, waiting: threading.Event) -> None:
    """Stop a repository while a read of it waits, and assert that the read ends."""
    with ThreadPoolExecutor(1) as pool:
        under_way = pool.submit(read, repository, 0, 200)
        assert waiting.wait(timeout=60)
        repository.stop()
        with pytest.raises(MlaToolsError, match="org/name: reading was stopped"):
            under_way.result(timeout=60)


def test_a_read_from_a_silent_server_can_be_stopped(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT", 600)
    waiting = threading.Event()

    def silent(call: Call) -> None:
        call.serve(call.data[:100], length=call.stop - call.first)
        waiting.set()
        hub.over.wait(timeout=60)

    hub.always = silent
    repository = opened(hub)
    assert_stopped(repository, waiting)


def test_what_came_before_a_break_is_not_asked_for_again(hub: Hub) -> None:
    hub.faults = [Faults.short, Faults.short]
    assert read(opened(hub), 0, len(DATA)) == DATA
    starts = [asked.range for asked in hub.ranges()]
    assert starts == [f"bytes={start}-{len(DATA) - 1}" for start in (0, 500_000, 750_000)]


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        pytest.param(Faults.status(503), "the server answers 503", id="503"),
        pytest.param(Faults.drop, "the connection fails", id="dropped"),
    ],
)
def test_patience_ends(hub: Hub, fault: Any, reason: str) -> None:
    hub.always = fault
    waits: list[float] = []
    with pytest.raises(MlaToolsError, match=f"{NAME}: model.safetensors cannot be read: {reason}") as caught:
        read(opened(hub, waits), 0, 8)
    assert str(caught.value).endswith("given up after 9 tries.")
    assert waits == [0.5, 1, 2, 4, 8, 16, 32, 64]


def test_nobody_waits_for_a_day(hub: Hub) -> None:
    hub.always = Faults.status(429, Retry_After="86400")
    waits: list[float] = []
    with pytest.raises(MlaToolsError, match="answers 429, and asks for a pause of 86,400 seconds"):
        read(opened(hub, waits), 0, 8)
    assert waits == []


def test_whoever_waits_can_be_stopped(hub: Hub) -> None:
    waiting = threading.Event()

    def busy(call: Call) -> None:
        call.answer(429, headers={"Retry-After": "590"})
        waiting.set()

    hub.always = busy
    repository = open_repository(NAME, endpoint=hub.url)
    assert_stopped(repository, waiting)
    assert len(hub.ranges()) == 1


def test_an_interrupted_conversion_does_not_wait_for_a_busy_hub(sample: Path, tmp_path: Path) -> None:
    with running(files_of(sample)) as hub:
        plan = make_plan(open_checkpoint(open_repository(NAME, endpoint=hub.url)), Options())
        hub.faults, hub.always = [None] * 4, Faults.status(429, Retry_After="590")

        def interrupt(nbytes: int) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            execute(plan, tmp_path / "out", progress=interrupt)
    assert [path.suffix for path in (tmp_path / "out").iterdir()] == [".jsonl"]


def test_a_hub_that_is_not_there_is_reported(hub: Hub) -> None:
    waits: list[float] = []
    with pytest.raises(MlaToolsError, match=r"org/name cannot be read: http://127.0.0.1:1 cannot be reached"):
        open_repository(NAME, endpoint="http://127.0.0.1:1", sleep=waits.append)
    assert waits == [0.5, 1, 2]


# --- what does not pass ------------------------------------------------------------------------------


def total(call: Call) -> None:
    call.serve(total=len(call.data) + 1)


def longer(call: Call) -> None:
    """Answer with one byte more than was asked for, and say so."""
    call.stop += 1
    call.serve()


def elsewhere(call: Call) -> None:
    call.serve(first=call.first + 1)


def too_much(call: Call) -> None:
    call.serve(call.data[call.first : call.stop] + b"x")


def whole(call: Call) -> None:
    call.answer(200, call.data)


def vast(call: Call) -> None:
    """Claim the whole of a file of 5 TB: reading it would never end."""
    call.answer(200, call.data, length=5_000_000_000_000)


def squeezed(call: Call) -> None:
    said = {"Content-Encoding": "gzip", "Content-Range": f"bytes 0-{call.stop - 1}/{len(call.data)}"}
    call.answer(206, b"\x1f\x8b", said)


def no_range(call: Call) -> None:
    call.answer(206, call.data[call.first : call.stop])


def other_commit(call: Call) -> None:
    said = {"X-Repo-Commit": LATER, "Content-Range": f"bytes 0-{call.stop - 1}/{len(call.data)}"}
    call.answer(206, call.data[: call.stop], said)


PERMANENT = [
    pytest.param(
        Faults.status(401), "there is no such repository; .*hf auth login.* or set HF_TOKEN", id="401"
    ),
    pytest.param(Faults.status(403), r"refuses it \(403\); log in .*, with a token that may", id="403"),
    pytest.param(
        Faults.status(403, X_Error_Code="GatedRepo"), "org/name is gated: accept its terms", id="gated"
    ),
    pytest.param(Faults.status(404), "model.safetensors: is listed in org/name but is not there", id="404"),
    pytest.param(
        Faults.status(404, X_Error_Code="RevisionNotFound"), f"org/name has no revision {COMMIT}", id="gone"
    ),
    pytest.param(
        Faults.status(416, Content_Range="bytes */7"),
        r"ends too early\n  needed  bytes 0 to 131,080 of 1,000,000\n  found   bytes \*/7\n",
        id="416",
    ),
    pytest.param(Faults.status(418), "model.safetensors cannot be read: the server answers 418", id="418"),
    pytest.param(Faults.status(302), "the server answers 302", id="redirect_to_nothing"),
    pytest.param(
        Faults.status(302, Location="file:///etc/passwd"),
        "redirects to file:///etc/passwd, which is not safe",
        id="redirect_to_a_file",
    ),
    pytest.param(
        Faults.status(302, Location="https://"), "to https://, which is not safe", id="redirect_to_no_host"
    ),
    pytest.param(Faults.status(302, Location="?"), "redirects in a circle", id="redirect_in_a_circle"),
    pytest.param(total, "the wrong size.*\n  needed  1,000,000 .*\n  found   1,000,001 bytes", id="size"),
    pytest.param(
        longer,
        r"sends another range\n  needed  bytes 0-131079/1000000\n  found   bytes 0-131080/1000000",
        id="longer",
    ),
    pytest.param(elsewhere, r"sends another range\n  needed  bytes 0-131079/1000000\n", id="range"),
    pytest.param(no_range, r"sends another range\n  needed  bytes 0-131079/1000000\n", id="no_range"),
    pytest.param(too_much, "the server sends more than it says", id="too_much"),
    pytest.param(whole, "cannot be read by ranges: 127.0.0.1 sends the whole file instead", id="whole"),
    pytest.param(vast, "cannot be read by ranges: 127.0.0.1 sends the whole file instead", id="vast"),
    pytest.param(squeezed, "sends compressed data", id="compressed"),
    pytest.param(other_commit, f"the hub answers with another commit, {LATER}", id="commit"),
]


@pytest.mark.parametrize(("fault", "text"), PERMANENT)
def test_an_answer_that_no_other_try_changes_is_an_error_at_once(hub: Hub, fault: Any, text: str) -> None:
    hub.always = fault
    waits: list[float] = []
    repository = opened(hub, waits)
    with pytest.raises(MlaToolsError, match=text) as caught:
        read(repository, 0, 8)
    assert waits == []
    assert caught.value.exit_code == 1
    assert str(caught.value).replace("\n", "").isprintable()


LOCATIONS = [
    pytest.param(
        "/" + "x" * 8192, r"redirects to '/x+'\.\.\. \(8,193 characters\), which is not safe", id="long"
    ),
    pytest.param(
        "/" + "x" * 90_000, r"redirects to '/x+'\.\.\. \(90,001 characters\), which is not", id="longer"
    ),
    pytest.param("http://[::1", r"redirects to http://\[::1, which is not safe", id="bracket"),
    pytest.param(
        "http://127.0.0.1:port/", "redirects to http://127.0.0.1:port/, which is not an address", id="port"
    ),
    pytest.param(
        "/\x1b[31m", r"redirects to 'http://127.0.0.1:\d+/\\x1b\[31m', which is not an address", id="control"
    ),
    pytest.param("//\xff..\xe9/", "redirects to http://\xff..\xe9/, which is not an address", id="latin"),
    pytest.param(f"http://{'n' * 70}.x/", "http://n+.x cannot be reached", id="host"),
    pytest.param("ftp://127.0.0.1/", "redirects to ftp://127.0.0.1/, which is not safe", id="ftp"),
]


@pytest.mark.parametrize(("location", "text"), LOCATIONS)
def test_a_redirect_to_no_address_is_a_sentence(hub: Hub, location: str, text: str) -> None:
    redirect = Faults.status(307, Location=location)
    waits: list[float] = []
    repository = opened(hub, waits)
    hub.always = hub.listing = redirect
    for ask in (lambda: read(repository, 0, 8), lambda: opened(hub, waits)):
        with pytest.raises(MlaToolsError, match=text) as caught:
            ask()
        assert str(caught.value).isprintable()
    assert waits == []


def test_a_location_that_the_http_library_cannot_read_is_a_sentence(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

    class InvalidURL(Exception):  # noqa: N818 - the name in the library
        pass

    class Client:
        def build_request(self, *args: object, **options: object) -> None: ...

        def send(self, *args: object, **options: object) -> None:
            try:
                raise InvalidURL("Invalid port: ':\x1b'")
            except InvalidURL as error:
                raise HTTPError("Invalid URL in location header") from error

    waits: list[float] = []
    repository = opened(hub, waits)
    monkeypatch.setattr("mla_tools.files.network.session", Client)
    with pytest.raises(
        MlaToolsError, match=r"redirects to something that is not an address \(.*\\x1b.*\)\."
    ) as caught:
        read(repository, 0, 8)
    assert str(caught.value).isprintable()
    assert waits == []


def test_a_head_without_an_end_is_a_sentence(hub: Hub) -> None:
    hub.always = Faults.status(302, Location="/" + "x" * 200_000)
    with pytest.raises(MlaToolsError, match=r"the connection fails .*given up after 9 tries") as caught:
        read(opened(hub), 0, 8)
    assert str(caught.value).isprintable()


def test_headers_may_be_in_any_letters(hub: Hub) -> None:
    strange = {"X-Error-Code": "\xff\xfe", "X-Repo-Commit": "\xe9\x1b"}
    hub.always = lambda call: call.answer(404, headers=strange)
    with pytest.raises(MlaToolsError, match=r"with another commit, '\\xe9\\x1b'\."):
        read(opened(hub), 0, 8)
    hub.always = Faults.status(206, Content_Range="\xff\x1b")
    with pytest.raises(MlaToolsError, match=r"found   '\\xff\\x1b'"):
        read(opened(hub), 0, 8)


def test_a_small_file_may_come_whole(hub: Hub) -> None:
    hub.always = whole
    assert read_whole(opened(hub).file("config.json"), 1000) == CONFIG


def test_one_network_failure_is_one_sentence_for_all_headers(sample: Path) -> None:
    with running(files_of(sample)) as hub:
        hub.faults, hub.always = [None, None], Faults.status(403, X_Error_Code="GatedRepo")
        with pytest.raises(MlaToolsError) as caught:
            open_checkpoint(opened(hub))
    assert not isinstance(caught.value, CheckpointError)
    assert "is gated" in str(caught.value)


# --- elsewhere ---------------------------------------------------------------------------------------


def test_the_token_is_for_the_hub_alone(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.cdn = True
    read(opened(hub), 0, 8)
    assert {(asked.server, asked.token) for asked in hub.asked} == {("hub", "Bearer hf_secret"), ("cdn", "")}


def test_an_address_is_kept_until_it_expires(hub: Hub) -> None:
    hub.cdn = True
    repository = opened(hub)
    for offset, signature, servers in [
        (0, 1, ["hub", "cdn"]),
        (300_000, 1, ["cdn"]),
        (600_000, 2, ["cdn", "hub", "cdn"]),
        (0, 2, ["cdn"]),
    ]:
        hub.signature = signature
        hub.asked.clear()
        assert read(repository, offset, 140_000) == DATA[offset : offset + 140_000]
        assert [asked.server for asked in hub.asked] == servers


@pytest.mark.parametrize(
    ("fault", "servers"),
    [
        pytest.param(Faults.status(503), ["cdn", "cdn"], id="busy"),
        pytest.param(Faults.drop, ["cdn", "cdn"], id="dropped"),
        pytest.param(Faults.status(403), ["cdn", "hub", "cdn"], id="expired"),
    ],
)
def test_an_address_that_was_kept_may_fail_later(hub: Hub, fault: Any, servers: list[str]) -> None:
    hub.cdn = True
    waits: list[float] = []
    repository = opened(hub, waits)
    read(repository, 0, 8)
    hub.asked.clear()
    hub.faults = [fault]
    assert read(repository, 500_000, 8) == DATA[500_000:500_008]
    assert [asked.server for asked in hub.asked] == servers
    assert waits == ([] if "hub" in servers else [0.5])


def test_a_renamed_repository_is_found(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")

    def renamed(call: Call) -> None:
        if "/old" in call.handler.path:
            call.answer(307, headers={"Location": f"/api/models/{NAME}?blobs=true"})
        else:
            call.answer(200, listing({"rfilename": "a.json", "size": 1}))

    hub.listing = renamed
    assert open_repository("org/old", endpoint=hub.url).names() == ["a.json"]
    assert {(asked.server, asked.token) for asked in hub.asked} == {("hub", "Bearer hf_secret")}


def test_a_listing_elsewhere_is_not_shown_the_token(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")

    def moved(call: Call) -> None:
        hub.listing = None
        call.answer(302, headers={"Location": f"{hub.elsewhere}/api/models/{NAME}"})

    hub.listing = moved
    assert opened(hub).names() == ["config.json", "model.safetensors"]
    assert [(asked.server, asked.token) for asked in hub.asked] == [("hub", "Bearer hf_secret"), ("cdn", "")]


def test_a_refusal_elsewhere_names_the_host(hub: Hub) -> None:
    hub.cdn, hub.always = True, Faults.status(403)
    with pytest.raises(MlaToolsError, match=r"127.0.0.1:\d+, where the hub redirects to, answers 403"):
        read(opened(hub), 0, 8)
    assert [asked.server for asked in hub.asked] == ["hub", "hub", "cdn"]


# --- listings ----------------------------------------------------------------------------------------

LISTINGS = [
    pytest.param(
        Faults.status(404, X_Error_Code="RepoNotFound"),
        "org/name: there is no such repository; if",
        id="none",
    ),
    pytest.param(Faults.status(404), "no such repository, or it has no revision v9; if", id="404"),
    pytest.param(Faults.status(404, X_Error_Code="RevisionNotFound"), "has no revision v9", id="revision"),
    pytest.param(Faults.status(401), "if it is private or gated, log in", id="401"),
    pytest.param(Faults.status(403, X_Error_Code="GatedRepo"), "org/name is gated", id="gated"),
    pytest.param(
        Faults.status(401, X_Error_Message="Invalid credentials in Authorization header"),
        r"org/name: the hub does not know the token \(401\); log in",
        id="token",
    ),
    pytest.param(Faults.status(500), "the server answers 500; given up after 4 tries", id="500"),
    pytest.param(lambda call: call.answer(200, b"<html>"), "not a listing of a repository", id="html"),
    pytest.param(lambda call: call.answer(200, b"[]"), "not a listing of a repository", id="list"),
    pytest.param(
        lambda call: call.answer(200, b'{"id": "a/b", "sha": "../x", "siblings": []}'),
        r"not a listing of a repository\n  found   commit \.\./x",
        id="commit",
    ),
    pytest.param(
        lambda call: call.answer(200, b'{"id": "a/b", "siblings": []}'), "not a listing", id="no_commit"
    ),
    pytest.param(
        lambda call: call.answer(200, b'{"id": "a/b", "siblings": [7]}'), "not a listing", id="siblings"
    ),
    *(
        pytest.param(
            lambda call, size=size: call.answer(200, listing({"rfilename": "a.json", "size": size})),
            "a.json: is listed in org/name without its size",
            id=f"size_{size}",
        )
        for size in (None, -1, 1 << 62, "8", 8.0, True, [], {})
    ),
    *(
        pytest.param(lambda call, data=data: call.answer(200, data), text, id=name)
        for name, data, text in (
            ("sha_number", b'{"sha": 7, "siblings": []}', "found   commit 7$"),
            ("sha_control", b'{"sha": "\\u001b", "siblings": []}', r"found   commit '\\x1b'"),
            ("sha_short", b'{"sha": "c0ffee", "siblings": []}', "found   commit c0ffee"),
            ("no_siblings", b'{"sha": "%s"}' % COMMIT.encode(), "found   files None"),
            ("siblings_object", b'{"sha": "%s", "siblings": {}}' % COMMIT.encode(), "found   files {}"),
            ("sibling_list", b'{"sha": "%s", "siblings": [[]]}' % COMMIT.encode(), r"found   files \[\[\]\]"),
            ("key_twice", b'{"sha": "a", "sha": "b", "siblings": []}', "found   a duplicate key: sha"),
            ("deep", b'{"a":' * 100_000, "found   it is nested too deeply"),
            ("digits", b'{"sha": %s}' % (b"9" * 5000), "found   it is not JSON"),
            ("not_text", b"\xff{}", "found   it is not UTF-8 text"),
            ("empty", b"", "found   it is not JSON"),
        )
    ),
]


def listing(*siblings: dict[str, Any]) -> bytes:
    return json.dumps({"id": NAME, "sha": COMMIT, "siblings": siblings}).encode()


@pytest.mark.parametrize(("fault", "text"), LISTINGS)
def test_a_repository_that_cannot_be_listed_is_reported(hub: Hub, fault: Any, text: str) -> None:
    hub.listing = fault
    with pytest.raises(MlaToolsError, match=re.compile(text, re.MULTILINE)) as caught:
        opened(hub, revision="v9")
    assert str(caught.value).replace("\n", "").isprintable()


def test_a_name_that_is_listed_twice_is_a_duplicate(hub: Hub) -> None:
    items = [{"rfilename": name, "size": 1} for name in ("a.json", "A.json", "b.json", "a.json")]
    hub.listing = lambda call: call.answer(200, listing(*items))
    with pytest.raises(CheckpointError, match=r"a.json: is a duplicate in org/name") as caught:
        opened(hub)
    assert len(caught.value.problems) == 1


@pytest.mark.parametrize(
    ("count", "item"),
    [
        pytest.param(10_001, {"size": 1}, id="files"),
        pytest.param(9_000, {}, id="problems"),
    ],
)
def test_a_listing_of_very_many_files_is_refused(hub: Hub, count: int, item: dict[str, Any]) -> None:
    items = [{"rfilename": f"{k}.json", **item} for k in range(count)]
    hub.listing = lambda call: call.answer(200, listing(*items))
    with pytest.raises(CheckpointError) as caught:
        opened(hub)
    if item:
        assert "org/name: has more than 10,000 files" in str(caught.value)
    assert len(caught.value.problems) == (1 if item else 1000)


SHA256 = "5" * 64
TAGS = [
    pytest.param({"lfs": {"sha256": SHA256}, "blobId": "b" * 40}, SHA256, id="lfs"),
    pytest.param({"blobId": "b" * 40}, "b" * 40, id="blob"),
    pytest.param({"blobId": "b" * 40, "lfs": None}, "b" * 40, id="no_lfs"),
    pytest.param({}, "", id="none"),
    *(
        pytest.param({"lfs": {"sha256": tag}, "blobId": "b" * 40}, "", id=f"lfs_{name}")
        for name, tag in (("short", "5" * 63), ("upper", "A" * 64), ("number", 5), ("line", SHA256 + "\n"))
    ),
    *(pytest.param({"blobId": tag}, "", id=f"blob_{tag}") for tag in ("b" * 39, "B" * 40, 7, None, [])),
    *(
        pytest.param({"lfs": lfs, "blobId": "b" * 40}, "", id=f"lfs_is_{lfs}")
        for lfs in ([], "x", 7, {}, {"sha256": None})
    ),
]


@pytest.mark.parametrize(("item", "tag"), TAGS)
def test_a_tag_is_a_hash_or_nothing(hub: Hub, item: dict[str, Any], tag: str) -> None:
    hub.listing = lambda call: call.answer(200, listing({"rfilename": "a.json", "size": 1, **item}))
    assert opened(hub).tag("a.json") == tag


def test_a_listing_is_not_decompressed(hub: Hub) -> None:
    bomb = gzip.compress(bytes(10_000_000))
    hub.listing = lambda call: call.answer(200, bomb, {"Content-Encoding": "gzip"})
    with pytest.raises(
        CheckpointError, match="org/name: the server sends compressed data, which was not requested"
    ):
        opened(hub)
    assert {asked.encoding for asked in hub.asked} == {"identity"}


def test_a_listing_without_an_end_is_refused(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mla_tools.files.hub._MAX_LISTING", 1 << 20)
    sent = 0

    def endless(call: Call) -> None:
        nonlocal sent
        call.handler.wfile.write(OK + b"\r\n")
        call.handler.close_connection = True
        for _ in range(1000):  # 64 MB: more than the sockets hold
            sent += call.handler.wfile.write(b" " * (1 << 16))

    hub.listing = endless
    with pytest.raises(CheckpointError, match="found   more than 1,048,576 bytes"):
        opened(hub)
    assert sent < 64 << 20


def test_a_listing_may_be_long(hub: Hub) -> None:
    padding = b" " * (3 << 20)
    hub.listing = lambda call: call.answer(200, padding + listing({"rfilename": "a.json", "size": 1}))
    assert opened(hub).names() == ["a.json"]


def test_a_revision_is_one_part_of_the_address(hub: Hub) -> None:
    asked: list[str] = []

    def note(call: Call) -> None:
        asked.append(call.handler.path)
        call.answer(200, listing())

    hub.listing = note
    for revision in (None, "refs/pr/1", "../../x?y#z", "\udcff"):
        opened(hub, revision=revision)
    base = "/api/models/org/name"
    assert asked == [
        f"{base}?blobs=true",
        f"{base}/revision/refs%2Fpr%2F1?blobs=true",
        f"{base}/revision/..%2F..%2Fx%3Fy%23z?blobs=true",
        f"{base}/revision/%3F?blobs=true",
    ]


def test_a_listing_leads_to_no_other_place(hub: Hub) -> None:
    strange = [
        "../a.json",
        "/etc/a.json",
        "sub/a.json",
        "..",
        "",
        ".a.json",
        "a\\b.json",
        "a\0.json",
        "a\n.json",
    ]
    strange += ["n" * 256, "名" * 84 + ".json", "\ud800.json"]
    entries: list[dict[str, Any]] = [
        {"rfilename": name, "size": 1} for name in [*strange, "b c.json", "名" * 83 + ".json"]
    ]
    hub.listing = lambda call: call.answer(200, listing(*entries, {"rfilename": 7, "size": 1}))
    assert opened(hub).names() == ["b c.json", "名" * 83 + ".json"]
    others = ["../", "/", "sub/", "..", ".a.json", "a\\b.json", "a\0.json", "a\n.json", *strange[-3:]]
    assert opened(hub).others() == sorted(others)


def broken_folders() -> dict[str, Any]:
    def outside(folder: Path) -> None:
        index(folder, {"a": "model.safetensors", "b": "../b.safetensors", "c": "gone.safetensors"})

    def damaged(folder: Path) -> None:
        data = table({"a": entry("U8", [9], [0, 9])}, b"1234")
        (folder / "model.safetensors").write_bytes(data)

    def long(folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(packed(b"{}", length=1 << 40))

    def pointer(folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")

    def pickles(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")

    def no_config(folder: Path) -> None:
        (folder / "config.json").unlink()

    def twice(folder: Path) -> None:
        (folder / "config.json").write_text('{"a": 1, "a": 2}')

    found = (outside, damaged, long, pointer, pickles, no_config, twice)
    return {break_it.__name__: break_it for break_it in found}


@pytest.mark.parametrize("break_it", broken_folders().values(), ids=broken_folders().keys())
def test_what_is_wrong_with_a_folder_is_wrong_with_a_repository(break_it: Any, tmp_path: Path) -> None:
    folder = folder_with_config(tmp_path / "model")
    shard(folder, "model.safetensors", "a")
    break_it(folder)

    def problems(place: Any) -> list[tuple[str, str, str, str]]:
        try:
            found = open_checkpoint(place).problems
        except CheckpointError as error:
            found = error.problems
        texts = [(item.subject, item.what, item.needed, item.found) for item in found]
        return [(str(tuple(texts)).replace(str(place), "PLACE"), "", "", "")]

    with running(files_of(folder)) as hub:
        assert problems(opened(hub)) == problems(folder)


# --- the command -------------------------------------------------------------------------------------


@pytest.fixture
def served(sample: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """Serve the sample on the hub that the command asks, away from any folder."""
    monkeypatch.chdir(tmp_path)
    with running(files_of(sample)) as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"  # made of ENDPOINT at import
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield hub


@pytest.mark.parametrize(
    "named",
    [["org/name"], ["hf://org/name"], ["hf://org/name@main"], ["hf://org/name", "--revision", "main"]],
    ids=" ".join,
)
def test_every_way_to_name_a_repository(
    named: list[str], served: Hub, sample: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["plan", *named, "-q"]) == 0
    found = capsys.readouterr().out
    assert "with 8 threads" in found  # of which most wait
    assert cli.main(["plan", *named, "-q", "--threads", "2"]) == 0
    found = capsys.readouterr().out
    assert cli.main(["plan", str(sample), "-q"]) == 0
    assert found == capsys.readouterr().out
    assert cli.main(["inspect", *named, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["path"] == f"hf://org/name@{COMMIT}"


def test_convert_from_a_repository(served: Hub, sample: Path, tmp_path: Path) -> None:
    assert cli.main(["convert", str(sample), "--mlx-path", "wanted", "-q"]) == 0
    assert cli.main(["convert", "hf://org/name", "--mlx-path", "found", "-q"]) == 0
    assert_same_but_for_the_source(tmp_path / "found", tmp_path / "wanted")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["found", "wanted"]


def test_two_revisions_are_wrong_usage(served: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "hf://org/name@main", "--revision", "v2"]) == 2
    assert "names another revision than --revision v2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("hf://org", "write a repository as hf://org/name@revision"),
        ("hf://datasets/org/name", "write a repository as hf://org/name@revision"),
        ("hf://org/name/config.json", "write a repository as hf://org/name@revision"),
        ("hf://org/na me", "hf://org/na me: not a repository name"),
        ("hf://org/name@v2", "hf://org/name@v2: org/name has no revision v2"),
        ("org/other", "org/other: no such folder, and org/other: there is no such repository"),
    ],
)
def test_what_is_no_repository_is_reported(
    source: str, text: str, served: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["inspect", source]) == 1
    assert text in capsys.readouterr().err


def test_download_takes_the_files_first(
    served: Hub, sample: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[Any] = []

    def download(name: str, *, revision: str | None, ignore_patterns: list[str]) -> str:
        asked.append((name, revision))
        return str(sample)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert cli.main(["inspect", "hf://org/name@v2", "--download"]) == 0
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert cli.main(["inspect", "org/name"]) == 0
    assert asked == [("org/name", "v2"), ("org/name", None)]
    assert served.asked == []


@pytest.mark.parametrize("offline", ["0", "1"])
def test_the_environment_is_honoured(sample: Path, tmp_path: Path, offline: str) -> None:
    command = [sys.executable, "-P", "-m", "mla_tools", "inspect", "org/name", "--json"]
    with running(files_of(sample)) as hub:
        settings = {"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_env", "HF_HUB_OFFLINE": offline}
        environment = {**os.environ, **settings, "HF_HOME": str(tmp_path)}
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    if offline == "1":
        assert (done.returncode, hub.asked) == (1, [])
        assert "the repository cannot be downloaded" in done.stderr
    else:
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["path"] == f"hf://org/name@{COMMIT}"
        ours = [asked for asked in hub.asked if NAME in asked.path]  # huggingface_hub asks of its own, too
        assert {asked.token for asked in ours} == {"Bearer hf_env"}
