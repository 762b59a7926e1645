"""Where a checkpoint comes from: a folder here, or a repository; and plain words when it is neither."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mla_tools.errors import MlaToolsError
from mla_tools.files.hub import locate
from mla_tools.files.place import Folder


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Let no test reach the network or someone's cache."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("source", ["model", "./model", "org/model"])
def test_a_folder_is_taken_as_it_is(source: str, tmp_path: Path) -> None:
    (tmp_path / source).mkdir(parents=True)
    assert locate(source) == Folder(Path(source))
    assert locate(str(tmp_path / source)) == Folder(tmp_path / source)


def test_the_home_folder_may_be_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    assert locate("~/model") == Folder(tmp_path / "model")


PATHS = [
    "./nothing",
    "../nothing",
    "/no/thing",
    "~/nothing",
    "nothing",
    "a/b/c",
    "./a/b",
    ".hidden/x",
    "a/b/",
]


@pytest.mark.parametrize("source", PATHS)
def test_a_path_to_nothing_is_said_to_be_none(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> str:
        raise AssertionError("a path is not a repository")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(MlaToolsError) as caught:
        locate(source)
    assert str(caught.value) == f"{source}: no such folder, and not a repository name such as org/model"


def test_a_repository_that_cannot_be_reached_is_said_so() -> None:
    with pytest.raises(MlaToolsError) as caught:
        locate("org/name")
    text = str(caught.value)
    assert text.startswith("org/name: no such folder, and the repository cannot be downloaded: ")
    assert "offline" in text.lower() or "HF_HUB_OFFLINE" in text


@pytest.mark.parametrize(
    "source", ["org/na me", "org/-name", "or--g/name", "org/name.git", "org/" + "n" * 97]
)
def test_a_name_that_no_repository_can_have_is_said_so(source: str) -> None:
    with pytest.raises(MlaToolsError, match="no such folder, and not a repository name"):
        locate(source)


STRANGE = [
    pytest.param("~no-such-user-anywhere/model", id="unknown_user"),
    pytest.param("n" * 5000, id="too_long"),
    pytest.param(f"org/{'n' * 5000}", id="too_long_repository"),
    pytest.param("a\0b", id="nul"),
    pytest.param("org/a\0b", id="nul_in_a_repository"),
]


@pytest.mark.parametrize("source", STRANGE)
def test_strange_sources_are_errors_and_no_tracebacks(source: str) -> None:
    with pytest.raises(MlaToolsError, match="no such folder"):
        locate(source)


def test_a_repository_is_asked_for_weights_and_small_files_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def download(repository: str, **options: Any) -> str:
        asked.update(options, repository=repository)
        return str(tmp_path / "snapshot")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert locate("org/name", "v2", download=True) == Folder(tmp_path / "snapshot")
    assert (asked["repository"], asked["revision"]) == ("org/name", "v2")
    patterns = [Path(pattern) for pattern in asked["allow_patterns"]]

    def wanted(name: str) -> bool:
        return any(Path(name).match(str(pattern)) for pattern in patterns)

    weights = ["model-00001-of-00002.safetensors", "model.safetensors.index.json", "config.json"]
    tokenizer = ["tokenizer.model", "tiktoken.model", "chat_template.jinja", "modeling_x.py", "merges.txt"]
    here = weights + tokenizer
    assert [name for name in here if not wanted(name)] == []
    assert [
        name for name in ("model.bin", "weights.pt", "x.pth", "figure.png", "x.gguf") if wanted(name)
    ] == []


def test_a_file_is_handed_on_to_whoever_opens_it(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert locate("config.json") == Folder(Path("config.json"))
