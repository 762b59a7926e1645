"""What the user's environment says of the hub and of the way to it: each bad setting is named in a sentence.

huggingface_hub and the HTTP library below it read these when they are imported or when their session is
made, and what they raise then can be anything.
"""

from __future__ import annotations

import os
import re
from typing import Any
from urllib.parse import urlsplit

from mla_tools.errors import MlaToolsError
from mla_tools.files.place import shown

__all__ = ["checked_endpoint", "constants", "hub_headers", "one_line", "session", "without_user"]

_HUB = ("HF_HUB_DOWNLOAD_TIMEOUT", "HF_HUB_ETAG_TIMEOUT", "HF_HOME")
_TOKEN = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
_TOKEN_FILES = ("HF_TOKEN_PATH", "HF_HOME", "HF_OIDC_RESOURCE")
_PROXIES = ("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY", "NO_PROXY")
_CERTIFICATES = ("SSL_CERT_FILE", "SSL_CERT_DIR", "SSLKEYLOGFILE")

_MAX_ADDRESS = 8192
_MAX_TIMEOUT = 3600
_MAX_CHARACTERS = 500

_USER = re.compile("//[^/]*@")


def constants() -> Any:
    """Return huggingface_hub's constants, which it makes of the environment; MlaToolsError if it cannot."""
    try:
        from huggingface_hub import constants
    except ImportError:  # a broken installation is no setting
        raise
    except Exception as error:
        if endpoint := os.environ.get("HF_ENDPOINT"):
            checked_endpoint(endpoint)
        raise MlaToolsError(f"huggingface_hub cannot be used: {one_line(error)}.{_check(_HUB)}") from error
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    if not 0 < timeout <= _MAX_TIMEOUT:
        raise MlaToolsError(
            f"HF_HUB_DOWNLOAD_TIMEOUT is {one_line(timeout)}; it must be 1 to {_MAX_TIMEOUT:,} seconds."
        )
    return constants


def checked_endpoint(endpoint: str) -> str:
    """Return the address of a hub without a slash at its end; MlaToolsError if it is none."""
    try:
        parts = urlsplit(endpoint)
        _ = parts.port  # ValueError for a port that is none
        good = parts.scheme in ("http", "https") and parts.hostname and not (parts.query or parts.fragment)
        reason = ""
    except ValueError as error:
        good, reason = False, f" ({one_line(error)})"
    if not good or not endpoint.isprintable() or len(endpoint) > _MAX_ADDRESS:
        found = shown(without_user(endpoint)) if endpoint else "empty"
        needed = "it must be an address such as https://huggingface.co"
        raise MlaToolsError(f"HF_ENDPOINT is {found}: {needed}{reason}.")
    return endpoint.rstrip("/")


def hub_headers() -> dict[str, str]:
    """Return the headers for a hub, with the user's token if there is one; MlaToolsError for a bad token."""
    # Not build_hf_headers: to fill in the user agent it asks the hub for a list, and reads any answer whole.
    headers = {"User-Agent": "mla-tools"}
    if constants().HF_HUB_DISABLE_IMPLICIT_TOKEN:
        return headers
    try:
        from huggingface_hub import get_token

        token = get_token()
    except Exception as error:  # files, keyrings and servers of any kind may take part in it
        reason = f"the token for the hub cannot be read: {one_line(error)}"
        raise MlaToolsError(f"{reason}.{_check(_TOKEN_FILES)}") from error
    if token:
        if not token.isascii() or not token.isprintable() or len(token) > _MAX_ADDRESS:
            advice = _check(_TOKEN) or ' Log in again with "hf auth login".'
            raise MlaToolsError(f"the token for the hub contains invalid characters.{advice}")
        headers["Authorization"] = f"Bearer {token}"
    return headers


def session() -> Any:
    """Return huggingface_hub's HTTP client; MlaToolsError where proxies or certificates cannot be used."""
    try:
        from huggingface_hub import get_session

        return get_session()
    except Exception as error:  # of the HTTP library, of ssl, or of a package that a proxy needs
        files = isinstance(error, OSError)
        advice = _check(_CERTIFICATES if files else (*_PROXIES, *map(str.lower, _PROXIES)))
        raise MlaToolsError(f"the network cannot be used: {one_line(error)}.{advice}") from error


def without_user(address: str) -> str:
    """Return an address without the name and the password that may stand in it."""
    return _USER.sub("//", address, count=1)


def one_line(what: object) -> str:
    """Return a text of others as it can stand in a sentence: one line, printable, and not too long."""
    text = " ".join(str(what).split()).rstrip(".")
    if not text and isinstance(what, Exception):
        return type(what).__name__
    if len(text) > _MAX_CHARACTERS:
        text = f"{text[:_MAX_CHARACTERS]}... ({len(text):,} characters)"
    return text if text.isprintable() else ascii(text)


def _check(names: tuple[str, ...]) -> str:
    """Return a sentence that asks to check those variables that are set, and nothing if none is."""
    found = [name for name in names if os.environ.get(name)]
    return f" Check {', '.join(found)}." if found else ""
