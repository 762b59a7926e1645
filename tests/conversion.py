"""A conversion as the command makes it, without the cost of a child process."""

from __future__ import annotations

import json
from pathlib import Path

from mla_tools.cli import options_of, parser
from mla_tools.execute import execute
from mla_tools.files.checkpoint import open_checkpoint
from mla_tools.plan import Plan, make_plan
from mla_tools.verify import compare
from mla_tools.verify.child import manifest


def convert(source: Path, out: Path, *flags: str) -> Plan:
    """Convert as `mla-sanitize convert SOURCE --mlx-path OUT FLAGS` does, and return the plan.

    mlx-lm's class is asked in this process, where it is imported already.
    """
    args = parser().parse_args(["convert", str(source), "--mlx-path", str(out), *flags])
    plan = make_plan(open_checkpoint(source), options_of(args))
    assert compare(plan.shapes, manifest(json.loads(json.dumps(plan.config)), plan.shapes)) == []
    execute(plan, out)
    return plan
