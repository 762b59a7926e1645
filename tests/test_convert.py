"""Conversions from Python: what comes back, progress, what may be interrupted and resumed, and the errors."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import conversion
import mlx.core as mx
import pytest
from support import contents, sample

import mla_tools
from mla_tools import execute as executing
from mla_tools.convert import Converted, Plans, Progress, _total, convert, inspect, plan, verify
from mla_tools.errors import CheckpointError, MlaToolsError, UsageError
from mla_tools.options import Options
from mla_tools.output import is_unfinished
from mla_tools.plan import MAX_MEMORY
from mla_tools.quantization import QuantSpec

README = Path(__file__).parent.parent / "README.md"

FOUR = Options(quantize=QuantSpec())


def raising(error: BaseException) -> Callable[[Progress], None]:
    """Return a progress that raises as soon as something is written."""

    def progress(now: Progress) -> None:
        if now.done:
            raise error

    return progress


# --- what comes back ---------------------------------------------------------------------------------


def test_it_writes_what_the_command_writes_and_says_what(tmp_path: Path) -> None:
    source, out = sample("deepseek_v3"), tmp_path / "out"
    done = convert(source, out, FOUR)
    conversion.convert(source, tmp_path / "other", "-q")
    assert contents(out) == contents(tmp_path / "other")
    (model,) = done
    assert (done.model, done.mtp, done.rank) == (model, None, 0)
    assert (model.folder, model.anything, model.plan.options.quantize) == (out, True, QuantSpec())
    assert model.plan.nbytes == plan(source, FOUR).model.nbytes
    assert 0 < model.workload.peak_bytes <= MAX_MEMORY
    assert model.workload.threads == 2


@pytest.mark.parametrize("kind", [str, Path], ids=["str", "Path"])
def test_folders_are_text_or_paths(
    kind: Callable[[object], Any], agreeable: list[str], tmp_path: Path
) -> None:
    source, out = sample("deepseek_v3"), tmp_path / "out"
    done = convert(kind(source), kind(out))
    assert done.model.folder == out
    assert verify(kind(out)) == verify(kind(out), quick=True)
    assert str(plan(kind(source)).model.checkpoint.place) == str(source)
    assert inspect(kind(source)).made.family.name == "deepseek_v3"


def test_memory_and_threads(agreeable: list[str], tmp_path: Path) -> None:
    source = sample("deepseek_v3")
    text = convert(source, tmp_path / "text", max_memory="300MB", threads=3).model
    number = convert(source, tmp_path / "number", max_memory=300 * 10**6, threads=3).model
    assert text.workload == number.workload == text.plan.workload(300 * 10**6, 3)
    assert contents(text.folder) == contents(number.folder)


def test_the_mtp_layers_are_a_model_of_their_own(agreeable: list[str], tmp_path: Path) -> None:
    source, seen = sample("deepseek_v4", "deepseek-v4"), []
    done = convert(source, tmp_path / "out", keep_mtp=True, progress=seen.append)
    assert [each.folder for each in done] == [tmp_path / "out", tmp_path / "out-mtp"]
    model, mtp = plan(source, keep_mtp=True)
    assert [each.plan.nbytes for each in done] == [model.nbytes, mtp.nbytes]
    last = {now.folder: now for now in seen}
    assert {folder: (now.done, now.total) for folder, now in last.items()} == {
        each.folder: (each.plan.nbytes, each.plan.nbytes) for each in done
    }
    for each in done:
        assert verify(each.folder).files == len(contents(each.folder)) - 1
    assert agreeable == ["start", "wait", "cancel"]


def test_a_plan_is_that_of_the_model_unless_mtp_layers_are_kept() -> None:
    plans = plan(sample("deepseek_v3"), FOUR)
    assert isinstance(plans, Plans)
    assert list(plans) == [plans.model]
    assert plans.mtp is None


def test_an_inspection_has_the_problems_and_does_not_raise_them(tmp_path: Path) -> None:
    assert inspect(sample("deepseek_v3")).problems == ()
    broken = with_config(tmp_path, n_routed_experts=9)
    found = inspect(broken)
    assert "expert 8 is missing" in {problem.what for problem in found.problems}
    with pytest.raises(CheckpointError) as raised:
        plan(broken)
    assert raised.value.problems == found.problems


def with_config(folder: Path, **changes: object) -> Path:
    """Return a folder that is the sample with other numbers in its config."""
    for path in sample("deepseek_v3").iterdir():
        (folder / path.name).symlink_to(path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


# --- progress ----------------------------------------------------------------------------------------


def test_progress_begins_with_nothing_and_ends_with_all_bytes(agreeable: list[str], tmp_path: Path) -> None:
    seen: list[Progress] = []
    threads = set()

    def progress(now: Progress) -> None:
        seen.append(now)
        threads.add(threading.current_thread())

    done = convert(sample("deepseek_v3"), tmp_path / "out", FOUR, progress=progress)
    total = done.model.plan.nbytes
    assert seen[0] == Progress(tmp_path / "out", 0, total)
    assert seen[-1] == Progress(tmp_path / "out", total, total)
    steps = [now.done for now in seen]
    assert steps == sorted(steps)
    assert len(steps) > 10
    assert (seen[0].share, seen[-1].share) == (0, 1)
    assert threads == {threading.current_thread()}


def test_progress_of_a_resumed_conversion_begins_with_what_was_done(
    agreeable: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mla_tools.output.writing.CHECKPOINT_BYTES", 1)
    source, out = sample("deepseek_v3"), tmp_path / "out"

    def halfway(now: Progress) -> None:
        if now.share > 0.5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, out, progress=halfway)
    seen: list[Progress] = []
    done = convert(source, out, resume=True, progress=seen.append)
    assert 0 < seen[0].done < seen[-1].done == seen[-1].total == done.model.plan.nbytes


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_the_shares_of_all_processes_are_all_bytes(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mla_tools.plan.files.SHARD_BYTES", 1 << 20)
    model = plan(sample("deepseek_v3")).model

    class Group:
        size = ranks

        def __init__(self, rank: int) -> None:
            self.rank = rank

        def agree(self, ok: bool) -> bool:
            return ok

    totals = [_total(model, Group(rank)) for rank in range(ranks)]
    assert sum(totals) == model.nbytes
    assert all(totals)


# --- what is there already ---------------------------------------------------------------------------


def test_an_interruption_says_how_to_resume_and_resume_finishes_it(
    agreeable: list[str], tmp_path: Path
) -> None:
    source, out = sample("deepseek_v3"), tmp_path / "out"
    with pytest.raises(KeyboardInterrupt) as raised:
        convert(source, out, FOUR, progress=raising(KeyboardInterrupt()))
    assert raised.value.__notes__ == [f"{out} is unfinished: run the same command with --resume to finish it"]
    assert is_unfinished(out)
    with pytest.raises(MlaToolsError, match="unfinished output: finish it with --resume"):
        convert(source, out, FOUR)
    assert convert(source, out, FOUR, resume=True).model.anything
    convert(source, tmp_path / "other", FOUR)
    assert contents(out) == contents(tmp_path / "other")
    again = convert(source, out, FOUR, resume=True)
    assert not again.model.anything
    assert again.model.plan.nbytes


def test_an_error_of_the_caller_leaves_a_folder_that_can_be_resumed(
    agreeable: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with pytest.raises(ZeroDivisionError) as raised:
        convert(sample("deepseek_v3"), out, progress=raising(ZeroDivisionError()))
    assert "run the same command with --resume" in raised.value.__notes__[0]
    assert is_unfinished(out)
    assert agreeable == ["start", "cancel"]


def test_an_interruption_before_the_first_byte_has_no_note(
    agreeable: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*given: object, **more: object) -> bool:
        raise KeyboardInterrupt

    monkeypatch.setattr(executing, "execute", interrupt)
    with pytest.raises(KeyboardInterrupt) as raised:
        convert(sample("deepseek_v3"), tmp_path / "out")
    assert not hasattr(raised.value, "__notes__")
    assert agreeable == ["start", "cancel"]


def test_overwrite_replaces_an_output_and_nothing_else(agreeable: list[str], tmp_path: Path) -> None:
    source, out = sample("deepseek_v3"), tmp_path / "out"
    convert(source, out)
    before = contents(out)
    with pytest.raises(MlaToolsError, match="already exists"):
        convert(source, out, FOUR)
    assert contents(out) == before
    assert convert(source, out, FOUR, overwrite=True).model.anything
    assert contents(out) != before
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "text").write_text("")
    with pytest.raises(MlaToolsError, match="already exists"):
        convert(source, mine, overwrite=True)
    assert [path.name for path in mine.iterdir()] == ["text"]


# --- errors ------------------------------------------------------------------------------------------

ARGUMENTS: dict[str, tuple[dict[str, Any], str]] = {
    "no output": ({"output": ""}, "--mlx-path: give the folder to write"),
    "no threads": ({"threads": 0}, "--threads: 0: give a number from 1 to 1024"),
    "threads": ({"threads": 1025}, "--threads: 1025: give a number"),
    "device": ({"device": "tpu"}, "--device: 'tpu': give one of cpu, gpu"),
    "both": ({"resume": True, "overwrite": True}, "--overwrite: not allowed with --resume"),
}


@pytest.mark.parametrize(("changes", "text"), ARGUMENTS.values(), ids=ARGUMENTS)
def test_wrong_arguments_are_told_before_anything_is_read(
    changes: dict[str, Any], text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=text):
        convert(**({"source": "no/such", "output": "out"} | changes))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("memory", "kind"), [("much", UsageError), ("1MB", MlaToolsError), (0, MlaToolsError)]
)
def test_memory_is_told_before_the_class_is_asked_and_the_source_is_read(
    memory: int | str, kind: type[MlaToolsError], agreeable: list[str], tmp_path: Path
) -> None:
    with pytest.raises(kind, match="--max-memory"):
        convert(sample("deepseek_v3"), tmp_path / "out", max_memory=memory, check_source=True)
    assert agreeable == []
    assert not (tmp_path / "out").exists()


def test_an_output_that_is_there_is_told_before_the_source_is_opened(tmp_path: Path) -> None:
    with pytest.raises(MlaToolsError, match="already exists"):
        convert("no/such", tmp_path)


def test_a_path_is_no_name_of_a_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for call in (inspect, plan, lambda source: convert(source, "out")):
        with pytest.raises(MlaToolsError, match="org/name: no such folder"):
            call(Path("org/name"))


def test_the_child_ends_when_the_source_is_not_what_it_should_be(
    agreeable: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other(*given: object) -> None:
        raise MlaToolsError("other bytes")

    monkeypatch.setattr(executing, "check_source", other)
    with pytest.raises(MlaToolsError, match="other bytes"):
        convert(sample("deepseek_v3"), tmp_path / "out", check_source=True)
    assert agreeable == ["start", "cancel"]
    assert not (tmp_path / "out").exists()


def test_a_class_that_does_not_agree_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Check:
        def __init__(self, config: Any, stored: Any) -> None:
            self.looks = 0

        def look(self) -> None:
            self.looks += 1
            if self.looks > 3:
                raise MlaToolsError("another class")

        def wait(self) -> None:
            raise AssertionError

        def cancel(self) -> None:
            pass

    monkeypatch.setattr("mla_tools.verify.ManifestCheck", Check)
    seen: list[Progress] = []
    with pytest.raises(MlaToolsError, match="another class"):
        convert(sample("deepseek_v3"), tmp_path / "out", progress=seen.append)
    assert seen[-1].done < seen[-1].total
    assert is_unfinished(tmp_path / "out")


def test_mlx_is_left_as_it_was(agreeable: list[str], tmp_path: Path) -> None:
    limit = mx.set_cache_limit(123456789)
    try:
        device = mx.default_device()
        convert(sample("deepseek_v3"), tmp_path / "out", device="cpu")
        assert mx.default_device() == device
        assert mx.set_cache_limit(limit) == 123456789
    finally:
        mx.set_cache_limit(limit)


# --- the public names --------------------------------------------------------------------------------


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_every_public_name_is_there() -> None:
    assert set(mla_tools.__all__) <= set(dir(mla_tools))
    assert all(getattr(mla_tools, name) is not None for name in mla_tools.__all__)
    assert mla_tools.__version__ == version("mla-tools")
    assert mla_tools.Options is Options
    assert mla_tools.convert.convert is convert
    with pytest.raises(AttributeError, match="nothing"):
        _ = mla_tools.nothing


ORDERS = {
    "the name first": "import mla_tools; mla_tools.convert",
    "the function first": "from mla_tools.convert import convert",
    "the command first": "import mla_tools.cli",
    "a call first": "from mla_tools import convert; convert.inspect",
}


@pytest.mark.parametrize("first", ORDERS.values(), ids=ORDERS)
def test_a_name_means_the_same_whatever_is_imported_first(first: str) -> None:
    code = f"""
{first}
import mla_tools, mla_tools.plan, mla_tools.verify
from mla_tools import convert as module
from mla_tools.convert import convert, inspect, plan, verify
assert mla_tools.convert is module and module.convert is convert and callable(convert)
assert mla_tools.plan.make_plan and mla_tools.verify.verify_output
print("the same")
"""
    assert python(code) == "the same"


def test_the_array_functions_load_no_planner() -> None:
    loaded = python("""
import sys
from mla_tools import shard_mla_projections, split_kv_b_proj_weights
rooms = {name.split(".")[1] for name in sys.modules if name.startswith("mla_tools.")}
print(*sorted(rooms), "mlx" in sys.modules)
""")
    codecs = {"codecs", "kernels", "overflow", "spec", "steps", "transform"}
    engine = {"errors", "kv_b", "mla", "names", "ops", "quantization"} | codecs
    *rooms, has_mlx = loaded.split()
    assert set(rooms) == engine
    assert has_mlx == "False"


def test_importing_the_package_loads_nothing_and_the_calls_nothing_heavy() -> None:
    assert (
        python("import sys; before = set(sys.modules); import mla_tools; print(set(sys.modules) - before)")
        == "{'mla_tools'}"
    )
    heavy = {"mlx", "mlx_lm", "rich", "huggingface_hub", "torch"}
    assert python(f"import sys; import mla_tools.convert; print({heavy} & set(sys.modules))") == "set()"


def test_the_example_of_the_readme(
    tmp_path: Path, agreeable: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = [text.partition("```")[0] for text in README.read_text().split("```python\n")[1:]]
    (example,) = (text for text in blocks if "from mla_tools.convert import" in text)
    (tmp_path / "DeepSeek-V3").symlink_to(sample("deepseek_v3"))
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(example, "README.md", "exec"), names)
    assert isinstance(names["done"], Converted)
    assert verify("DeepSeek-V3-4bit").notes == ()
