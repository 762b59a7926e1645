"""A fuzzer of the header parser: any bytes are read, or refused with a sentence that can be printed.

`python tests/attacks/fuzz_headers.py [libFuzzer's options] [FOLDER ...]`; the corpus is in the code below.
"""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).parent.parent))

with atheris.instrument_imports(include=["mla_tools"]):
    from mla_tools.errors import CheckpointError
    from mla_tools.files.safetensors import read_header

from attacks.hostile import entry, packed, sound, table
from attacks.mutations import Hollow
from attacks.running import run

CORPUS = (
    sound({"a.0.weight": ("BF16", [2, 4]), "a.1.weight": ("F32", [3]), "b": ("U8", [])}, {"format": "pt"}),
    table({"a": entry("U8", [4], [0, 4]), "b": entry("U8", [4], [2, 6])}, bytes(6)),
    table({"a": entry("F32", [1 << 40, 1 << 40, 0], [0, 0])}),
    packed(b'{"a":{"dtype":"U8","dtype":"U8","shape":[4],"data_offsets":[0,4]}}', bytes(4)),
    packed(b'{"a":' + b"[" * 500 + b"]" * 500 + b"}"),
    packed(b"{}", length=1 << 63),
    b"version https://git-lfs.github.com/spec/v1\n",
)


def one_input(data: bytes) -> None:
    # The first bytes say how long the header is, which only few mutations would keep in step.
    if data[:1] == b"{":
        end = data.rfind(b"}") + 1
        data = packed(data[:end], data[end:])
    try:
        header = read_header(Hollow("model.safetensors", data, len(data)))
    except CheckpointError as error:
        str(error).encode()
        return
    spans = sorted((item.offset, item.offset + item.spec.nbytes) for item in header.entries.values())
    start = 8 + int.from_bytes(data[:8], "little")
    ends = [(start, start), *spans, (len(data), len(data))]
    assert all(before[1] == after[0] for before, after in pairwise(ends)), "bytes of no tensor, or of two"


if __name__ == "__main__":
    run(one_input, [*CORPUS, *(data[8:] for data in CORPUS)])
