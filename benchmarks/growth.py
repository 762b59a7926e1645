"""How time and memory grow with a checkpoint, beside `mlx_lm.convert`: a chart.

    python benchmarks/growth.py [--out docs/growth.png] [--folder DIR] [--panels layers,shards]

bf16 to affine 4 bit. Four series: layers (1.0 GB each), experts of a layer, files that hold the same
tensors, and stored tensors of a narrow model. The figures go beside the chart as JSON.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from large import NARROW, build, machine, ours, run, theirs, weights

# panel -> axis label and, for each point, layers, changes of the config and number of files
PANELS: dict[str, tuple[str, dict[int, tuple[int, dict[str, Any], int | None]]]] = {
    "layers": ("layers of 1 GB", {n: (n, {}, None) for n in (2, 4, 8)}),
    "experts": (
        "experts",
        {n: (3, {"n_routed_experts": n, "moe_intermediate_size": 256}, None) for n in (8, 64, 256)},
    ),
    "shards": ("files of the source", {n: (2, {}, n) for n in (1, 16, 163)}),
    "tensors": (
        "stored tensors (narrow model)",
        {n: (1 + n // 768, {**NARROW, "n_routed_experts": 256}, 8) for n in (10_000, 100_000, 500_000)},
    ),
}


def main() -> None:
    """Measure, print and draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("docs/growth.png"))
    parser.add_argument("--folder", type=Path, help="where to work; default: a temporary folder")
    parser.add_argument("--panels", default=",".join(PANELS))
    args = parser.parse_args()
    figures: dict[str, Any] = {"date": str(datetime.date.today()), "machine": machine(), "panels": {}}
    beside = args.out.with_suffix(".json")
    if beside.exists():
        figures["panels"] = json.loads(beside.read_text())["panels"]
    for panel in args.panels.split(","):
        figures["panels"][panel] = []
        for number, (layers, changes, shards) in PANELS[panel][1].items():
            point = {"at": number, **_point(layers, changes, shards, args.folder)}
            figures["panels"][panel].append(point)
            print(panel, point, flush=True)
        beside.write_text(json.dumps(figures, indent=1) + "\n")
    _draw(figures, args.out)


def _point(layers: int, changes: dict[str, Any], shards: int | None, folder: Path | None) -> dict[str, Any]:
    work = Path(tempfile.mkdtemp(dir=folder))
    try:
        build(work / "source", layers, changes=changes, shards=shards)
        found: dict[str, Any] = {"bytes": weights(work / "source")}
        for tool, command in (("mla-sanitize", ours), ("mlx_lm.convert", theirs)):
            out = work / "out"
            seconds, peak, first = run(command(work / "source", out, "-q"), out)
            found[tool] = {"seconds": round(seconds, 2), "first": round(first, 2), "peak_bytes": peak}
            shutil.rmtree(out)
        return found
    finally:
        shutil.rmtree(work)


def _draw(figures: dict[str, Any], out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = [panel for panel in PANELS if panel in figures["panels"]]
    _, axes = pyplot.subplots(2, len(panels), figsize=(3.6 * len(panels), 6), squeeze=False)
    for column, panel in enumerate(panels):
        points = figures["panels"][panel]
        for row, (key, unit, scale) in enumerate((("seconds", "s", 1), ("peak_bytes", "MB", 1e6))):
            plot = axes[row][column]
            for tool, style in (("mla-sanitize", "o-"), ("mlx_lm.convert", "s--")):
                values = [point[tool][key] / scale for point in points]
                plot.plot([point["at"] for point in points], values, style, label=tool)
            plot.set_xscale("log", base=2)
            plot.set_xticks([point["at"] for point in points], [f"{point['at']:,}" for point in points])
            plot.minorticks_off()
            plot.set_ylim(bottom=0)
            plot.grid(alpha=0.3)
            plot.set_xlabel(PANELS[panel][0])
            if column == 0:
                plot.set_ylabel(f"{'wall time' if row == 0 else 'peak memory'} ({unit})")
    axes[0][0].legend()
    pyplot.suptitle(f"bf16 to affine 4 bit; {figures['machine']}, {figures['date']}")
    pyplot.tight_layout()
    pyplot.savefig(out, dpi=110)


if __name__ == "__main__":
    main()
