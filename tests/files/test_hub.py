"""Where a checkpoint comes from: a folder here, or a repository; and plain words when it is neither."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_server import NAME, running
from huggingface_hub.utils import filter_repo_objects

from mla_tools.errors import MlaToolsError, UsageError
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


@pytest.mark.parametrize("source", ["no/th\x1bing", "hf://org/na\x1b[31mme", "a\n", "hf://x\x1b", "~\x1b"])
def test_no_name_garbles_the_terminal(source: str) -> None:
    with pytest.raises(MlaToolsError) as caught:
        locate(source)
    assert str(caught.value).isprintable()


OF_REPOSITORIES = [
    pytest.param("main", False, "--revision is", id="revision"),
    pytest.param(None, True, "--download is", id="download"),
    pytest.param("main", True, "--revision and --download are", id="both"),
]


@pytest.mark.parametrize(("revision", "download", "text"), OF_REPOSITORIES)
def test_a_folder_has_no_revision_and_needs_no_download(
    revision: str | None, download: bool, text: str, tmp_path: Path
) -> None:
    (tmp_path / "model").mkdir()
    with pytest.raises(UsageError) as caught:
        locate("model", revision, download=download)
    assert str(caught.value) == f"model is a folder here; {text} for repositories on the hub."


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


def test_a_repository_is_asked_for_all_but_weights_in_other_formats(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def download(repository: str, **options: Any) -> str:
        asked.update(options, repository=repository)
        return str(tmp_path / "snapshot")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert locate("org/name", "v2", download=True) == Folder(tmp_path / "snapshot")
    assert (asked["repository"], asked["revision"]) == ("org/name", "v2")
    weights = ["model-00001-of-00002.safetensors", "model.safetensors.index.json", "config.json"]
    tokenizer = ["tokenizer.model", "tiktoken.model", "chat_template.jinja", "modeling_x.py", "merges.txt"]
    wanted = [*weights, *tokenizer, "LICENSE", "additional_chat_templates/tool_use.jinja"]
    others = ["model.bin", "weights.pt", "original/x.pth", "x.gguf", "fp32/model.safetensors"]
    found = filter_repo_objects([*wanted, *others], ignore_patterns=asked["ignore_patterns"])
    assert list(found) == wanted


def test_a_file_is_handed_on_to_whoever_opens_it(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert locate("config.json") == Folder(Path("config.json"))


# --- settings ----------------------------------------------------------------------------------------


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Let the hub's HTTP client be made anew, of no settings but those of a test."""
    from huggingface_hub.utils import close_session

    for name in list(os.environ):
        if name.upper().endswith("_PROXY") or name.startswith(("HF_", "SSL", "HUGGING_FACE")):
            monkeypatch.delenv(name)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:1")
    close_session()
    yield
    close_session()


ENDPOINTS = [
    pytest.param("http://[::1", "http://[::1: it must", id="bracket"),
    pytest.param("http://127.0.0.1:port", "http://127.0.0.1:port: it must", id="port"),
    pytest.param("http://127.0.0.1:65536", "http://127.0.0.1:65536: it must", id="large_port"),
    pytest.param("127.0.0.1:1", "127.0.0.1:1: it must", id="no_scheme"),
    pytest.param("ftp://127.0.0.1", "ftp://127.0.0.1: it must", id="ftp"),
    pytest.param("http://", "http://: it must", id="no_host"),
    pytest.param("http://127.0.0.1?x=", "http://127.0.0.1?x=: it must", id="query"),
    pytest.param("http://127.0.0.1/\x1b", r"'http://127.0.0.1/\x1b': it must", id="control"),
    pytest.param("http://127.0.0.1/" + "x" * 9000, "(9,017 characters): it must", id="long"),
    pytest.param("ftp://me:secret@127.0.0.1", "ftp://127.0.0.1: it must", id="password"),
]


@pytest.mark.parametrize("download", [False, True], ids=["ranges", "download"])
@pytest.mark.parametrize(("endpoint", "text"), ENDPOINTS)
def test_a_bad_endpoint_is_named(
    endpoint: str, text: str, download: bool, fresh: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **options: object) -> str:
        raise ValueError("of any kind")

    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(MlaToolsError) as caught:
        locate(NAME, download=download)
    assert "HF_ENDPOINT is " in str(caught.value)
    assert f"{text} be an address such as https://huggingface.co" in str(caught.value)
    assert str(caught.value).isprintable()


SETTINGS = [
    *(
        pytest.param(name, value, f"the network cannot be used: .* Check {name}.", id=f"{name}_{value}")
        for name in ("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY", "http_proxy")
        for value in ("::", "socks9://x", "http://[::1", "http://\x1b")
    ),
    pytest.param("SSL_CERT_FILE", "/no/such", "the network cannot be used: .* Check SSL_CERT_FILE.", id="ca"),
    pytest.param(
        "SSL_CERT_FILE", __file__, "the network cannot be used: .* Check SSL_CERT_FILE.", id="ca_nonsense"
    ),
    *(
        pytest.param("HF_TOKEN", token, "contains invalid characters. Check HF_TOKEN.", id=name)
        for name, token in (
            ("latin", "hf_\xe9"),
            ("control", "hf_\x1b"),
            ("line", "a\u2028b"),
            ("huge", "h" * 9000),
        )
    ),
]


@pytest.mark.parametrize("download", [False, True], ids=["ranges", "download"])
@pytest.mark.parametrize(("name", "value", "text"), SETTINGS)
def test_a_bad_setting_is_named(
    name: str, value: str, text: str, download: bool, fresh: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(MlaToolsError, match=text) as caught:
        locate(NAME, download=download)
    assert str(caught.value).isprintable()
    assert "hf_" not in str(caught.value)


@pytest.mark.parametrize("timeout", [-1, 0, 3601, 10**30])
def test_a_timeout_has_bounds(timeout: int, fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT", timeout)
    with pytest.raises(MlaToolsError, match=f"HF_HUB_DOWNLOAD_TIMEOUT is {timeout}; it must be 1 to 3,600"):
        locate(NAME)


@pytest.mark.parametrize("content", [None, b"\xff\xfe", "hf_\xe9".encode()], ids=["folder", "bytes", "latin"])
def test_a_bad_token_file_is_reported(
    content: bytes | None, fresh: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "token"
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
    with pytest.raises(MlaToolsError, match=r"the token for the hub (cannot be read: |contains invalid)"):
        locate(NAME)


# What huggingface_hub reads when it is imported can be tried only in a process of its own.
IMPORTED = [
    pytest.param({"HF_ENDPOINT": "http://[::1"}, [], r"HF_ENDPOINT is http://\[::1: it must", id="endpoint"),
    pytest.param({"HF_ENDPOINT": "http://x:port"}, ["--download"], "HF_ENDPOINT is http://x:port", id="port"),
    pytest.param({"HF_HUB_DOWNLOAD_TIMEOUT": "soon"}, [], "Check HF_HUB_DOWNLOAD_TIMEOUT", id="timeout"),
    pytest.param({"HF_HOME": "/dev/null"}, [], "the token .* Check HF_HOME", id="home"),
    pytest.param({"HF_HOME": "/dev/null"}, ["--download"], "the token .* Check HF_HOME", id="home_download"),
    pytest.param({"HF_TOKEN": "hf_\n\xe9"}, ["--download"], "invalid characters. Check HF_TOKEN", id="token"),
    pytest.param({"HTTP_PROXY": "::", "HF_HUB_OFFLINE": "1"}, [], "Check HTTP_PROXY", id="proxy_offline"),
    pytest.param({"REQUESTS_CA_BUNDLE": "/no/such"}, [], "holds no safetensors files", id="requests"),
]


@pytest.mark.parametrize(("settings", "options", "text"), IMPORTED)
def test_no_setting_ends_in_a_traceback(
    settings: dict[str, str], options: list[str], text: str, tmp_path: Path
) -> None:
    command = [sys.executable, "-P", "-m", "mla_tools", "inspect", NAME, *options]
    kept = {name: text for name, text in os.environ.items() if not name.upper().endswith("_PROXY")}
    with running({"config.json": b"{}"}) as hub:
        environment = (
            kept | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"} | settings
        )
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert re.search(text, done.stderr)
