"""Checkpoints that are not folders yet: repositories on the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from mla_tools.errors import MlaToolsError

__all__ = ["local_folder"]

# What a conversion reads: the weights and the small files beside them. Never pickles, never images.
_PATTERNS = ("*.safetensors", "*.json", "*.py", "*.model", "*.tiktoken", "*.txt", "*.jsonl", "*.jinja")


def local_folder(source: str, revision: str | None = None) -> Path:
    """Return the folder of a checkpoint, downloading it to the hub's cache if `source` is a repository.

    Raises MlaToolsError if it is neither a folder nor a repository that can be had.
    """
    try:
        path = Path(source).expanduser()
        if path.exists():
            return path
    except (OSError, RuntimeError, ValueError) as error:
        raise MlaToolsError(f"{source[:200]}: no such folder ({error})") from error
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    if source.count("/") != 1 or source.startswith((".", "/", "~")):
        raise MlaToolsError(f"{source}: no such folder, and not a repository name such as org/model")
    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=list(_PATTERNS)))
    except HFValidationError as error:
        raise MlaToolsError(f"{source}: no such folder, and not a repository name: {error}") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise MlaToolsError(
            f"{source}: no such folder, and the repository cannot be downloaded: {error}"
        ) from error
