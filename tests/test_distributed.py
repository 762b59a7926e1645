"""A conversion that several processes share: the same bytes, and a rank that dies can be made good."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from ports import free_ports
from support import contents, without_tokenizer

from mla_tools.distributed import Alone, launched, shares
from mla_tools.samples import write_sample

# The command with small files and checkpoints; rank 1 may be made to die when it has done some tensors.
SCRIPT = """
import os, signal, sys
from mla_tools.plan import files
from mla_tools.cli import main
from mla_tools.output import writing

files.SHARD_BYTES, writing.CHECKPOINT_BYTES = 1 << 20, 1 << 18
last = int(os.environ.get("DIES_AFTER", -1))
finished = writing.Output.finished

def count(self, number):
    global last
    finished(self, number)
    last -= 1
    if not last and os.environ.get("MLX_RANK") == "1":
        os.kill(os.getpid(), signal.SIGKILL)

writing.Output.finished = count
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shared") / "source"
    write_sample("deepseek_v3", folder)
    return without_tokenizer(folder)


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("script") / "script.py"
    path.write_text(SCRIPT)
    return path


@pytest.fixture(scope="module")
def unfinished(script: Path, source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return what two ranks leave, of which one has died."""
    out = tmp_path_factory.mktemp("unfinished") / "out"
    said = run(script, source, out, ranks=2, dies_after=12)
    assert "rank 1 exited" in said
    return out


@pytest.fixture(scope="module")
def whole(script: Path, source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Return what one process writes that nothing interrupts."""
    out = tmp_path_factory.mktemp("whole") / "out"
    run(script, source, out)
    return contents(out)


def run(script: Path, source: Path, out: Path, *flags: str, ranks: int = 1, dies_after: int = -1) -> str:
    command = [sys.executable, str(script), "convert", str(source), "--mlx-path", str(out), *flags]
    if ranks > 1:
        launch = [str(Path(sys.executable).parent / "mlx.launch"), "-n", str(ranks), "--backend", "ring"]
        launch += ["--starting-port", str(free_ports(ranks))]
        command = [*launch, "--env", f"DIES_AFTER={dies_after}", "--", *command]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout + done.stderr


def test_two_ranks_write_the_bytes_of_one(script: Path, source: Path, tmp_path: Path) -> None:
    said = run(script, source, tmp_path / "one", "-q")
    assert run(script, source, tmp_path / "two", "-q", ranks=2).count("deepseek_v3") == 1, said
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    assert len(list((tmp_path / "one").glob("*.safetensors"))) > 2


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_rank_that_dies_leaves_a_folder_that_can_be_gone_on_with(
    ranks: int, script: Path, source: Path, unfinished: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(unfinished, out)
    assert not list(out.glob("*.safetensors"))
    assert not (out / "config.json").exists()
    assert len(list(out.glob("mla_tools.journal-*.jsonl"))) == 2
    run(script, source, out, "--resume", ranks=ranks)
    assert contents(out) == whole


def test_all_ranks_hear_of_what_one_cannot_do(script: Path, source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("")
    said = run(script, source, tmp_path / "out", ranks=2)
    assert "already exists" in said
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


def test_without_a_launcher_there_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLX_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK"):
        monkeypatch.delenv(name, raising=False)
    group = launched()
    assert isinstance(group, Alone)
    assert (group.rank, group.size, group.agree(True), group.agree(False)) == (0, 1, True, False)


SHARES = {
    "one rank": ([5, 5, 5], 1, [0, 0, 0]),
    "as many as files": ([5, 5, 5], 3, [0, 1, 2]),
    "more ranks than files": ([5, 5], 4, [0, 2]),
    "a short last file": ([5, 5, 5, 1], 2, [0, 0, 1, 1]),
    "nothing": ([], 2, []),
    "files without bytes": ([0, 0], 2, [0, 0]),
}


@pytest.mark.parametrize("case", SHARES)
def test_files_go_to_ranks_in_runs_of_about_equal_bytes(case: str) -> None:
    sizes, ranks, wanted = SHARES[case]
    assert shares(sizes, ranks) == wanted
