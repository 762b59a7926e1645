"""mla-sanitize: the command."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from mla_tools import convert as library
from mla_tools import report
from mla_tools.architectures import MODEL_TYPES
from mla_tools.codecs import FORMATS
from mla_tools.console import ended, say, show, show_json
from mla_tools.errors import CheckpointError, MlaToolsError, UsageError
from mla_tools.files.checkpoint import no_collector
from mla_tools.files.place import shown
from mla_tools.options import DTYPES, EMBED_Q, Options, parse_embed_q, parse_override, read_recipe
from mla_tools.plan import MAX_MEMORY, NETWORK_THREADS, THREADS
from mla_tools.progress import telling
from mla_tools.quantization import MODES, RECIPES, QuantSpec
from mla_tools.samples import write_sample

__all__ = ["main", "options_of", "parser"]

_DESCRIPTION = """\
Turn downloaded checkpoints of MLA models into ones that run on MLX.

  mla-sanitize inspect DIR                      what is this, and is anything wrong with it?
  mla-sanitize plan DIR -q                      what would a conversion to 4 bits do?
  mla-sanitize convert DIR --mlx-path OUT -q    do it
  mla-sanitize verify OUT                       is it complete and unchanged?
  mlx_lm.generate --model OUT --prompt "..."    run it
"""

_EPILOG = """\
exit codes: 0 done, 1 an error or a problem, 2 wrong usage, 130 interrupted,
            141 stdout was closed (as by "| head")
"""

_CONVERT = """\
Write a folder that mlx_lm.load opens strictly. SRC is a checkpoint folder as it comes from the hub
(config.json, safetensors, tokenizer), or a repository on the hub, org/name or hf://org/name@revision. The
tensors of a repository are read over the network while they are converted, so it needs no disk space. All
problems of the source are reported at once, before a byte is written. The options mean the same as in
mlx_lm.convert.
"""

_CONVERT_EPILOG = (
    """\
examples:
  mla-sanitize convert DeepSeek-V3 --mlx-path DeepSeek-V3-4bit -q
  mla-sanitize convert GLM-4.7-Flash -q --q-bits 8 --q-group-size 32
  mla-sanitize convert GLM-4.7-Flash -q --q-mode mxfp4
  mla-sanitize convert Kimi-Linear-48B --dtype float16
  mla-sanitize convert hf://moonshotai/Kimi-Linear-48B-A3B-Instruct@main -q

Without -q and -d, a quantized source keeps its encoding. The V half of a quantized kv_b_proj then keeps its
bits; the K half changes its axis, and --embed-q says how to encode it.

"""
    + _EPILOG
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code, as the help lists them."""
    given = sys.argv[1:] if argv is None else list(argv)

    def run() -> int:
        try:
            args = parser().parse_args(given)
        except SystemExit as stop:  # the help or the version was asked for, and is shown
            return int(stop.code or 0)
        command: Callable[[argparse.Namespace], int] = args.run
        return command(args)

    return ended(run, as_json="--json" in given, debug="--debug" in given)


# --- the commands ------------------------------------------------------------------------------------


def _convert(args: argparse.Namespace) -> int:
    options = options_of(args)
    with telling() as progress:
        done = library.convert(
            _source(args),
            args.mlx_path,
            options,
            **_reading(args),
            max_memory=args.max_memory,
            threads=args.threads,
            device=args.device,
            resume=args.resume,
            overwrite=args.overwrite,
            keep_mtp=args.keep_mtp,
            check_source=args.check_source,
            trust_remote_code=args.trust_remote_code,
            progress=progress,
        )
    if done.rank:
        return 0
    if args.json:
        _show_values(
            {
                "output": str(each.folder),
                "tokenizer": done.tokenizer,
                **report.plan_json(each.plan, each.workload),
            }
            for each in done
        )
    else:
        show("\n".join([*map(_summary, done), *([done.tokenizer] if done.tokenizer else [])]))
    return 0


def _summary(done: library.Written) -> str:
    if done.anything:
        return report.summary_text(done.plan, done.folder)
    return f"{done.folder} is complete already; mla-sanitize verify {done.folder} checks its bytes"


@no_collector()
def _plan(args: argparse.Namespace) -> int:
    options = options_of(args)
    try:
        plans = library.plan(_source(args), options, **_reading(args), keep_mtp=args.keep_mtp)
    except CheckpointError as error:
        raise (error.in_full() if args.long else error) from error
    work = plans.with_workloads(args.max_memory, args.threads)
    if args.json:
        _show_values(report.plan_json(*each) for each in work)
    else:
        show("\n\n".join(report.plan_text(*each, long=args.long) for each in work))
    return 0


def _show_values(plans: Iterable[dict[str, Any]]) -> None:
    """Show a plan as JSON, with that of the MTP layers in it if there is one."""
    model, *mtp = plans
    show_json(model | ({"mtp": mtp[0]} if mtp else {}))


@no_collector()
def _inspect(args: argparse.Namespace) -> int:
    found = library.inspect(_source(args), **_reading(args))
    survey = report.survey_json(found.checkpoint, found.made)
    error = CheckpointError(found.problems, whole=args.long) if found.problems else None
    if args.json:
        show_json(survey)
    else:
        show(report.survey_text(survey, error))
    return 1 if error else 0


def _verify(args: argparse.Namespace) -> int:
    folder = Path(args.folder)
    found = library.verify(folder, quick=args.quick)
    if args.json:
        show_json(report.verified_json(found, folder, quick=args.quick))
    else:
        show(report.verified_text(found, folder, quick=args.quick))
    return 0


def _sample(args: argparse.Namespace) -> int:
    folder = Path(args.folder)
    try:
        write_sample(args.family, folder, args.format, seed=args.seed)
    except OSError as error:
        raise MlaToolsError(f"{folder} cannot be written: {error.strerror}") from error
    if args.json:
        show_json({"output": str(folder), "family": args.family, "format": args.format})
    else:
        show(f"A random {args.family} checkpoint in {args.format} is in {folder}.")
    return 0


# --- the options -------------------------------------------------------------------------------------


def _source(args: argparse.Namespace) -> str:
    given = [path for path in (args.source, args.hf_path) if path]
    if len(given) != 1:
        raise UsageError("Name one checkpoint: as SRC, or with --hf-path.")
    return str(given[0])


def _reading(args: argparse.Namespace) -> dict[str, Any]:
    return {"revision": args.revision, "download": args.download}


def options_of(args: argparse.Namespace) -> Options:
    """Return the options of a conversion; UsageError where they contradict each other."""
    details = {"--q-bits": args.q_bits, "--q-group-size": args.q_group_size, "--q-mode": args.q_mode}
    given = [flag for flag, value in details.items() if value is not None]
    if given and not args.quantize:
        raise UsageError(f"{', '.join(given)}: not allowed without -q.")
    spec = QuantSpec(args.q_mode or "affine", args.q_bits, args.q_group_size) if args.quantize else None
    overrides = [parse_override(text) for text in args.q_override]
    embed_q = None if args.embed_q is None else parse_embed_q(args.embed_q)
    if args.recipe:
        recipe = read_recipe(Path(args.recipe))
        spec = spec or recipe.get("quantize")
        embed_q = embed_q or recipe.get("embed_q")
        overrides = [*recipe["overrides"], *overrides]
    return Options(
        quantize=spec,
        quant_predicate=args.quant_predicate,
        dtype=DTYPES[args.dtype] if args.dtype else None,
        dequantize=args.dequantize,
        embed_q=embed_q,
        overrides=tuple(overrides),
        keep_vision=args.keep_vision,
        missing_biases=args.missing_biases,
    )


class _Parser(argparse.ArgumentParser):
    """A parser whose errors become text where all errors do."""

    def _print_message(self, message: str, file: object = None) -> None:
        show(message.rstrip())

    def error(self, message: str) -> NoReturn:
        say(self.format_usage().rstrip())
        raise UsageError(message)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    raw = argparse.RawDescriptionHelpFormatter
    top = _Parser("mla-sanitize", description=_DESCRIPTION, epilog=_EPILOG, formatter_class=raw)
    top.add_argument("--version", action="version", version=f"mla-sanitize {_version()}")
    commands = top.add_subparsers(metavar="COMMAND", required=True)

    convert = commands.add_parser(
        "convert",
        help="write a folder that mlx_lm.load opens",
        description=_CONVERT,
        epilog=_CONVERT_EPILOG,
        formatter_class=raw,
    )
    _add_source(convert)
    _add_conversion(convert)
    there = convert.add_mutually_exclusive_group()
    there.add_argument("--resume", action="store_true", help="finish an unfinished OUT of the same plan")
    there.add_argument(
        "--overwrite",
        action="store_true",
        help="replace OUT if this tool made it; the old files are removed when writing begins",
    )
    convert.add_argument(
        "--check-source",
        action="store_true",
        help="first read all weight files, and compare them with the hub's hashes",
    )
    convert.add_argument(
        "--device",
        choices=("cpu", "gpu"),
        help="where to compute (default: MLX's default); cpu writes the same bytes on every machine",
    )
    convert.set_defaults(run=_convert)

    plan = commands.add_parser(
        "plan",
        help="show what convert would do; writes nothing",
        description="Show what `convert` with the same options would do; only headers are read.",
        epilog=_EPILOG,
        formatter_class=raw,
    )
    _add_source(plan)
    _add_conversion(plan)
    _add_long(plan, "list every tensor and every problem separately")
    plan.set_defaults(run=_plan)

    inspect = commands.add_parser(
        "inspect",
        help="show what a checkpoint is: family, geometry, formats, sizes, problems",
        description="Show what a checkpoint is; only headers are read. Exit code 1 if anything is wrong.",
        epilog=_EPILOG,
    )
    _add_source(inspect)
    _add_long(inspect, "list every problem separately, with full names")
    inspect.set_defaults(run=_inspect)

    verify = commands.add_parser(
        "verify",
        help="check that an output is complete and unchanged",
        description="Compare an output of convert with its mla_tools.json: sizes, headers, index and sha256.",
        epilog=_EPILOG,
    )
    verify.add_argument("folder", metavar="OUT", help="the folder that convert wrote")
    verify.add_argument("--quick", action="store_true", help="do not read the data of the weight files")
    _add_json(verify)
    verify.set_defaults(run=_verify)

    sample = commands.add_parser(
        "sample",
        help="write a tiny random checkpoint in the hub's layout",
        description="Write a tiny random checkpoint in the hub's real layout, with a tiny tokenizer.",
        epilog=_EPILOG,
    )
    sample.add_argument("family", metavar="FAMILY", choices=sorted(MODEL_TYPES), help=", ".join(MODEL_TYPES))
    sample.add_argument("folder", metavar="DIR", help="the folder to write; must not exist")
    sample.add_argument("--format", choices=list(FORMATS), default="bf16", help="default: %(default)s")
    sample.add_argument("--seed", type=_seed, default=0, help="default: %(default)s")
    _add_json(sample)
    sample.set_defaults(run=_sample)
    return top


def _add_source(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source",
        metavar="SRC",
        nargs="?",
        help="checkpoint folder, or repository on the hub: org/name or hf://org/name@revision",
    )
    parser.add_argument(
        "--hf-path", "--model", metavar="SRC", help="the same as SRC, for mlx_lm.convert's options"
    )
    parser.add_argument("--revision", help="branch, tag or commit of a hub repository")
    parser.add_argument(
        "--download",
        action="store_true",
        help="download a repository into the hub's cache first, instead of reading ranges of its files",
    )
    _add_json(parser)


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the result as JSON on stdout")
    parser.add_argument("--debug", action="store_true", help="show where in the program an error occurred")


def _add_long(parser: argparse.ArgumentParser, text: str) -> None:
    parser.add_argument("--long", action="store_true", help=text)


def _add_conversion(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--mlx-path", metavar="OUT", default="mlx_model", help="folder to write (default: %(default)s)")
    add("-q", "--quantize", action="store_true", help="quantize the weights")
    add("--q-bits", type=int, help="bits per weight (default: 4; mxfp8: 8)")
    add("--q-group-size", type=int, help="weights per scale (default: affine 64, mxfp4/mxfp8 32, nvfp4 16)")
    add("--q-mode", choices=sorted(MODES), help="default: affine")
    add("--quant-predicate", choices=RECIPES, help="mixed-bit predicate; needs -q")
    add(
        "--q-override",
        metavar="REGEX=BITS[,GROUP[,MODE]]",
        action="append",
        default=[],
        help="another encoding, or float, for modules whose path contains a match of REGEX; may be"
        " repeated, the last match counts",
    )
    add("--recipe", metavar="FILE", help="YAML file with settings: quantize, embed_q and overrides")
    add(
        "--dtype",
        choices=list(DTYPES),
        help="float dtype of unquantized tensors (default: torch_dtype in config.json)",
    )
    add("-d", "--dequantize", action="store_true", help="decode a quantized checkpoint to floats")
    add(
        "--embed-q",
        metavar="auto|source|float|BITS[,GROUP[,MODE]]",
        help=f"encoding of the K half of a kv_b_proj that keeps its quantization (default: auto, the smallest"
        f" that loses nothing, else {EMBED_Q.bits},{EMBED_Q.group_size})",
    )
    add(
        "--missing-biases",
        choices=["zero"],
        help="take zeros where an affine tensor has no biases and others have some (default: refuse it)",
    )
    add(
        "--keep-vision",
        action="store_true",
        help="copy the vision tensors unchanged (default: drop them). mlx_lm.load ignores them. mlx-vlm can"
        " then load Kimi K2.5 and K3, but not Mistral 4 (mlx-vlm 0.7.10 does not split kv_b_proj)",
    )
    add(
        "--max-memory",
        metavar="SIZE",
        default=f"{MAX_MEMORY // 10**9}GB",
        help="the most memory that the process may take, such as 500MB (default: %(default)s)",
    )
    few, many = THREADS, NETWORK_THREADS
    add(
        "--threads",
        type=_threads,
        help=f"threads that read and compute (default: {few}; {many} over a network)",
    )
    add(
        "--keep-mtp",
        action="store_true",
        help="write the MTP layers of DeepSeek V4 to a second folder, OUT-mtp, for mlx-vlm's drafters"
        " (default: drop them)",
    )
    add(
        "--trust-remote-code",
        action="store_true",
        help="convert opens the tokenizer as mlx_lm does, to see whether that works; with this option also"
        " one that needs the checkpoint's own code. No other code in a checkpoint is ever executed",
    )


def _threads(text: str) -> int:
    most = library.MAX_THREADS
    if not re.fullmatch("[0-9]{1,9}", text) or not 1 <= int(text) <= most:
        raise argparse.ArgumentTypeError(f"{shown(text)}: give a number from 1 to {most}")
    return int(text)


def _seed(text: str) -> int:
    if not re.fullmatch("[0-9]{1,18}", text):
        raise argparse.ArgumentTypeError(f"{shown(text)}: give a number, 0 or more")
    return int(text)


def _version() -> str:
    from importlib.metadata import version

    return version("mla-tools")
