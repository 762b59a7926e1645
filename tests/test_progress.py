"""Progress on stderr: a bar on a terminal, otherwise a line from time to time."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from mla_tools.convert import Progress
from mla_tools.progress import Bar, Lines, telling

Capture = pytest.CaptureFixture[str]

OUT, MTP = Path("out"), Path("out-mtp")
GB = 10**9


class Clock:
    """A time that passes on request."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


def lines(steps: list[tuple[float, int]], capsys: Capture, total: int = 100 * GB) -> list[str]:
    """Return what is printed where so many bytes are done after so many seconds."""
    clock = Clock()
    show = Lines(clock)
    for seconds, done in steps:
        clock.now = 1000 + seconds
        show(Progress(OUT, done, total))
    out, err = capsys.readouterr()
    assert out == ""
    return err.splitlines()


def test_nothing_is_said_of_what_is_done_in_seconds(capsys: Capture) -> None:
    assert lines([(k / 10, k * GB) for k in range(101)], capsys) == []
    # Nor where it ends with the first long wait.
    assert lines([(0, 0), (11, 100 * GB)], capsys) == []


def test_a_line_for_each_tenth_but_not_more_often_than_each_ten_seconds(capsys: Capture) -> None:
    # A second for 0.5 %: every tenth takes 20 seconds.
    slow = lines([(k, k * GB // 2) for k in range(201)], capsys)
    assert slow == [
        f"out: {share} % written, {share}.0 GB of 100.0 GB, {left}"
        for share, left in [
            (10, "about 3 min left"),
            (20, "about 3 min left"),
            (30, "about 2 min left"),
            (40, "about 2 min left"),
            (50, "about 2 min left"),
            (60, "about 1 min left"),
            (70, "about 1 min left"),
            (80, "about 1 min left"),
            (90, "less than a minute left"),
        ]
    ]
    # A second for 4 %.
    assert [line.split()[1] for line in lines([(k, 4 * k * GB) for k in range(26)], capsys)] == ["40", "80"]


def test_a_line_now_and_then_where_a_tenth_takes_hours(capsys: Capture) -> None:
    found = lines([(60 * k, k * GB // 60) for k in range(61)], capsys)
    assert len(found) == 6
    assert found[0] == "out: 0 % written, 166.7 MB of 100.0 GB, about 5990 min left"


def test_what_was_done_before_is_no_speed(capsys: Capture) -> None:
    assert lines([(0, 50 * GB), (100, 60 * GB)], capsys) == [
        "out: 60 % written, 60.0 GB of 100.0 GB, about 7 min left"
    ]


def test_each_folder_is_told_of_by_itself(capsys: Capture) -> None:
    clock = Clock()
    show = Lines(clock)
    for folder in (OUT, MTP):
        for done in (0, GB):
            show(Progress(folder, done, 4 * GB))
            clock.now += 60
    assert capsys.readouterr().err.splitlines() == [
        f"{folder}: 25 % written, 1.0 GB of 4.0 GB, about 3 min left" for folder in (OUT, MTP)
    ]


def test_a_bar_on_a_terminal_for_each_folder(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with telling() as show:
        assert isinstance(show, Bar)
        for folder in (OUT, MTP):
            for done in (0, GB, 4 * GB):
                show(Progress(folder, done, 4 * GB))
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("4.0/4.0 GB") >= 2


def test_lines_where_stderr_is_no_terminal(capsys: Capture) -> None:
    with telling(io.StringIO()) as show:
        assert isinstance(show, Lines)
        show(Progress(OUT, 0, 0))
    assert capsys.readouterr().err == ""
