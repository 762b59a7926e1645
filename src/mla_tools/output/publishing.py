"""The last steps of an output: the files beside the weights, then the final names, the index last."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from typing import Any

from mla_tools.errors import DamagedError
from mla_tools.files.checkpoint import Planned
from mla_tools.files.directory import Directory, partial_name, sync, write_all
from mla_tools.files.place import pieces
from mla_tools.files.writer import sha256_in
from mla_tools.output.folder import check_kept, end_journals
from mla_tools.output.journal import State, read_journals
from mla_tools.output.record import CONFIG, INDEX, RECORD, made, pretty, record_of, sha256_hex
from mla_tools.plan import Plan

__all__ = ["publish"]


def publish(plan: Plan, folder: Directory, provenance: Mapping[str, Any], *, checked: bool = False) -> None:
    """Make an output complete whose weight files are sealed, or finish what an earlier run began of it.

    `checked`: the content of the source was compared with the hashes of the hub.
    """
    if not folder.is_path():
        raise DamagedError(
            f"{folder.path} was moved or replaced while it was written; put it back, and finish it with"
            " --resume"
        )
    sealed = State.of(read_journals(folder)).sealed
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


def _copied(folder: Directory, companion: Planned) -> tuple[int, str]:
    """Return the size and the sha256 of a companion, which lies under its temporary or its final name."""
    name, partial = companion.name, partial_name(companion.name)
    source = companion.file.open()
    try:
        digest = hashlib.sha256()
        if status := folder.status(name):  # an earlier run has come as far as this, or somebody else has
            for piece in pieces(source, source.size):
                digest.update(piece)
            if status.st_size != source.size or sha256_in(folder, name) != digest.hexdigest():
                folder.check_free(name)
        else:
            folder.remove(partial)
            fd = folder.create(partial)
            try:
                for piece in pieces(source, source.size):
                    digest.update(piece)
                    write_all(fd, piece)
                sync(fd)
            finally:
                os.close(fd)
        return source.size, digest.hexdigest()
    finally:
        source.close()


def _name_finally(folder: Directory, name: str) -> None:
    """Give a file its final name, unless it has it already."""
    partial = partial_name(name)
    if partial in folder:
        folder.rename(partial, name)
