"""Tokenizers for samples, in which every byte is a token: a tokenizer.json, or Kimi's form of tiktoken."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["write_json", "write_tiktoken", "write_tokenizer"]

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


# What a tokenizer's own code does in the checkpoints that bring some: it reads the file in tiktoken's form.
_CODE = '''\
"""The tokenizer of a sample of mla-tools, whose vocabulary is a file in the form of tiktoken."""

import base64

from transformers import PreTrainedTokenizer


class TikTokenTokenizer(PreTrainedTokenizer):
    vocab_files_names = {"vocab_file": "tiktoken.model"}
    model_input_names = ["input_ids", "attention_mask"]

    def __init__(self, vocab_file, **kwargs):
        with open(vocab_file, encoding="ascii") as file:
            lines = [line.split() for line in file]
        self.ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
        self.tokens = {rank: token for token, rank in self.ranks.items()}
        super().__init__(**kwargs)

    @property
    def vocab_size(self):
        return len(self.ranks)

    def get_vocab(self):
        found = {token.decode("latin-1"): rank for token, rank in self.ranks.items()}
        return found | self.added_tokens_encoder

    def _tokenize(self, text, **kwargs):
        return [bytes([byte]).decode("latin-1") for byte in text.encode()]

    def _convert_token_to_id(self, token):
        return self.ranks[token.encode("latin-1")]

    def _convert_id_to_token(self, index):
        return self.tokens.get(index, b"?").decode("latin-1")

    def convert_tokens_to_string(self, tokens):
        return "".join(tokens).encode("latin-1").decode(errors="replace")
'''


def write_tiktoken(folder: Path) -> None:
    """Write a tokenizer of bytes as Kimi's repositories have it: a vocabulary for tiktoken, and the code."""
    lines = (f"{base64.b64encode(bytes([byte])).decode()} {byte}\n" for byte in range(256))
    (folder / "tiktoken.model").write_text("".join(lines))
    (folder / "tokenization_kimi.py").write_text(_CODE)
    added = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    write_json(
        folder / "tokenizer_config.json",
        {
            "added_tokens_decoder": {"256": {"content": _EOS, **added}},
            "auto_map": {"AutoTokenizer": ["tokenization_kimi.TikTokenTokenizer", None]},
            "eos_token": _EOS,
            "model_max_length": 4096,
            "tokenizer_class": "TikTokenTokenizer",
        },
    )
    write_json(folder / "generation_config.json", {"eos_token_id": 256})


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write an object as the hub's files have it."""
    path.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n")
