"""What the command prints, and how unexpected errors are handled."""

from __future__ import annotations

import errno
import json
import os
import re
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TextIO

from mla_tools.errors import CheckpointError, MlaToolsError

__all__ = ["INTERRUPTED", "PIPE_CLOSED", "ended", "error_json", "printable", "say", "show", "show_json"]

INTERRUPTED = 130
PIPE_CLOSED = 141  # what a shell gives for a process that SIGPIPE ended

# All that moves a terminal's cursor, colours it or turns the direction of writing; tabs and line ends stay.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """Return a text in which nothing of a file can act on a terminal: control characters are escaped."""
    return _CONTROLS.sub(lambda found: ascii(found[0])[1:-1], text)


class ClosedError(Exception):
    """Nobody reads stdout any more."""


def show(text: str) -> None:
    """Print a result on stdout; ClosedError if nobody reads it, MlaToolsError if it cannot be taken."""
    try:
        _write(sys.stdout, text)
    except BrokenPipeError as error:
        _forget(sys.stdout)
        raise ClosedError from error
    except OSError as error:
        _forget(sys.stdout)
        raise MlaToolsError(f"the result cannot be printed: {error.strerror}") from error


def show_json(value: object) -> None:
    """Print a result on stdout as JSON."""
    show(json.dumps(value, indent=2, allow_nan=False))


def say(text: str) -> None:
    """Print a message on stderr, if anybody still reads there."""
    try:
        _write(sys.stderr, text)
    except (OSError, ValueError):
        _forget(sys.stderr)


def _write(stream: TextIO, text: str) -> None:
    stream.write(printable(text) + "\n")
    stream.flush()


def error_json(error: Exception) -> dict[str, Any]:
    """Return an error as plain values; a checkpoint's problems one by one."""
    problems = error.problems if isinstance(error, CheckpointError) else ()
    return {"error": str(error), "problems": [problem.values() for problem in problems]}


def ended(work: Callable[[], int], *, as_json: bool, debug: bool) -> int:
    """Return the exit code of a piece of work, after printing a sentence for whatever it raised.

    This is the one place where an error becomes text: nothing passes it but what ends the process at once.
    With `as_json` the error is on stdout too, as JSON; with `debug` the traceback is on stderr.
    """
    try:
        return work()
    except MlaToolsError as error:
        return _failed(error, error.exit_code, as_json)
    except ClosedError:
        return PIPE_CLOSED
    except KeyboardInterrupt as error:
        notes = getattr(error, "__notes__", ["nothing was written"])
        return _failed(MlaToolsError("; ".join(["interrupted", *notes])), INTERRUPTED, as_json)
    except Exception as error:
        if debug:
            say(traceback.format_exc())
        return _failed(_sentence(error), 1, as_json)


def _failed(error: Exception, code: int, as_json: bool) -> int:
    if as_json:
        with suppress(ClosedError, MlaToolsError):
            show_json(error_json(error))
    before = "" if code == INTERRUPTED else "error: "
    say("\n".join([f"{before}{error}", *getattr(error, "__notes__", ())]))
    return code


def _forget(stream: TextIO) -> None:
    """Throw away what a stream could not take, or Python would try again at its end, and exit with 120."""
    with suppress(OSError, ValueError):
        fd = os.open(os.devnull, os.O_WRONLY)
        os.dup2(fd, stream.fileno())
        os.close(fd)


def _sentence(error: Exception) -> MlaToolsError:
    """Return an unexpected error as one that says what it is and what to do."""
    notes = getattr(error, "__notes__", ())
    if isinstance(error, OSError) and error.errno is not None:
        what = error.strerror or os.strerror(error.errno)
        named = [str(name) for name in (error.filename, error.filename2) if isinstance(name, (str, bytes))]
        text = ": ".join([*named, what])
        if error.errno in (errno.EMFILE, errno.ENFILE):
            text += " (ulimit -n shows how many are allowed)"
    elif isinstance(error, MemoryError):
        text = "there is not enough memory; a conversion needs less with a smaller --max-memory"
    else:
        detail = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        text = (
            f"mla-sanitize itself failed ({detail}). This is a defect, whatever the input was: please report"
            f" it, with the output of --debug."
        )
    made = MlaToolsError(text)
    for note in notes:
        made.add_note(note)
    return made
