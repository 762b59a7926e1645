"""Where modules may come from: never the working directory, in which a stranger's checkpoint may lie."""

# ruff: noqa: PTH116, PTH117, PTH119, PTH120
# pathlib would have to be imported, from wherever it may lie.

import os
import sys

__all__ = ["trusted_path"]

# What an installation of Python calls the folders of its packages; somebody may be working in one.
_PACKAGES = ("site-packages", "dist-packages")


def trusted_path() -> list[str]:
    """Return sys.path without the working directory, by whatever name and for whatever reason it is there.

    `python -m` puts it first, and an empty part of PYTHONPATH stands for it.
    """
    here = _identity(os.curdir)
    return [
        entry for entry in sys.path if os.path.isabs(entry) and (_packages(entry) or _identity(entry) != here)
    ]


def _packages(entry: str) -> bool:
    return os.path.basename(entry) in _PACKAGES or entry == os.path.dirname(os.__file__)


def _identity(path: str) -> tuple[int, int] | str:
    """Return by what a folder is known under any of its names."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return path
    return status.st_dev, status.st_ino
