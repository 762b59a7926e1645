"""What becomes of the ranks when one of them fails, and which processes are ranks at all."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx
import pytest
from launching import run_ranks
from pairs import ONLY_IN_ALL
from tiny import CHILD, JOURNALS, child, digests, uninterrupted, write_tiny

from mla_tools.distributed import Alone, launched
from mla_tools.errors import MlaToolsError

# Rank 1 fails when it has written a little: at once, or when rank 0 has done its work and waits for it.
FAILING = """
import errno, os
from mla_tools import distributed
FAULTS = {"full": OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "unforeseen": ValueError("no such luck")}
RANK, PIPE, FAULT, WAITS = (os.environ[name] for name in ("MLX_RANK", "PIPE", "FAULT", "WAITS"))
agree, pwrite, writes, waited = distributed._Launched.agree, os.pwrite, 0, not int(WAITS)
def telling(self, ok):
    if RANK == "0":
        os.write(int(PIPE), b".")
    return agree(self, ok)
def failing(fd, data, at):
    global writes, waited
    writes += 1
    if RANK == "1" and FAULT and writes > 3:
        while not waited:  # for the second time, the first being before anything is written
            waited = os.read(int(PIPE), 1) == b"." == os.read(int(PIPE), 1)
        raise FAULTS[FAULT]
    return pwrite(fd, data, at)
distributed._Launched.agree, os.pwrite = telling, failing
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sources") / "tiny"
    write_tiny(folder)
    return folder


@pytest.fixture(scope="module")
def wanted(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return uninterrupted(source, tmp_path_factory.mktemp("wanted") / "out")


def run(
    source: Path, out: Path, *flags: str, fault: str = "", waits: bool = False, ranks: int = 2
) -> list[tuple[int, str]]:
    argv = ["convert", str(source), "--mlx-path", str(out), "--threads", "1", *flags]
    env = {"FAULT": fault, "WAITS": str(int(waits))}
    return run_ranks(child(*argv, code=FAILING + CHILD), out.parent, ranks, env)


SENTENCES = {
    "full": "cannot be written: No space left on device; it needs 187,872 bytes; free some space or choose"
    " another disk\n",
    "unforeseen": "error: mla-sanitize itself failed (ValueError: no such luck). ",
}


# What fails and when have nothing to do with each other.
FAULTS = [
    pytest.param("full", False, id="full-at once"),
    pytest.param("unforeseen", True, id="unforeseen-while the other waits to publish"),
    pytest.param("unforeseen", False, id="unforeseen-at once", marks=ONLY_IN_ALL),
    pytest.param("full", True, id="full-while the other waits to publish", marks=ONLY_IN_ALL),
]


@pytest.mark.parametrize(("fault", "waits"), FAULTS)
def test_when_one_rank_fails_all_end_and_nothing_has_its_final_name(
    fault: str, waits: bool, source: Path, wanted: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    (first, heard), (second, said) = run(source, out, fault=fault, waits=waits)
    assert (first, second) == (1, 1), (heard, said)
    assert "error: another process of this run failed; see its message\n" in heard
    assert SENTENCES[fault] in said
    assert f"{out} is unfinished: run the same command with --resume to finish it\n" in heard
    assert not [path for path in out.iterdir() if path.suffix in (".safetensors", ".json")]
    assert len([*out.glob(JOURNALS)]) == 2
    assert [code for code, _ in run(source, out, "--resume")] == [0, 0]
    assert digests(out) == wanted


def test_when_the_first_rank_finds_that_it_cannot_begin_the_other_one_ends_too(
    source: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("")
    (first, heard), (second, said) = run(source, out)
    assert (first, second) == (1, 1), (heard, said)
    assert "as it already exists" in heard
    assert [path.name for path in out.iterdir()] == ["mine"]


JOINED, ALONE = "joined", "alone"
OPEN_MPI = {"OMPI_COMM_WORLD_LOCAL_RANK": "0", "PMIX_RANK": "0", "OMPI_COMM_WORLD_RANK": "0"}
SLURM = {"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_JOB_ID": "17"}

# What launchers set, and what comes of it where MLX can join the group, and where it cannot.
ENVIRONMENTS: dict[str, tuple[dict[str, str], str, str]] = {
    "nothing": ({}, ALONE, ALONE),
    "Open MPI": ({**OPEN_MPI, "OMPI_COMM_WORLD_SIZE": "4"}, JOINED, "OMPI_COMM_WORLD_RANK"),
    "Open MPI, one": ({**OPEN_MPI, "OMPI_COMM_WORLD_SIZE": "1"}, ALONE, ALONE),
    "MPICH": ({"PMI_RANK": "1", "PMI_SIZE": "4", "PMI_FD": "7"}, JOINED, "PMI_RANK"),
    "MPICH, one": ({"PMI_RANK": "0", "PMI_SIZE": "1", "PMI_FD": "7"}, ALONE, ALONE),
    "Slurm without PMI": (SLURM, ALONE, ALONE),
    "a shell in a step of Slurm": ({**SLURM, "PMI_RANK": "0", "PMI_SIZE": "1"}, ALONE, ALONE),
    "what Slurm left": ({**SLURM, "PMI_RANK": "0"}, JOINED, "PMI_RANK"),
    "mlx.launch": ({"MLX_RANK": "1", "MLX_HOSTFILE": '[["a:1"],["b:2"]]'}, JOINED, "MLX_RANK"),
    "mlx.launch -n 1": ({"MLX_RANK": "0", "MLX_HOSTFILE": ""}, ALONE, ALONE),
    "mlx.launch of NCCL or JACCL": ({"MLX_RANK": "0"}, JOINED, "MLX_RANK"),
    "mlx.launch in a job of one": (
        {"MLX_RANK": "1", "MLX_HOSTFILE": '[["a:1"],["b:2"]]', **OPEN_MPI, "OMPI_COMM_WORLD_SIZE": "1"},
        JOINED,
        "MLX_RANK, OMPI_COMM_WORLD_RANK",
    ),
    "two launchers of one": (
        {**OPEN_MPI, "OMPI_COMM_WORLD_SIZE": "1", "PMI_RANK": "0", "PMI_SIZE": "1"},
        ALONE,
        ALONE,
    ),
}


class FourProcesses:
    def rank(self) -> int:
        return 1

    def size(self) -> int:
        return 4


@pytest.mark.parametrize("joins", [True, False], ids=["MLX joins", "MLX cannot"])
@pytest.mark.parametrize("case", ENVIRONMENTS)
def test_the_environment_says_which_group_a_process_is_of(
    case: str, joins: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment, joined, refused = ENVIRONMENTS[case]
    _set(environment, tmp_path, monkeypatch)
    asked = []

    def init(*, strict: bool) -> FourProcesses:
        asked.append(strict)
        if not joins:
            raise RuntimeError("[distributed] Cannot initialize any backend")
        return FourProcesses()

    monkeypatch.setattr(mx.distributed, "init", init)
    if joins or refused == ALONE:
        group = launched()
        assert (group.rank, group.size) == ((0, 1) if joined == ALONE else (1, 4))
        assert isinstance(group, Alone) == (joined == ALONE)
        assert asked == ([] if joined == ALONE else [True])
    else:
        with pytest.raises(MlaToolsError) as caught:
            launched()
        assert str(caught.value) == (
            f"{refused} is set, as by a launcher of several processes, but MLX cannot join them"
            " ([distributed] Cannot initialize any backend). Start with mlx.launch or mpirun, or unset"
            f" {refused} to convert in one process."
        )


def test_a_group_of_another_size_than_the_launcher_started_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _set({**OPEN_MPI, "OMPI_COMM_WORLD_SIZE": "2"}, tmp_path, monkeypatch)
    monkeypatch.setattr(mx.distributed, "init", lambda strict: FourProcesses())
    with pytest.raises(MlaToolsError, match="is set by a launcher of 2 processes, but MLX joins 4"):
        launched()


def _set(environment: Mapping[str, str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set what a launcher sets, and nothing that another one may have set for the tests."""
    for name in ("MLX_RANK", "MLX_HOSTFILE", *OPEN_MPI, "OMPI_COMM_WORLD_SIZE", "PMI_RANK", "PMI_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        if name == "MLX_HOSTFILE":
            (folder / "hosts.json").write_text(value)
            value = str(folder / "hosts.json")
        monkeypatch.setenv(name, value)
