"""The command: exit codes, what goes to stdout and what to stderr, and what the options mean."""

from __future__ import annotations

import json
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from mla_tools.cli import main, options_of, parser
from mla_tools.errors import UsageError
from mla_tools.options import Options
from mla_tools.quantization import RECIPES, QuantSpec
from mla_tools.samples import write_sample
from mla_tools.spec import DType

Capture = pytest.CaptureFixture[str]

COMMANDS = {
    "convert": "mlx_lm.load opens",
    "plan": "what `convert`",
    "inspect": "what a checkpoint is",
    "sample": "tiny random checkpoint",
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("samples") / "deepseek_v3"
    write_sample("deepseek_v3", folder)
    return folder


# --- help --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_help_tells_the_purpose(command: str, capsys: Capture) -> None:
    assert main([command, "--help"]) == 0
    out = capsys.readouterr().out
    assert COMMANDS[command] in re.sub(r"\s+", " ", out)
    assert out.startswith(f"usage: mla-sanitize {command}")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_tells_the_exit_codes(command: str, capsys: Capture) -> None:
    assert main([command, "--help"]) == 0
    assert "exit code" in capsys.readouterr().out.lower()


def test_the_help_of_the_command_lists_the_commands_and_exit_codes(capsys: Capture) -> None:
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"\n    {command} " in out for command in COMMANDS)
    assert re.search("exit codes: 0 .*1 .*2 ", out)


def test_version(capsys: Capture) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"mla-sanitize {version('mla-tools')}\n"


# --- exit codes --------------------------------------------------------------------------------------

USAGE = [
    pytest.param([], id="nothing"),
    pytest.param(["frobnicate"], id="unknown_command"),
    pytest.param(["plan", "SRC", "--frobnicate"], id="unknown_option"),
    pytest.param(["plan"], id="no_source"),
    pytest.param(["plan", "SRC", "--hf-path", "SRC"], id="two_sources"),
    pytest.param(["plan", "SRC", "-q", "-d"], id="quantize_and_dequantize"),
    pytest.param(["plan", "SRC", "--q-bits", "4"], id="bits_without_q"),
    pytest.param(["plan", "SRC", "-q", "--q-bits", "7"], id="seven_bits"),
    pytest.param(["plan", "SRC", "-q", "--q-bits", "four"], id="bits_in_letters"),
    pytest.param(["plan", "SRC", "-q", "--q-mode", "mxfp5"], id="mode"),
    pytest.param(["plan", "SRC", "--dtype", "float64"], id="dtype"),
    pytest.param(["plan", "SRC", "--embed-q", "often"], id="embed_q"),
    pytest.param(["plan", "SRC", "--quant-predicate", "mixed_4_6"], id="recipe_without_q"),
    pytest.param(["sample", "llama", "OUT"], id="family"),
    pytest.param(["sample", "deepseek_v3", "OUT", "--format", "fp9"], id="format"),
    pytest.param(["sample", "deepseek_v3", "OUT", "--seed", "x"], id="seed"),
]


@pytest.mark.parametrize("argv", USAGE)
def test_wrong_usage_is_2_and_says_why_on_stderr(
    argv: list[str], source: Path, tmp_path: Path, capsys: Capture
) -> None:
    places = {"SRC": str(source), "OUT": str(tmp_path / "out")}
    assert main([places.get(arg, arg) for arg in argv]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "error:" in err
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_that_is_wrong_is_1(source: Path, tmp_path: Path, capsys: Capture) -> None:
    config = json.loads((source / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "n_routed_experts": 9}))
    shards = list(source.glob("model*.safetensors"))
    assert shards
    for path in [*shards, source / "model.safetensors.index.json"]:
        (tmp_path / path.name).symlink_to(path)
    for command in ("plan", "convert"):
        assert main([command, str(tmp_path), "--mlx-path", str(tmp_path / "out")]) == 1
        out, err = capsys.readouterr()
        assert out == ""
        assert re.match(r"error: \d+ problems\n", err)
        assert "expert 8 is missing" in err
    assert main(["inspect", str(tmp_path)]) == 1
    assert "expert 8 is missing" in capsys.readouterr().out
    # --long lists every problem.
    assert main(["inspect", str(tmp_path), "--json"]) == 1
    problems = json.loads(capsys.readouterr().out)["problems"]
    for command in ("plan", "inspect"):
        assert main([command, str(tmp_path), "--long"]) == 1
        out, err = capsys.readouterr()
        lines = (out + err).splitlines()
        assert [line for line in lines if "expert 8 is missing" in line] == [
            f"{problem['subject']}: {problem['what']}"
            for problem in problems
            if problem["what"] == "expert 8 is missing"
        ]
    assert not (tmp_path / "out").exists()


def test_names_in_full(source: Path, capsys: Capture) -> None:
    assert main(["plan", str(source), "--long"]) == 0
    out = capsys.readouterr().out
    assert "    <- model.layers.1.mlp.experts.7.up_proj\n" in out
    assert "{" not in out.partition("config.json")[0]


@pytest.mark.parametrize("command", ["plan", "inspect", "convert"])
def test_a_folder_that_is_not_there_is_1(
    command: str, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([command, str(tmp_path / "a" / "b")]) == 1
    assert "no such folder" in capsys.readouterr().err


def test_an_output_that_exists_is_1_before_anything_is_read(tmp_path: Path, capsys: Capture) -> None:
    assert main(["convert", "no/such/source", "--mlx-path", str(tmp_path)]) == 1
    assert "already exists" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["plan", "inspect"])
def test_an_interruption_is_130(
    command: str, source: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mla_tools.convert.open_checkpoint", interrupt)
    assert main([command, str(source)]) == 130
    assert "interrupted" in capsys.readouterr().err


# --- output ------------------------------------------------------------------------------------------


def test_convert_with_its_real_check_of_mlx_lm(source: Path, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "out"
    assert main(["convert", str(source), "--mlx-path", str(out), "-q"]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith(f"{out}: deepseek_v3, ")
    assert captured.err == ""
    assert (out / "model.safetensors").exists()


def test_convert_waits_for_mlx_lm_and_ends_the_child(
    agreeable: list[str], source: Path, tmp_path: Path
) -> None:
    assert main(["convert", str(source), "--mlx-path", str(tmp_path / "out")]) == 0
    assert agreeable == ["start", "wait", "cancel"]


def test_convert_ends_the_child_when_it_fails(
    agreeable: list[str], source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mla_tools.execute.execute", fail)
    assert main(["convert", str(source), "--mlx-path", str(tmp_path / "out")]) == 130
    assert agreeable == ["start", "cancel"]


@pytest.mark.parametrize("command", COMMANDS)
def test_json_is_all_that_is_on_stdout(
    command: str, agreeable: list[str], source: Path, tmp_path: Path, capsys: Capture
) -> None:
    argv = {
        "convert": ["convert", str(source), "--mlx-path", str(tmp_path / "out")],
        "plan": ["plan", str(source), "-q"],
        "inspect": ["inspect", str(source)],
        "sample": ["sample", "kimi_linear", str(tmp_path / "out")],
    }[command]
    assert main([*argv, "--json"]) == 0
    out, err = capsys.readouterr()
    value = json.loads(out)
    assert err == ""
    assert value.get("family", "deepseek_v3") in ("deepseek_v3", "kimi_linear")
    if command in ("convert", "sample"):
        assert value["output"] == str(tmp_path / "out")


@pytest.mark.parametrize(
    "argv",
    [["plan", "EMPTY"], ["inspect", "EMPTY"], ["plan", "SRC", "-q", "-d"], ["plan"], ["convert", "EMPTY"]],
    ids=" ".join,
)
def test_errors_are_json_on_stdout_and_words_on_stderr(
    argv: list[str], source: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    places = {"SRC": str(source), "EMPTY": str(tmp_path)}
    assert main([*(places.get(arg, arg) for arg in argv), "--json"]) in (1, 2)
    out, err = capsys.readouterr()
    value = json.loads(out)
    assert set(value) == {"error", "problems"}
    assert err == f"error: {value['error']}\n"


def test_no_progress_bar_where_stderr_is_no_terminal(
    agreeable: list[str], source: Path, tmp_path: Path, capsys: Capture
) -> None:
    assert main(["convert", str(source), "--mlx-path", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().err == ""


def test_a_progress_bar_on_a_terminal_goes_to_stderr(
    agreeable: list[str], source: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    assert main(["convert", str(source), "--mlx-path", str(tmp_path / "out"), "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)
    assert "writing" in err


def test_every_way_to_name_the_source_is_the_same(source: Path, capsys: Capture) -> None:
    texts = []
    for named in ([str(source)], ["--hf-path", str(source)], ["--model", str(source)]):
        assert main(["plan", *named]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] == texts[2]
    assert "deepseek_v3" in texts[0]


@pytest.mark.parametrize("flag", ["--hf-path", "--model"])
def test_two_sources_are_one_too_many(flag: str, source: Path, capsys: Capture) -> None:
    assert main(["inspect", str(source), flag, str(source)]) == 2
    assert "Name one checkpoint" in capsys.readouterr().err


def test_trust_remote_code_is_accepted_and_changes_nothing(source: Path, capsys: Capture) -> None:
    assert main(["plan", str(source)]) == 0
    plain = capsys.readouterr().out
    assert main(["plan", str(source), "--trust-remote-code"]) == 0
    assert capsys.readouterr().out == plain


def test_plan_writes_nothing(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["plan", str(source), "-q"]) == 0
    assert list(tmp_path.iterdir()) == []


def test_inspect_tells_what_it_is(source: Path, capsys: Capture) -> None:
    assert main(["inspect", str(source)]) == 0
    out = capsys.readouterr().out
    assert "deepseek_v3" in out
    assert re.search(r"kv_lora_rank +128", out)
    assert out.endswith("no problems\n")


def test_sample_writes_the_same_as_the_library(source: Path, tmp_path: Path, capsys: Capture) -> None:
    assert main(["sample", "deepseek_v3", str(tmp_path / "sample"), "--seed", "0"]) == 0
    assert str(tmp_path / "sample") in capsys.readouterr().out
    for path in source.iterdir():
        assert (tmp_path / "sample" / path.name).read_bytes() == path.read_bytes()


# --- options -----------------------------------------------------------------------------------------

EIGHT = QuantSpec("affine", 8, 32)
OPTIONS: list[Any] = [
    pytest.param([], Options(), id="none"),
    pytest.param(["-q"], Options(quantize=QuantSpec("affine", 4, 64)), id="q"),
    pytest.param(["--quantize", "--q-bits", "6"], Options(quantize=QuantSpec("affine", 6, 64)), id="bits"),
    pytest.param(["-q", "--q-group-size", "128"], Options(quantize=QuantSpec("affine", 4, 128)), id="group"),
    pytest.param(["-q", "--q-mode", "mxfp4"], Options(quantize=QuantSpec("mxfp4", 4, 32)), id="mxfp4"),
    pytest.param(["-q", "--q-mode", "mxfp8"], Options(quantize=QuantSpec("mxfp8", 8, 32)), id="mxfp8"),
    pytest.param(["-q", "--q-mode", "nvfp4"], Options(quantize=QuantSpec("nvfp4", 4, 16)), id="nvfp4"),
    pytest.param(["--dtype", "float16"], Options(dtype=DType.F16), id="float16"),
    pytest.param(["--dtype", "bfloat16"], Options(dtype=DType.BF16), id="bfloat16"),
    pytest.param(["--dtype", "float32"], Options(dtype=DType.F32), id="float32"),
    pytest.param(["-d"], Options(dequantize=True), id="dequantize"),
    pytest.param(["--embed-q", "source"], Options(embed_q="source"), id="embed_q_source"),
    pytest.param(["--embed-q", "float"], Options(embed_q="float"), id="embed_q_float"),
    pytest.param(["--embed-q", "8,32"], Options(embed_q=EIGHT), id="embed_q_default"),
    pytest.param(["--embed-q", "6"], Options(embed_q=QuantSpec("affine", 6, 64)), id="embed_q_bits"),
    pytest.param(["--embed-q", "8,32,mxfp8"], Options(embed_q=QuantSpec("mxfp8")), id="embed_q_mode"),
    *(
        pytest.param(["-q", "--quant-predicate", r], Options(quantize=QuantSpec(), quant_predicate=r), id=r)
        for r in RECIPES
    ),
]


@pytest.mark.parametrize("command", ["convert", "plan"])
@pytest.mark.parametrize(("flags", "wanted"), OPTIONS)
def test_options(flags: list[str], wanted: Options, command: str) -> None:
    assert options_of(parser().parse_args([command, "SRC", *flags])) == wanted


CONTRADICTIONS: list[Any] = [
    pytest.param(["--q-bits", "4"], "--q-bits: not allowed without -q", id="bits"),
    pytest.param(["--q-group-size", "64", "--q-mode", "affine"], "--q-group-size, --q-mode", id="two"),
    pytest.param(["-q", "-d"], "not both", id="q_and_d"),
    pytest.param(["--quant-predicate", "mixed_2_6"], "not allowed without -q", id="recipe"),
    pytest.param(["-q", "--q-mode", "mxfp4", "--quant-predicate", "mixed_2_6"], "affine", id="recipe_mode"),
    pytest.param(["-q", "--q-mode", "mxfp4", "--q-bits", "8"], "mxfp4 .* no bits 8", id="mode_bits"),
    pytest.param(["-q", "--q-group-size", "48"], "no group size 48", id="group"),
    pytest.param(["--embed-q", "8,32,affine,x"], "not a quantization", id="embed_q_fields"),
    pytest.param(["--embed-q", ""], "not a quantization", id="embed_q_empty"),
]


@pytest.mark.parametrize(("flags", "text"), CONTRADICTIONS)
def test_contradictions(flags: list[str], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        options_of(parser().parse_args(["plan", "SRC", *flags]))


def test_defaults() -> None:
    args = parser().parse_args(["convert", "SRC"])
    assert (args.source, args.mlx_path, args.revision, args.json) == ("SRC", "mlx_model", None, False)
