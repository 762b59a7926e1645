"""The last steps of an output: the files beside the weights, then the final names, the index last."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from typing import Any

from mla_tools.errors import DamagedError, MlaToolsError
from mla_tools.files.checkpoint import Companion
from mla_tools.files.directory import Directory, partial_name, sync
from mla_tools.files.writer import sha256_of
from mla_tools.output.folder import check_kept, end_journals
from mla_tools.output.journal import State
from mla_tools.output.record import CONFIG, INDEX, RECORD, made, pretty, record_of, sha256_hex
from mla_tools.plan import Plan

__all__ = ["publish"]

_COPIED_AT_ONCE = 8 << 20


def publish(plan: Plan, folder: Directory, provenance: Mapping[str, Any], *, checked: bool = False) -> None:
    """Make an output complete whose weight files are sealed, or finish what an earlier run began of it.

    `checked`: the content of the source was compared with the hashes of the hub.
    """
    if not folder.is_path():
        raise DamagedError(
            f"{folder.path} was moved or replaced while it was written; put it back, and finish it with"
            " --resume"
        )
    sealed = State.of(folder).sealed
    digests: dict[str, tuple[int, str]] = {}
    for file in plan.files:
        check_kept(folder, file)
        digests[file.name] = (file.layout.size, sealed[file.name])
    for companion in plan.copied:
        digests[companion.name] = _copied(folder, companion)
    small = {name: text.encode() for name, text in plan.added.items()}
    small |= {CONFIG: pretty(plan.config), INDEX: pretty(_index(plan))}
    digests |= {name: (len(data), sha256_hex(data)) for name, data in small.items()}
    small[RECORD] = record_of({**provenance, **made(plan, digests, checked)})
    for name, data in small.items():
        _write(folder, name, data)
    for name in (*sorted(digests.keys() - {CONFIG, INDEX}), RECORD, CONFIG):
        _name_finally(folder, name)
    folder.sync()
    _name_finally(folder, INDEX)
    folder.sync()
    end_journals(folder)


def _index(plan: Plan) -> dict[str, Any]:
    weight_map = {name: file.name for file in plan.files for name in file.tensors}
    metadata = {"total_size": plan.nbytes, "total_parameters": plan.parameters}
    return {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}


def _write(folder: Directory, name: str, data: bytes) -> None:
    """Write a small file under its temporary name, unless an earlier run has given it its final name."""
    if name in folder and folder.read(name, len(data)) == data:
        return
    folder.remove(partial_name(name))
    folder.write(partial_name(name), data)


def _copied(folder: Directory, companion: Companion) -> tuple[int, str]:
    """Return the size and the sha256 of a companion, which lies under its temporary or its final name."""
    name = companion.name
    source = companion.file.open()
    fd = -1
    digest = hashlib.sha256()
    try:
        if name not in folder:
            folder.remove(partial_name(name))
            fd = folder.create(partial_name(name))
        for offset in range(0, source.size, _COPIED_AT_ONCE):
            piece = source.read(offset, min(_COPIED_AT_ONCE, source.size - offset)).data
            digest.update(piece)
            view = memoryview(piece)
            while fd >= 0 and view:
                view = view[os.write(fd, view) :]
        if fd >= 0:
            sync(fd)
        else:  # an earlier run has come as far as this, or somebody else has
            fd = folder.open(name)
            if os.fstat(fd).st_size != source.size or sha256_of(fd) != digest.hexdigest():
                raise _taken(folder, name)
        return source.size, digest.hexdigest()
    finally:
        source.close()
        if fd >= 0:
            os.close(fd)


def _name_finally(folder: Directory, name: str) -> None:
    """Give a file its final name, unless it has it already."""
    partial = partial_name(name)
    if partial in folder:
        folder.rename(partial, name)


def _taken(folder: Directory, name: str) -> MlaToolsError:
    return MlaToolsError(f"{folder.path / name} exists already; remove it or choose another place")
