"""A plan gives the decoder that it was made of, and is used for nothing else."""

import dataclasses
import shutil
import struct
import zipfile
from pathlib import Path

import msgspec
import pytest
import torch

from runtime.compiling import loading
from runtime.compiling.fused import fuse_decoder
from runtime.compiling.graph_decoder import GraphDecoder, paged_info
from runtime.compiling.packaging import PROGRAM_NAME
from runtime.compiling.paging.page import PagedGraph, page
from runtime.compiling.plans import plan as plans
from runtime.compiling.plans.arguments import find_function, name_function
from runtime.compiling.plans.plan import PLAN_NAME, PlanUnusable, read_plan, write_plan
from runtime.compiling.plans.reading import load_planned
from runtime.compiling.plans.writing import add_plan
from runtime.execution.native import variants
from runtime.importing.exported import load_exported
from runtime.protocol import DecoderInfo, Manifest
from tests.runtime.compiling.fusions.graphs import exported, logits_of


def make(family: str, form: str, directory: Path) -> tuple[PagedGraph, DecoderInfo]:
    """An artifact with a plan, and what the plan was made of."""
    torch.export.save(exported(family), directory / PROGRAM_NAME)
    model = load_exported(directory / PROGRAM_NAME)
    paged = page(model.program, max_context_tokens=200)
    paged = fuse_decoder(paged) if form == "fused" else paged
    info = paged_info(paged, "Tiny", has_tokenizer=False, has_chat_template=False)
    decoder = GraphDecoder(paged, info, (), [])
    assert add_plan(directory, decoder, model.program, form) is None
    return paged, info


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, DecoderInfo]:
    directory = tmp_path_factory.mktemp("artifact")
    return directory, make("llama", "fused", directory)[1]


@pytest.fixture
def artifact(made: tuple[Path, DecoderInfo], tmp_path: Path) -> Path:
    return Path(shutil.copytree(made[0], tmp_path / "artifact"))


@pytest.fixture
def info(made: tuple[Path, DecoderInfo]) -> DecoderInfo:
    return made[1]


@pytest.mark.parametrize(
    ("family", "form"),
    [("gemma2", "fused"), ("gpt2", "fused"), ("gptj", "eager")],
)
def test_it_computes_the_same_bits(family: str, form: str, tmp_path: Path):
    paged, info = make(family, form, tmp_path)
    planned = load_planned(tmp_path, info, form)
    assert planned.layers == paged.layers
    assert planned.dtype == paged.dtype
    module = planned.module
    assert isinstance(module, torch.fx.GraphModule)
    found = logits_of(dataclasses.replace(paged, module=module))
    assert torch.equal(found, logits_of(paged))


def test_weights_are_held_once(artifact: Path, info: DecoderInfo):
    """Nor are they in the plan: it is small beside the program."""
    planned = load_planned(artifact, info, "fused")
    held = sum(tensor.nbytes for tensor in planned.module.buffers())
    program_bytes = (artifact / PROGRAM_NAME).stat().st_size
    assert held < program_bytes
    plan = read_plan(artifact / PLAN_NAME)
    own = sum(len(tensor.data) for tensor in plan.tensors.values())
    assert own < program_bytes / 4


def test_a_worker_does_not_analyse_a_planned_graph(
    artifact: Path, info: DecoderInfo, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delattr(loading, "page_in_form")
    monkeypatch.delattr(loading, "load_exported")
    decoder = loading.load_paged(artifact, manifest(info))
    assert isinstance(decoder, GraphDecoder)


def manifest(info: DecoderInfo) -> Manifest:
    return Manifest(
        kind="decoder",
        format="pt2",
        num_parameters=1,
        weight_bytes=1,
        form="fused",
        decoder=info,
    )


# --- plans that are not used ------------------------------------------------------------


def test_a_plan_that_does_not_fit_is_left_loudly(
    artifact: Path, info: DecoderInfo, caplog: pytest.LogCaptureFixture
):
    (artifact / PLAN_NAME).unlink()
    decoder = loading.load_paged(artifact, manifest(info))
    assert "plan is not used (the artifact has none)" in caplog.text
    assert isinstance(decoder, GraphDecoder)


def test_a_changed_byte_is_seen(artifact: Path, info: DecoderInfo):
    path = artifact / PLAN_NAME
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(PlanUnusable, match="damaged"):
        load_planned(artifact, info, "fused")


def test_another_form_or_context_is_another_graph(artifact: Path, info: DecoderInfo):
    with pytest.raises(PlanUnusable, match="another form"):
        load_planned(artifact, info, "eager")
    longer = msgspec.structs.replace(info, max_context_tokens=info.max_context_tokens + 1)
    with pytest.raises(PlanUnusable, match="another max_context_tokens"):
        load_planned(artifact, longer, "fused")


def test_another_program_is_seen(artifact: Path, info: DecoderInfo):
    program = exported("llama")
    name = next(iter(program.state_dict))
    tensor = program.state_dict[name]
    kept = tensor[0, 0].clone()
    with torch.no_grad():
        tensor[0, 0] += 1
        torch.export.save(program, artifact / PROGRAM_NAME)
        tensor[0, 0] = kept
    with pytest.raises(PlanUnusable, match="another program"):
        load_planned(artifact, info, "fused")


def test_a_weight_that_is_not_its_checksum_is_seen(artifact: Path, info: DecoderInfo):
    path = artifact / PROGRAM_NAME
    with zipfile.ZipFile(path) as archive:
        member = next(each for each in archive.infolist() if each.filename.endswith("weight_0"))
    data = bytearray(path.read_bytes())
    name_bytes, extra_bytes = struct.unpack_from("<HH", data, member.header_offset + 26)
    data[member.header_offset + 30 + name_bytes + extra_bytes] ^= 1
    path.write_bytes(data)
    with pytest.raises(PlanUnusable, match="weight_0 is damaged"):
        load_planned(artifact, info, "fused")


def test_other_software_is_seen(artifact: Path, info: DecoderInfo, monkeypatch: pytest.MonkeyPatch):
    with monkeypatch.context() as patch:
        patch.setattr(plans, "code_digest", lambda: "changed")
        with pytest.raises(PlanUnusable, match="another code"):
            load_planned(artifact, info, "fused")
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", "0.0")
        with pytest.raises(PlanUnusable, match="another torch"):
            load_planned(artifact, info, "fused")
    with monkeypatch.context() as patch:
        other = variants()[0] if plans.fastest_variant() is None else None
        patch.setattr(plans, "fastest_variant", lambda: other)
        with pytest.raises(PlanUnusable, match="another operators"):
            load_planned(artifact, info, "fused")


def test_a_graph_that_computes_something_else_is_seen(artifact: Path, info: DecoderInfo):
    """As on a machine whose operators are wrong: what the plan says is run before it is used."""
    plan = read_plan(artifact / PLAN_NAME)
    data = bytearray(plan.witness.data)
    data[3::4] = bytes(byte ^ 0x80 for byte in data[3::4])  # the signs
    witness = msgspec.structs.replace(plan.witness, data=bytes(data))
    write_plan(artifact / PLAN_NAME, msgspec.structs.replace(plan, witness=witness))
    with pytest.raises(PlanUnusable, match="computes something else"):
        load_planned(artifact, info, "fused")


def test_functions_have_names():
    assert find_function(name_function(torch.ops.aten.add.Tensor)) is torch.ops.aten.add.Tensor
    with pytest.raises(PlanUnusable):
        name_function(lambda: None)
    with pytest.raises(PlanUnusable):
        find_function("torch.ops.aten.no_such_operator.default")
    with pytest.raises(PlanUnusable):
        find_function("os.system")
