"""The process of the command: `mla-sanitize`, and `python -m mla_tools`.

What surrounds the command is made safe first, before anything is imported that is not in Python itself: the
path, the standard streams, signals. `python -m` has by then imported a few modules of Python, from the
working directory if they are there; only `python -P -m mla_tools` is as safe as `mla-sanitize`.
"""

import os
import sys

from mla_tools.isolation import trusted_path

# Before any other import: it would find what lies in the working directory.
sys.path[:] = trusted_path()

import signal  # noqa: E402

# Open files at a time: 64 of the source, each file that is written, and what Python needs itself.
_OPEN_FILES = 4096


def main() -> int:
    """Run the command with the arguments of this process, and return its exit code."""
    try:
        _catch_signals()
        _open_streams()
        _allow_open_files()
        from mla_tools.cli import main

        return main()
    except KeyboardInterrupt:  # before the command could say so itself
        if "--json" in sys.argv:
            sys.stdout.write('{"error": "interrupted; nothing was written", "problems": []}\n')
        sys.stderr.write("interrupted; nothing was written\n")
        return 130
    finally:
        # Python gives its own handlers up at its end, and a signal would then change the exit code.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)


def _catch_signals() -> None:
    """Take the first request to end as Ctrl-C, and no other one while what is done is being kept."""
    asked = False

    def end(number: int, frame: object) -> None:
        nonlocal asked
        if not asked:
            asked = True
            raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        # nohup and a shell that runs this in the background have them ignored.
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, end)


def _open_streams() -> None:
    """Give a standard stream that is closed a place to go.

    The next file that is opened would get its number, and with it what is written to that stream.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")  # noqa: PTH123, SIM115
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: PTH123, SIM115
    for stream in (sys.stdout, sys.stderr):
        # A name that is no text can be printed, as what stands for its bytes.
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]


def _allow_open_files() -> None:
    """Raise the number of files that may be open at a time, which is 256 on macOS, as far as is allowed."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(_OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        except (OSError, ValueError):
            return  # then it has to do with what there is


if __name__ == "__main__":
    sys.exit(main())
