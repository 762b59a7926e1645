"""JSON of others: objects without duplicate keys, without NaN, infinity and numbers that are read as it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from typing import Any

from mla_tools.files.place import shown

__all__ = ["NotJsonError", "parse_object"]


class NotJsonError(ValueError):
    """A file holds a number that Python reads and writes, and that JSON does not have."""


def parse_object(data: bytes) -> tuple[dict[str, Any], list[str]]:
    """Return the JSON object in `data`, and every duplicate key of its objects.

    Raises ValueError with the end of a sentence ("is not JSON: …") when there is no object, and its
    NotJsonError for NaN, for infinity, and for a number that is too large to be read as anything else.
    """
    twice: list[str] = []

    def gather(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            seen: set[str] = set()
            twice.extend(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        return found

    def load(hook: Callable[[list[tuple[str, Any]]], dict[str, Any]] | None) -> Any:
        return json.loads(text, object_pairs_hook=hook, parse_float=_finite, parse_constant=_refuse_constant)

    try:
        text = data.decode()
        value = load(None)
        if not _has_no_duplicates(value, text):
            value = load(gather)
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8 text (byte {error.start:,})") from error
    except RecursionError as error:
        raise ValueError("is nested too deeply") from error
    except NotJsonError:
        raise
    except ValueError as error:  # also numbers of thousands of digits
        raise ValueError(f"is not JSON: {error}") from error
    if type(value) is not dict:
        raise ValueError("is not a JSON object")
    return value, twice


_SPACE_BEFORE_COLON = re.compile(r'"[ \t\n\r]+:')


def _has_no_duplicates(value: object, text: str) -> bool:
    """Return whether it is certain, without looking at pairs, that some JSON has no duplicate key.

    Each key is followed by a quote and a colon. Escaped quotes, and keys of objects within objects within
    objects, can only make these more than the keys that are counted; space before a colon would make them
    fewer.
    """
    if type(value) is not dict or _SPACE_BEFORE_COLON.search(text):
        return False
    inner = (item for item in value.values() if type(item) is dict)
    return text.count('":') == len(value) + sum(map(len, inner))


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise NotJsonError(f"holds the number {shown(text)}, which is read as infinity")
    return number


def _refuse_constant(text: str) -> float:
    raise NotJsonError(f"is not JSON: it holds {text}, and JSON has no such number")
