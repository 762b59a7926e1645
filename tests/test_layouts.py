"""Plans that aim at another layout than mlx-lm's, and at other formats than MLX's."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest
from support import loaded, same, sample

from mla_tools.architectures import MODEL_TYPES
from mla_tools.codecs import FORMATS, TargetCodec
from mla_tools.codecs.compressed_int import CompressedInt
from mla_tools.codecs.fp4 import Fp4
from mla_tools.codecs.fp8 import Fp8Block
from mla_tools.errors import UsageError
from mla_tools.execute import execute
from mla_tools.files.checkpoint import open_checkpoint
from mla_tools.options import Options
from mla_tools.plan import Plan, Workload, make_plan
from mla_tools.samples import write_sample
from mla_tools.spec import DType


def converted(source: Path, out: Path, options: Options | None = None) -> Plan:
    plan = make_plan(open_checkpoint(source), options or Options())
    execute(plan, out)
    return plan


def aimed(converted: Path, source: Path, options: Options) -> Plan:
    """Return the plan back from a converted folder, with the config that its source had."""
    return make_plan(replace(open_checkpoint(converted), config=open_checkpoint(source).config), options)


@pytest.mark.parametrize("family", MODEL_TYPES)
def test_what_was_converted_goes_back_to_the_hubs_layout_bit_for_bit(family: str, tmp_path: Path) -> None:
    source = sample(family, "f32")
    there = converted(source, tmp_path / "mlx")
    back = aimed(tmp_path / "mlx", source, Options(layout="hub"))
    execute(back, tmp_path / "hub")
    wanted, found = loaded(source), loaded(tmp_path / "hub")
    dropped = {part for drop in there.drops for part in drop.source.parts.values()}
    assert found.keys() == wanted.keys() - dropped
    for name, array in found.items():
        assert same(array, wanted[name]), name
    if family == "minicpm3":  # its tied embedding has one name in both layouts, and a head beside it in one
        return
    # And what is there already stays as it is.
    again = aimed(tmp_path / "hub", source, Options(layout="hub"))
    assert {target.exactness for step in again.steps for target in step.targets} == {"copied"}
    assert [step.sources[0].name for step in again.steps] == [step.targets[0].name for step in again.steps]


TARGETS: dict[str, TargetCodec] = {
    "fp8": Fp8Block(),
    "fp8-ue8m0": Fp8Block(scales=DType.F8_E8M0, packs=True),
    "ct-fp8-channel": FORMATS["ct-fp8-channel"].codec,
    "ct-int4": CompressedInt(4, 32, True, DType.BF16),
    "ct-int4-asym": CompressedInt(4, 64, False, DType.BF16),
}


# A layer without experts, one with them, and the MTP layer.
FEW = {"num_hidden_layers": 2, "n_routed_experts": 4, "vocab_size": 64}


@pytest.mark.parametrize("name", TARGETS)
def test_another_format_is_written_as_its_samples_are(name: str, tmp_path: Path) -> None:
    source, other = tmp_path / "source", tmp_path / "other"
    write_sample("deepseek_v3", source, changes=FEW)
    write_sample("deepseek_v3", other, name, changes=FEW)
    codec = TARGETS[name]
    converted(source, tmp_path / "mlx")
    plan = aimed(tmp_path / "mlx", source, Options(layout="hub", format=codec, dtype=DType.BF16))
    execute(plan, tmp_path / "hub")
    # The same file in slabs that are as small as they can be.
    execute(plan, tmp_path / "small", workload=Workload(1, 64, 1 << 30))
    written = loaded(tmp_path / "hub")
    assert written.keys() == loaded(tmp_path / "small").keys()
    for tensor, array in loaded(tmp_path / "small").items():
        assert same(array, written[tensor]), tensor
    # What samples have in the format is the same, as their values are.
    stored = loaded(other)
    parts = [tensor for tensor in stored if ".layers.1.mlp.experts." in tensor]
    assert len(parts) >= 2 * 4 * 3
    for tensor in parts:
        assert same(stored[tensor], written[tensor]), tensor
    config = json.loads((tmp_path / "hub" / "config.json").read_text())
    section = FORMATS[name].section
    assert section is not None
    assert config["quantization_config"]["quant_method"] == section["quant_method"]
    assert "quantization" not in config
    # And it is read again as what it is.
    names = {
        source.codec.name
        for step in converted(tmp_path / "hub", tmp_path / "again").steps
        for source in step.sources
    }
    assert codec.name in names


@pytest.mark.parametrize(
    ("fmt", "codec"),
    [("quark-mxfp4", Fp4(e8m0=True)), ("ct-mxfp4", Fp4(e8m0=True, codes="_packed"))],
    ids=["quark-mxfp4", "ct-mxfp4"],
)
def test_codes_go_back_to_their_format_as_they_are(fmt: str, codec: TargetCodec, tmp_path: Path) -> None:
    source = sample("deepseek_v3", fmt)
    converted(source, tmp_path / "mlx")
    back = aimed(tmp_path / "mlx", source, Options(layout="hub", format=codec))
    execute(back, tmp_path / "hub")
    stored, written = loaded(source), loaded(tmp_path / "hub")
    experts = [name for name in written if ".experts." in name]
    assert len(experts) == 3 * 8 * 3 * 2
    for name in experts:
        assert same(stored[name], written[name]), name


def test_codes_of_mxfp8_become_fp8_in_groups_as_they_are(tmp_path: Path) -> None:
    source = sample("deepseek_v3", "fp8-ue8m0")
    converted(source, tmp_path / "mlx")
    codec = Fp8Block((1, 32), DType.F8_E8M0, "_scale_inv", packs=True)
    execute(aimed(tmp_path / "mlx", source, Options(layout="hub", format=codec)), tmp_path / "hub")
    stored, written = loaded(source), loaded(tmp_path / "hub")
    experts = [name for name in written if ".experts." in name and name.endswith(".weight")]
    assert len(experts) == 3 * 8 * 3
    for name in experts:
        assert same(stored[name], written[name]), name
        scales = mx.repeat(mx.repeat(stored[f"{name}_scale_inv"], 4, axis=1), 128, axis=0)
        assert same(scales[: written[name].shape[0]], written[f"{name}_scale_inv"]), name


def test_a_layout_that_the_family_does_not_have_is_refused() -> None:
    with pytest.raises(UsageError, match="deepseek_v3: there is no layout gguf here, only hub, mlx"):
        make_plan(open_checkpoint(sample("deepseek_v3")), Options(layout="gguf"))
