"""An engine with LoRA slots computes what torch computes with the changed weights, and without an adapter what it
always computed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import onnx_ir as ir
import pytest
import torch
from torch import Tensor

from sdopt.backends.open import open_session
from sdopt.backends.slotted_session import SlottedSession
from sdopt.bundle.records import GraphAudit, SlotsRecord
from sdopt.errors import BackendError, UsageError
from sdopt.graph.slots import add_slots
from sdopt.model.backend_settings import BackendSettings, OnnxRuntimeSettings, OpenVINOSettings
from sdopt.model.component import ComponentName
from sdopt.model.family import Family
from sdopt.model.file_names import SLOTS_GRAPH_NAME
from sdopt.model.precision import DType
from sdopt.model.shape import Extent
from sdopt.model.slots import Slot, SlotSet, input_names, parse_slots, slot_shapes
from sdopt.trace.reference import load_reference
from sdopt.trace.seeded_inputs import make_inputs
from tests.unit.test_trace import Built, build

torch.set_num_threads(1)
UNET, TEXT, TEXT_2 = ComponentName.UNET, ComponentName.TEXT_ENCODER, ComponentName.TEXT_ENCODER_2
RUNTIMES: list[BackendSettings] = [OpenVINOSettings(), OnnxRuntimeSettings()]
AUDIT = GraphAudit(opset=23, nodes=0, attention_nodes=0, attention_layers=0)


def add_to(built: Built, layers: SlotSet, rank: int = 16) -> SlotsRecord:
    model = ir.load(built.files.graph)
    slots = add_slots(model, layers)
    ir.save(model, built.files.folder / SLOTS_GRAPH_NAME)
    return SlotsRecord(layers=layers, rank=rank, slots=slots, audit=AUDIT)


def open_slotted(built: Built, record: SlotsRecord, runtime: BackendSettings) -> SlottedSession:
    session = open_session(dataclasses.replace(built.files, slots=record), runtime)
    assert isinstance(session, SlottedSession)
    return session


def seeded_pair(slot: Slot, rank: int, seed: int, scale: float = 0.5) -> tuple[Tensor, Tensor]:
    """(down, up) as an adapter has them, [rank, in, *kernel] and [out, rank]."""
    generator = torch.Generator().manual_seed(seed)
    out_channels, *rest = slot.shape
    down = torch.randn(rank, *rest, generator=generator) / torch.tensor(rest).prod().sqrt()
    return down, torch.randn(out_channels, rank, generator=generator) * scale / rank**0.5


def lay_out(slot: Slot, down: Tensor, up: Tensor) -> dict[str, Tensor]:
    """By hand, and not by the code under test."""
    rank = down.shape[0]
    if len(slot.shape) == 2:
        a, b = down.T, up.T
    elif slot.shape[2:] == (1, 1):
        a, b = down.flatten(1), up
    else:
        a, b = torch.stack([down[:, :, y, x] for y in range(slot.shape[2]) for x in range(slot.shape[3])]), up
    assert (a.shape, b.shape) == slot_shapes(slot.shape, rank)
    return dict(zip(input_names(slot.layer), (a.contiguous(), b.contiguous()), strict=True))


def run_torch(
    built: Built, inputs: Mapping[str, Tensor], pairs: Mapping[str, tuple[Tensor, Tensor]]
) -> dict[str, Tensor]:
    """torch fp32 with W + up @ down in every layer of `pairs`."""
    network = load_reference(built.files.spec, built.files.config, built.tensors)
    modules = {name.removeprefix("network."): module for name, module in network.named_modules()}
    with torch.inference_mode():
        for layer, (down, up) in pairs.items():
            weight = modules[layer].weight
            weight.data = weight + (up @ down.flatten(1)).reshape(weight.shape)
        outputs = network(*(inputs[tensor.name] for tensor in built.files.spec.inputs))
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return {tensor.name: value for tensor, value in zip(built.files.spec.outputs, outputs, strict=True)}


def distance(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    return max(((found[n].double() - e.double()).norm() / e.double().norm()).item() for n, e in expected.items())


CASES = [(Family.SD1, UNET), (Family.SD1, TEXT), (Family.SDXL, UNET), (Family.SDXL, TEXT_2)]


@pytest.mark.parametrize("runtime", RUNTIMES, ids=lambda settings: settings.kind)
@pytest.mark.parametrize(("family", "name"), CASES)
def test_slots_compute_what_torch_computes_with_the_changed_weights(
    family: Family, name: ComponentName, runtime: BackendSettings, checkpoints: dict[Family, Path], tmp_path: Path
) -> None:
    built = build(tmp_path / "c", checkpoints[family], name, DType.FP32)
    record = add_to(built, SlotSet.ALL)
    inputs = make_inputs(built.files.spec, built.files.config, built.files.extents)
    # A rank of its own in each layer, and every fifth layer without an adapter.
    pairs = {
        slot.layer: seeded_pair(slot, 1 + number % 7, number) for number, slot in enumerate(record.slots) if number % 5
    }
    by_layer = {slot.layer: slot for slot in record.slots}
    tensors = {n: t for layer, pair in pairs.items() for n, t in lay_out(by_layer[layer], *pair).items()}
    plain = run_torch(built, inputs, {})
    expected = run_torch(built, inputs, pairs)
    assert distance(plain, expected) > 0.05, "the adapter does nothing that could be seen"
    with open_slotted(built, record, runtime) as session:
        before = session.run(inputs)
        session.set_slots(tensors)
        with_adapter = session.run(inputs)
        again = session.run(inputs)
        session.set_slots({})
        after = session.run(inputs)
    assert distance(with_adapter, expected) < 3e-6
    assert all(torch.equal(with_adapter[n], again[n]) for n in expected)
    assert all(torch.equal(before[n], after[n]) for n in expected), "A picture without an adapter changed"
    with open_session(built.files, runtime) as bare:
        assert all(torch.equal(before[n], value) for n, value in bare.run(inputs).items())


def test_every_layer_of_a_unet_has_a_slot_by_itself(checkpoints: dict[Family, Path], tmp_path: Path) -> None:
    """One at a time: a branch that is dead, or in the wrong place, is not hidden by the others."""
    built = build(tmp_path / "c", checkpoints[Family.SD1], UNET, DType.FP32)
    record = add_to(built, SlotSet.ALL)
    inputs = make_inputs(built.files.spec, built.files.config, built.files.extents)
    named = {name for name, module in _modules(built).items() if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d))}
    assert {slot.layer for slot in record.slots} == named
    # Not "time_emb_proj": a constant for each channel, which the norm of one channel a group takes out again.
    wanted = ("conv_in", "conv_out", "time_embedding.linear_1", "conv_shortcut", "downsamplers.0.conv",
              "upsamplers.0.conv", "proj_in", "ff.net.0.proj")  # fmt: skip
    with open_slotted(built, record, RUNTIMES[0]) as session:
        for ending in wanted:
            slot = next(slot for slot in record.slots if slot.layer.endswith(ending))
            pair = seeded_pair(slot, 3, 1, scale=2.0)
            session.set_slots(lay_out(slot, *pair))
            expected = run_torch(built, inputs, {slot.layer: pair})
            assert distance(session.run(inputs), expected) < 3e-6, slot.layer
            assert distance(run_torch(built, inputs, {}), expected) > 1e-4, slot.layer


def _modules(built: Built) -> dict[str, torch.nn.Module]:
    network = load_reference(built.files.spec, built.files.config, built.tensors)
    return {name.removeprefix("network."): module for name, module in network.named_modules()}


def test_each_set_of_layers_contains_the_one_before(checkpoints: dict[Family, Path], tmp_path: Path) -> None:
    built = build(tmp_path / "c", checkpoints[Family.SD1], UNET, DType.FP32)
    found = [{slot.layer for slot in add_to(built, layers).slots} for layers in SlotSet]
    assert found[0] < found[1] < found[2]
    assert {layer.rpartition(".to_")[2] for layer in found[0]} == {"q", "k", "v", "out.0"}
    assert not any(".resnets." in layer for layer in found[1])


@pytest.mark.parametrize("runtime", RUNTIMES, ids=lambda settings: settings.kind)
def test_slots_work_at_every_size_of_a_dynamic_graph(
    runtime: BackendSettings, checkpoints: dict[Family, Path], tmp_path: Path
) -> None:
    built = build(tmp_path / "c", checkpoints[Family.SD1], UNET, DType.FP32, dynamic=True)
    extents = {**built.files.extents, "latent_height": Extent(8, 16, 32), "latent_width": Extent(8, 16, 32),
               "cfg_batch": Extent(1, 2, 4)}  # fmt: skip
    files = dataclasses.replace(built.files, extents=extents)
    built = dataclasses.replace(built, files=files)
    record = add_to(built, SlotSet.ALL)
    pairs = {slot.layer: seeded_pair(slot, 2, number) for number, slot in enumerate(record.slots)}
    tensors = {n: t for slot in record.slots for n, t in lay_out(slot, *pairs[slot.layer]).items()}
    with open_slotted(built, record, runtime) as session:
        session.set_slots(tensors)
        for height, width, rows in ((8, 16, 1), (24, 8, 3)):
            sizes = {"latent_height": height, "latent_width": width, "cfg_batch": rows}
            point = extents | {axis: Extent.static(size) for axis, size in sizes.items()}
            inputs = make_inputs(files.spec, files.config, point)
            assert distance(session.run(inputs), run_torch(built, inputs, pairs)) < 3e-6


def test_what_does_not_fit_a_slot_is_refused(checkpoints: dict[Family, Path], tmp_path: Path) -> None:
    built = build(tmp_path / "c", checkpoints[Family.SD1], TEXT, DType.FP32)
    record = add_to(built, SlotSet.ATTENTION, rank=4)
    slot = record.slots[0]
    good = lay_out(slot, *seeded_pair(slot, 4, 0))
    a, b = input_names(slot.layer)
    bad: list[dict[str, Tensor]] = [
        lay_out(slot, *seeded_pair(slot, 5, 0)), {a: good[a]}, {**good, b: good[b][:2]}, {**good, a: good[a].T},
        {"nowhere.lora_A": good[a]},
    ]  # fmt: skip
    with open_slotted(built, record, RUNTIMES[0]) as session:
        for tensors in bad:
            with pytest.raises(BackendError):
                session.set_slots(tensors)
        session.set_slots(good)


@pytest.mark.parametrize("text", ["", "0", "attention", "half:4", "64:attention", "9999", "-1", "all:2000", "4.5"])
def test_slots_that_cannot_be_are_refused_with_an_example(text: str) -> None:
    with pytest.raises(UsageError) as refused:
        parse_slots(text)
    assert "attention:64" in (refused.value.hint or "")


def test_slots_are_written_as_they_are_read() -> None:
    assert str(parse_slots("64")) == "transformer:64"
    assert parse_slots(str(parse_slots("all:128"))) == parse_slots("all:128")
