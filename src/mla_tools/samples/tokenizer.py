"""A tokenizer for samples: every byte is a token."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["write_json", "write_tokenizer"]

_EOS = "<|end|>"


def write_tokenizer(folder: Path) -> None:
    """Write a tokenizer of bytes, which knows every text and needs no training: 257 entries."""
    # The printable stand-ins for bytes that byte-level tokenizers use: bytes that are printable stand
    # for themselves, the others for the characters from 256 on.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {byte: chr(byte) for byte in printable}
    letters |= {byte: chr(256 + n) for n, byte in enumerate(b for b in range(256) if b not in letters)}
    vocab = {letters[byte]: byte for byte in range(256)} | {_EOS: 256}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    write_json(
        folder / "tokenizer.json",
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [{"id": 256, "content": _EOS, **special}],
            "normalizer": None,
            "pre_tokenizer": byte_level,
            "post_processor": None,
            "decoder": byte_level,
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": False,
                "byte_fallback": False,
                "vocab": vocab,
                "merges": [],
            },
        },
    )
    write_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": _EOS, "model_max_length": 4096},
    )
    write_json(folder / "generation_config.json", {"eos_token_id": 256})


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write an object as the hub's files have it."""
    path.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n")
