"""Peak memory for a checkpoint far larger than memory: 64 GB of holes, up to its first finished file.

    python benchmarks/sparse.py [--layers 62] [--max-memory 400MB] [--folder DIR]

The source takes no disk. The conversion to affine 4 bit is stopped, as by Ctrl-C, as soon as the journal
says that the first file of 5 GB is on disk for good.
"""

from __future__ import annotations

import argparse
import datetime
import shutil
import tempfile
from pathlib import Path

from large import build, machine, ours, run, weights


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=62)
    parser.add_argument("--max-memory", default="400MB")
    parser.add_argument("--folder", type=Path, help="where to work; default: a temporary folder")
    args = parser.parse_args()
    work = Path(tempfile.mkdtemp(dir=args.folder))
    try:
        source, out = work / "source", work / "out"
        build(source, args.layers, sparse=True)
        command = ours(source, out, "-q", "--max-memory", args.max_memory)

        def enough() -> bool:
            return any(b'"file"' in path.read_bytes() for path in out.glob("mla_tools.journal-*"))

        seconds, peak, first = run(command, out, enough)
        print(f"{datetime.date.today()}  {machine()}")
        print(
            f"{weights(source) / 1e9:.1f} GB: begins to write after {first:.1f} s,"
            f" first file after {seconds:.0f} s, peak {peak / 1e6:.0f} MB"
        )
    finally:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
