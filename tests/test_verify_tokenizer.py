"""The tokenizer is opened as mlx-lm opens it, and a checkpoint's code runs only if it is trusted."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hub_server import running
from support import sample

from mla_tools import cli
from mla_tools.convert import convert, verify
from mla_tools.files.checkpoint import open_checkpoint
from mla_tools.files.hub import open_repository
from mla_tools.samples import write_tokenizer
from mla_tools.verify import TokenizerCheck, asking
from mla_tools.verify.tokenizer import NO_TOKENIZER

UNASKED = "It could not be checked whether mlx_lm opens the tokenizer: "
NEEDS_CODE = "The tokenizer needs the checkpoint's own code, so it was not opened here"


def said(folder: Any, *, trusted: bool = False) -> str:
    """Return what is said of the tokenizer in a place."""
    checkpoint = open_checkpoint(folder)
    check = TokenizerCheck(checkpoint.config, checkpoint.companions, trusted=trusted)
    try:
        return check.said()
    finally:
        check.cancel()


@pytest.fixture
def tiktoken(tmp_path: Path) -> Path:
    """Return a checkpoint of no use but for its tokenizer, which leaves a file behind where it runs."""
    folder = tmp_path / "model"
    shutil.copytree(sample("kimi_linear"), folder)
    code = folder / "tokenization_kimi.py"
    code.write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n" + code.read_text())
    return folder


def test_a_tokenizer_that_opens_needs_no_word() -> None:
    assert said(sample("deepseek_v3")) == ""


def test_the_code_of_a_checkpoint_runs_only_if_it_is_trusted(tiktoken: Path, tmp_path: Path) -> None:
    assert said(tiktoken).startswith(NEEDS_CODE)
    assert not (tmp_path / "ran").exists()
    assert said(tiktoken, trusted=True) == ""
    assert (tmp_path / "ran").exists()
    assert not [path for path in tiktoken.iterdir() if path.is_dir()]


def lose(folder: Path) -> None:
    for path in folder.glob("t*"):
        path.unlink()


def spoil(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text('{"auto_map": ')


DAMAGE = [
    pytest.param(lose, "There is no tokenizer beside the weights, and mlx_lm.generate needs one.", id="lost"),
    pytest.param(spoil, "mlx_lm cannot open the tokenizer: Expecting value: line 1", id="no JSON"),
]


@pytest.mark.parametrize(("damage", "text"), DAMAGE)
def test_a_tokenizer_that_does_not_open_is_said(
    damage: Callable[[Path], None], text: str, tiktoken: Path
) -> None:
    damage(tiktoken)
    assert said(tiktoken).startswith(text)


def test_the_tokenizer_of_a_repository_is_read_from_there() -> None:
    files = {path.name: path.read_bytes() for path in sample("kimi_linear").iterdir()}
    with running(files) as hub:
        assert said(open_repository("org/name", endpoint=hub.url)).startswith(NEEDS_CODE)
        assert any("tiktoken.model" in asked.path for asked in hub.asked)


@pytest.mark.skipif(
    not Path("/proc/self/statm").exists(),
    reason="macOS accepts RLIMIT_AS and does not enforce it; Linux, which CI runs on, does",
)
def test_a_tokenizer_that_wants_any_amount_of_memory_is_ended(tiktoken: Path) -> None:
    for path in tiktoken.glob("t*"):
        path.unlink()
    write_tokenizer(tiktoken)
    bomb = json.loads((tiktoken / "tokenizer.json").read_text())
    each = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 10}
    bomb["normalizer"] = {"type": "Sequence", "normalizers": [each] * 9}
    added = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}
    bomb["added_tokens"].append({"id": 257, "content": "a0", **added})
    (tiktoken / "tokenizer.json").write_text(json.dumps(bomb))
    assert said(tiktoken).startswith((UNASKED, "mlx_lm cannot open the tokenizer: "))


def test_an_interrupted_check_leaves_a_complete_output(
    agreeable: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Interrupted(TokenizerCheck):
        def said(self) -> str:
            raise KeyboardInterrupt

    monkeypatch.setattr("mla_tools.verify.TokenizerCheck", Interrupted)
    with pytest.raises(KeyboardInterrupt) as caught:
        convert(sample("kimi_linear"), tmp_path / "out")
    assert caught.value.__notes__ == [
        f"{tmp_path / 'out'} is complete; only the check of its tokenizer was interrupted"
    ]
    verify(tmp_path / "out")


def test_verify_says_it_too(agreeable: list[str], tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(sample("deepseek_v3"), source)
    for path in source.glob("token*"):
        path.unlink()
    convert(source, tmp_path / "out")
    assert verify(tmp_path / "out").notes == (NO_TOKENIZER,)


ANSWERS = [
    pytest.param("raise ImportError('no such library')", "ImportError: no such library", id="error"),
    pytest.param("print('{}')", "its answer is not valid", id="another answer"),
    pytest.param("", "its answer was cut off", id="none"),
]


@pytest.mark.parametrize(("code", "why"), ANSWERS)
def test_a_child_without_an_answer_says_nothing_of_the_tokenizer(
    code: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asking, "_CHILD", code)
    assert said(sample("deepseek_v3")) == UNASKED + why


def test_a_child_that_takes_too_long_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "_CHILD", "import signal; signal.pause()")
    monkeypatch.setattr("mla_tools.verify.tokenizer._SECONDS", 0.0)
    assert said(sample("deepseek_v3")) == f"{UNASKED}its process took more than 0 seconds"


def test_convert_says_it_at_its_end(
    agreeable: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("mla_tools.verify.TokenizerCheck", TokenizerCheck)
    source = str(sample("kimi_linear"))
    assert convert(source, tmp_path / "out").tokenizer.startswith(NEEDS_CODE)
    assert (tmp_path / "out" / "tiktoken.model").exists()
    assert cli.main(["convert", source, "--mlx-path", str(tmp_path / "other")]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith(NEEDS_CODE)
    assert cli.main(["convert", source, "--mlx-path", str(tmp_path / "third"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tokenizer"].startswith(NEEDS_CODE)
