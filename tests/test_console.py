"""The process of the command: closed streams, signals, strange surroundings, and unexpected errors."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import without_tokenizer

from mla_tools import convert
from mla_tools.cli import main
from mla_tools.console import error_json, printable
from mla_tools.errors import CheckpointError, MlaToolsError, Problem, UsageError
from mla_tools.samples import write_sample

COMMAND = [str(Path(sys.executable).parent / "mla-sanitize")]
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("samples") / "deepseek_v3"
    write_sample("deepseek_v3", folder)
    return without_tokenizer(folder)


def run(
    *argv: object, setup: Callable[[], None] | None = None, **kwargs: Any
) -> subprocess.CompletedProcess[Any]:
    """Run the command in a process; `setup` is called there before it starts."""
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.run([*COMMAND, *map(str, argv)], preexec_fn=setup, **(streams | kwargs))


# --- standard streams --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argv", [["plan", "SRC"], ["plan", "nope", "--json"], ["--help"]], ids=lambda a: a[0]
)
def test_nobody_reads_stdout(argv: list[str], source: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = run(*(str(source) if arg == "SRC" else arg for arg in argv), stdout=writing)
    os.close(writing)
    failed = "nope" in argv
    assert done.returncode == (1 if failed else 141)
    assert ("no such folder" in done.stderr) == failed
    assert "Traceback" not in done.stderr
    assert "Broken" not in done.stderr


def test_nobody_reads_stderr() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = run("plan", "nope", stderr=writing)
    os.close(writing)
    assert (done.returncode, done.stdout) == (1, "")


@pytest.mark.parametrize("argv", [["plan", "SRC"], ["plan", "SRC", "--json"], ["--help"]], ids=" ".join)
def test_stdout_takes_no_more(argv: list[str], source: Path, tmp_path: Path) -> None:
    # A limit on how large a file becomes is a full disk on every system.
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))

    with (tmp_path / "stdout").open("w") as full:
        done = run(*(str(source) if arg == "SRC" else arg for arg in argv), stdout=full, setup=limit)
    assert done.returncode == 1
    assert done.stderr == "error: the result cannot be printed: File too large\n"


@pytest.mark.parametrize("closed", [[0], [1], [2], [0, 1, 2]], ids=str)
def test_a_closed_stream_is_no_file_of_the_output(closed: list[int], source: Path, tmp_path: Path) -> None:
    def close() -> None:
        for fd in closed:
            os.close(fd)

    out = tmp_path / "out"
    done = run("convert", source, "--mlx-path", out, setup=close)
    assert done.returncode == 0
    assert main(["verify", str(out)]) == 0
    assert (done.stdout == "") == (1 in closed)
    failed = run("plan", "nope", setup=close)
    assert (failed.returncode, failed.stdout) == (1, "")
    assert ("no such folder" in failed.stderr) == (2 not in closed)


# --- signals -----------------------------------------------------------------------------------------

BUSY = """
import os, signal, sys, time
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
woken, wakes = os.pipe()
os.set_blocking(wakes, False)
signal.set_wakeup_fd(wakes)  # a signal that comes just before the wait ends it too
from mla_tools import __main__, execute

def work(plan, output, workload, device, progress):
    try:
        print("working", flush=True)
        os.read(woken, 1)
    finally:
        print("ending", flush=True)
        sys.stdin.readline()

execute._run = work
sys.exit(__main__.main())
"""


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("again", [signal.SIGINT, signal.SIGTERM])
def test_a_second_request_to_end_changes_nothing(
    first: signal.Signals, again: signal.Signals, source: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    argv = [sys.executable, "-c", BUSY, "convert", str(source), "--mlx-path", str(out)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(argv, text=True, **pipes) as process:
        assert process.stdout
        assert process.stdin
        assert process.stdout.readline() == "working\n"
        process.send_signal(first)
        assert process.stdout.readline() == "ending\n"
        process.send_signal(again)
        said = process.communicate("\n")[1]
    assert process.returncode == 130
    assert said == f"interrupted; {out} is unfinished: run the same command with --resume to finish it\n"


def test_an_interruption_while_the_command_is_imported_is_a_sentence(tmp_path: Path) -> None:
    code = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
class Finder:
    def find_spec(self, name, *args):
        if name == "mla_tools.plan":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder())
from mla_tools import __main__
sys.exit(__main__.main())
"""
    command = [sys.executable, "-c", code, "plan", "x"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted; nothing was written\n")
    done = subprocess.run([*command, "--json"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "interrupted; nothing was written\n")
    assert json.loads(done.stdout) == {"error": "interrupted; nothing was written", "problems": []}


def test_a_signal_after_the_end_changes_nothing(source: Path) -> None:
    code = """
import atexit, os, signal, sys
from mla_tools import __main__
code = __main__.main()
for number in (signal.SIGINT, signal.SIGTERM):
    os.kill(os.getpid(), number)
sys.exit(code)
"""
    done = subprocess.run([sys.executable, "-c", code, "plan", str(source)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_signal_that_is_ignored_stays_so(source: Path) -> None:
    code = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)
from mla_tools import __main__, convert
plan = convert.make_plan
def interrupted(*args):
    os.kill(os.getpid(), signal.SIGINT)
    return plan(*args)
convert.make_plan = interrupted
sys.exit(__main__.main())
"""
    done = subprocess.run([sys.executable, "-c", code, "plan", str(source)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("as_json", [False, True])
def test_an_interruption_is_told_as_json_too(
    as_json: bool, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(convert, "open_checkpoint", interrupt)
    monkeypatch.setattr(convert, "locate", lambda *args, **kwargs: None)
    assert main(["plan", "SRC", *(["--json"] if as_json else [])]) == 130
    out, err = capsys.readouterr()
    assert err == "interrupted; nothing was written\n"
    assert (json.loads(out)["error"] if as_json else out) == (err.strip() if as_json else "")


# --- unexpected errors -------------------------------------------------------------------------------

UNFORESEEN: dict[str, tuple[Exception, str]] = {
    "defect": (ZeroDivisionError("division by zero"), "itself failed (ZeroDivisionError: division by zero)"),
    "without a text": (KeyError(), "itself failed (KeyError)"),
    "escape": (ValueError("\x1b[2J"), r"itself failed (ValueError: \x1b[2J)"),
    "disk": (OSError(5, "Input/output error", "/some/file"), "error: /some/file: Input/output error"),
    "files": (OSError(24, "Too many open files"), "error: Too many open files (ulimit -n shows how many"),
    "memory": (MemoryError(), "there is not enough memory; a conversion needs less"),
    "recursion": (RecursionError("maximum recursion depth exceeded"), "itself failed (RecursionError"),
    "text": (UnicodeEncodeError("utf-8", "\udcff", 0, 1, "surrogates"), "itself failed (UnicodeEncodeError"),
}


@pytest.mark.parametrize(("error", "text"), UNFORESEEN.values(), ids=UNFORESEEN)
def test_every_error_is_a_sentence_and_json_and_a_traceback_only_on_demand(
    error: Exception, text: str, source: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise error

    monkeypatch.setattr(convert, "make_plan", fail)
    assert main(["plan", str(source)]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert text in err
    assert err.count("\n") == 1
    assert main(["plan", str(source), "--json"]) == 1
    out, again = capsys.readouterr()
    assert again == err
    assert f"error: {printable(json.loads(out)['error'])}\n" == err
    assert main(["plan", str(source), "--debug"]) == 1
    out, long = capsys.readouterr()
    assert long.startswith("Traceback (most recent call last):\n")
    assert long.endswith(err)


@pytest.mark.parametrize("argv", [["plan"], ["nope"], [], ["plan", "x", "--threads", "0"]], ids=" ".join)
def test_wrong_usage_is_json_too(argv: list[str], capsys: Capture) -> None:
    assert main([*argv, "--json"]) == 2
    out, err = capsys.readouterr()
    assert err.endswith(f"error: {json.loads(out)['error']}\n")


# --- errors as JSON ----------------------------------------------------------------------------------


def test_error_json_has_each_problem_on_its_own() -> None:
    problems = [Problem(f"layers.{k}.w", "missing", "[2]", "nothing", "Look.") for k in range(3)]
    value = error_json(CheckpointError(problems))
    assert json.loads(json.dumps(value)) == value
    assert value["error"] == str(CheckpointError(problems))
    assert value["problems"] == [
        {
            "subject": f"layers.{k}.w",
            "what": "missing",
            "needed": "[2]",
            "found": "nothing",
            "cause": "Look.",
            "reason": "",
            "lost": [],
        }
        for k in range(3)
    ]


@pytest.mark.parametrize("error", [MlaToolsError("no room"), UsageError("no room")])
def test_error_json_of_other_errors(error: MlaToolsError) -> None:
    assert error_json(error) == {"error": "no room", "problems": []}


# --- arguments ---------------------------------------------------------------------------------------

ARGUMENTS: dict[str, tuple[list[str], int, str]] = {
    "no threads": (["plan", "SRC", "--threads", "0"], 2, "--threads: 0: give a number from 1 to 1024"),
    "threads": (["plan", "SRC", "--threads", "1" + "0" * 30], 2, "give a number from 1 to 1024"),
    "threads of digits": (["plan", "SRC", "--threads", "٣"], 2, "give a number from 1 to 1024"),
    "memory": (["plan", "SRC", "--max-memory", "9" * 400], 2, "give a size such as 2GB or 500MB"),
    "little memory": (["plan", "SRC", "--max-memory", "1"], 1, "at least --max-memory"),
    "seed": (["sample", "deepseek_v3", "OUT", "--seed", "-1"], 2, "--seed: -1: give a number, 0 or more"),
    "a place": (
        ["sample", "deepseek_v3", "/dev/null/x"],
        1,
        "/dev/null/x cannot be written: Not a directory",
    ),
    "a long name": (["verify", "a" * 300], 1, "cannot be read\n  found   File name too long"),
    "a long source": (["plan", "a" * 300], 1, "no such folder"),
    "a long output": (["convert", "SRC", "--mlx-path", "a" * 300], 1, "cannot be made: File name too long"),
    "no folder": (["verify", "nope"], 1, "nope: there is no such folder"),
    "no output": (["convert", "SRC", "--mlx-path", ""], 2, "--mlx-path: give the folder to write"),
    "both": (["convert", "SRC", "--resume", "--overwrite"], 2, "not allowed with argument --resume"),
    "root": (["convert", "SRC", "--mlx-path", "/"], 1, "Cannot save to the path / as it already exists"),
    "gpu": (
        ["convert", "SRC", "--mlx-path", "OUT", "--device", "gpu"],
        2,
        "MLX finds no GPU on this machine",
    ),
    "hash": (
        ["convert", "SRC", "--mlx-path", "OUT", "--check-source"],
        1,
        "the hub's hash is not known",
    ),
}


@pytest.mark.parametrize(("argv", "code", "text"), ARGUMENTS.values(), ids=ARGUMENTS)
def test_strange_arguments_have_their_sentence(
    argv: list[str],
    code: int,
    text: str,
    source: Path,
    tmp_path: Path,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mlx.core.is_available", lambda device: False)
    places = {"SRC": str(source), "OUT": str(tmp_path / "out")}
    assert main([places.get(arg, arg) for arg in argv]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert text in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("flags", [[], ["--keep-mtp"]], ids=["plain", "mtp"])
@pytest.mark.parametrize("path", [".", "", "../here/."], ids=["dot", "absolute", "through above"])
def test_the_working_directory_may_be_the_output(
    path: str, flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, fmt = ("deepseek_v4", "deepseek-v4") if flags else ("deepseek_v3", "bf16")
    write_sample(family, tmp_path / "source", fmt)
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    out = path or str(here)
    assert main(["convert", "../source", "--mlx-path", out, "--resume", *flags]) == 0
    assert main(["verify", out]) == 0
    mtp = [tmp_path / "here-mtp"] if flags else []
    assert sorted(tmp_path.iterdir()) == sorted([here, tmp_path / "source", *mtp])


def test_paths_need_not_be_text(source: Path, tmp_path: Path) -> None:
    strange, out = (os.fsencode(tmp_path) + name for name in (b"/s\xff", b"/o\xfe"))
    Path(os.fsdecode(strange)).symlink_to(source)
    for argv in ([b"inspect", strange], [b"convert", strange, b"--mlx-path", out], [b"verify", out]):
        done = subprocess.run([*COMMAND, *argv], capture_output=True)
        assert done.returncode == 0, done.stderr
        assert b"\\udcf" in done.stdout
        json.loads(subprocess.run([*COMMAND, *argv, b"--json", *resumed(argv)], capture_output=True).stdout)


def resumed(argv: list[bytes]) -> list[bytes]:
    return [b"--resume"] if argv[0] == b"convert" else []


def test_a_limit_on_files_is_a_sentence(source: Path, tmp_path: Path) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))

    done = run("convert", source, "--mlx-path", tmp_path / "out", setup=limit)
    assert done.returncode == 1
    assert "File too large" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("files", [6, 8, 12, 40])
def test_few_open_files_are_a_sentence(files: int, source: Path, tmp_path: Path) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))

    done = run("convert", source, "--mlx-path", tmp_path / "out", setup=limit)
    assert done.returncode == 1
    assert "cannot build this model" not in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("error: ")


def test_the_limit_on_open_files_is_raised_as_far_as_is_allowed(source: Path, tmp_path: Path) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (20, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))

    assert run("convert", source, "--mlx-path", tmp_path / "out", setup=limit).returncode == 0


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("plain\ttext\n", "plain\ttext\n"),
        ("\x1b[31mred\x1b[0m", r"\x1b[31mred\x1b[0m"),
        ("\r\x08\x7f\x9b", r"\r\x08\x7f\x9b"),
        ("\u202eabc\u2066", r"\u202eabc\u2066"),
        ("ü 中文", "ü 中文"),
    ],
)
def test_nothing_that_is_printed_acts_on_a_terminal(text: str, wanted: str) -> None:
    assert printable(text) == wanted
