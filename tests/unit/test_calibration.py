"""Scales: of inputs that are known, and of tiny-shapes on its own trajectories."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import sdopt.convert.blocks.calibrate as stage
from sdopt.checkpoint.source import open_checkpoint
from sdopt.convert.blocks.calibrate import calibrate, calibrate_in_child
from sdopt.convert.blocks.trajectories import Trajectories
from sdopt.convert.plan import BuildPlan, ComponentPlan, resolve_build
from sdopt.disk.store import Store
from sdopt.errors import CalibrationError
from sdopt.model.component import ComponentName
from sdopt.model.quantization import CalibrationSettings
from sdopt.model.recipe import BuildRecipe
from sdopt.networks.modules import build_network
from sdopt.processes.call import Outcome
from sdopt.processes.channel import JsonTable
from sdopt.quantize.observers import BINS, Histogram
from sdopt.quantize.scales import LayerScales, collect_scales, find_amax, find_smoothing
from sdopt.weights.to_torch import load_weights
from tests.conftest import TINY_SHAPES

MAX, PERCENTILE, ENTROPY = (CalibrationSettings(scales=kind) for kind in ("max", "percentile", "entropy"))


class Small(nn.Module):
    """A convolution and two linear layers; the second is also given what the first has."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 8, 1)
        self.first = nn.Linear(8, 16)
        self.second = nn.Linear(8, 16)
        self.dead = nn.Linear(8, 2)

    def forward(self, picture: Tensor, scale: Tensor) -> Tensor:
        states = self.conv(picture).flatten(2).transpose(1, 2) * scale
        return self.first(states) + self.second(states) + self.dead(states * 0).sum()  # type: ignore[no-any-return]


LAYERS = ("conv", "first", "second")


def make_samples(trajectories: int, calls: int = 2, *, outlier: float = 1.0) -> list[list[tuple[Tensor, Tensor]]]:
    generator = torch.Generator().manual_seed(1)
    samples = [
        [(torch.randn(2, 3, 32, 32, generator=generator), torch.tensor(1.0)) for _ in range(calls)]
        for _ in range(trajectories)
    ]
    samples[-1][-1][0][0, 0, 0, 0] = outlier
    return samples


def read(samples: Sequence[Any]) -> list[Callable[[], Any]]:
    return [lambda each=each: each for each in samples]  # type: ignore[misc]


def collect(
    settings: CalibrationSettings, samples: Sequence[Any], state: Path, layers: Sequence[str] = LAYERS
) -> dict[str, LayerScales]:
    return collect_scales(Small().requires_grad_(False), layers, read(samples), settings, state=state)


def inputs_of(samples: Sequence[Any]) -> dict[str, Tensor]:
    network = Small()
    seen: dict[str, list[Tensor]] = {name: [] for name in LAYERS}
    for name in LAYERS:
        network.get_submodule(name).register_forward_pre_hook(
            lambda module, given, name=name: seen[name].append(given[0].detach())
        )
    for arguments in itertools.chain.from_iterable(samples):
        network(*arguments)
    return {name: torch.cat(values) for name, values in seen.items()}


def test_max_is_the_true_maximum(tmp_path: Path) -> None:
    samples = make_samples(3, outlier=50.0)
    expected = inputs_of(samples)
    for name, scales in collect(MAX, samples, tmp_path).items():
        assert scales.input_amax == pytest.approx(expected[name].abs().max().item(), rel=1e-6)
        assert scales.smooth is None


def test_percentile_is_that_of_the_values_and_below_the_maximum(tmp_path: Path) -> None:
    samples = make_samples(3, outlier=50.0)
    expected = inputs_of(samples)
    for name, scales in collect(PERCENTILE, samples, tmp_path).items():
        magnitudes = expected[name].abs().flatten()
        wanted = torch.quantile(magnitudes, PERCENTILE.percentile / 100, interpolation="higher").item()
        bin_width = 2 * magnitudes.max().item() / BINS
        assert scales.input_amax == pytest.approx(wanted, abs=2 * bin_width)
        assert scales.input_amax < magnitudes.max().item()


def test_the_hundredth_percentile_is_the_maximum(tmp_path: Path) -> None:
    samples = make_samples(2)
    whole = collect(CalibrationSettings(percentile=100.0), samples, tmp_path / "a")
    for name, scales in collect(MAX, samples, tmp_path / "b").items():
        assert whole[name].input_amax == pytest.approx(scales.input_amax, rel=1e-3)


def test_entropy_cuts_an_outlier_off(tmp_path: Path) -> None:
    samples = make_samples(3, outlier=20.0)
    largest = collect(MAX, samples, tmp_path / "a")
    for name, scales in collect(ENTROPY, samples, tmp_path / "b").items():
        assert 0.05 * largest[name].input_amax < scales.input_amax < 0.8 * largest[name].input_amax


@pytest.mark.parametrize("kind", [PERCENTILE, ENTROPY], ids=lambda kind: kind.scales)
def test_one_value_alone_is_its_own_range(kind: CalibrationSettings) -> None:
    histogram = Histogram("layer")
    histogram.collect(torch.full((10_000,), 0.75))
    assert find_amax("layer", histogram, kind) == pytest.approx(0.75, rel=0.02)


def test_a_percentile_in_the_first_bin_is_not_0() -> None:
    histogram = Histogram("layer")
    values = torch.full((1_000_000,), 1e-6)
    values[0] = 1000.0
    histogram.collect(values)
    assert 0 < find_amax("layer", histogram, PERCENTILE) < 1


@given(st.lists(st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=50), min_size=1, max_size=6))
@settings(max_examples=60, deadline=None)
def test_a_histogram_counts_every_value_wherever_the_first_ones_lie(calls: list[list[float]]) -> None:
    histogram = Histogram("layer")
    for values in calls:
        histogram.collect(torch.tensor(values))
    every = torch.tensor([value for values in calls for value in values]).abs()
    assert histogram.counts.sum() == len(every)
    assert histogram.largest == every.max().item()
    assert histogram.top >= histogram.largest
    assert len(histogram.counts) == BINS
    if histogram.top:
        bin_width, counted = histogram.top / BINS, int(histogram.counts[: BINS // 2].sum())
        at_least, at_most = ((every < histogram.top / 2 + way * bin_width).sum() for way in (-1, 1))
        assert int(at_least) <= counted <= int(at_most)


def test_counts_above_what_fp32_can_count_are_kept() -> None:
    histogram = Histogram("layer")
    histogram.collect(torch.tensor([1.0]))
    histogram.counts[3] = 1 << 24
    histogram.collect(torch.full((3,), 3.5 / BINS))
    assert histogram.counts[3] == (1 << 24) + 3
    assert find_amax("layer", histogram, ENTROPY) > 0


def test_smoothing_leaves_the_product_as_it_was_and_evens_the_inputs(tmp_path: Path) -> None:
    samples = make_samples(2)
    network = Small().requires_grad_(False)
    network.conv.weight[0] *= 100.0  # an outlier channel for the linear layers
    weights = {name: network.get_submodule(name).weight.clone() for name in ("first", "second")}
    before = network(*samples[0][0])
    chosen = CalibrationSettings(smoothquant_alpha=0.5, scales="max")
    found = collect_scales(network, LAYERS, read(samples), chosen, state=tmp_path)
    assert torch.allclose(network(*samples[0][0]), before, rtol=1e-3, atol=1e-3)
    assert found["conv"].smooth is None
    with torch.no_grad():
        states = network.conv(samples[0][0][0]).flatten(2).transpose(1, 2)
    for name, weight in weights.items():
        smooth = found[name].smooth
        assert smooth is not None
        assert torch.allclose((states * smooth) @ (weight / smooth).T, states @ weight.T, rtol=1e-3, atol=1e-2)
        largest = states.abs().amax(dim=(0, 1))
        assert (largest * smooth).max() / (largest * smooth).min() < 0.5 * largest.max() / largest.min()
        every = torch.cat([network.conv(call[0]).flatten(2).transpose(1, 2) for part in samples for call in part])
        assert found[name].input_amax == pytest.approx((every * smooth).abs().max().item(), rel=1e-5)


def test_an_input_that_is_always_0_is_not_smoothed() -> None:
    factor = find_smoothing(torch.tensor([0.0, 4.0]), torch.tensor([[1.0, 1.0], [0.5, 0.25]]), 0.5)
    assert factor.tolist() == [1.0, 0.5]


def test_layers_that_are_not_named_are_left_alone(tmp_path: Path) -> None:
    found = collect(MAX, make_samples(1), tmp_path, ("first",))
    assert found.keys() == {"first"}


@pytest.mark.parametrize("layer", ["third", "conv.weight", ""])
def test_a_layer_that_is_not_there_is_refused(layer: str, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=f"no linear layer or convolution '{layer}'"):
        collect(MAX, make_samples(1), tmp_path, (layer,))


@pytest.mark.parametrize("kind", [MAX, PERCENTILE, ENTROPY, CalibrationSettings(smoothquant_alpha=0.5)], ids=str)
def test_a_dead_layer_is_refused_by_name(kind: CalibrationSettings, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"the layer 'dead' cannot be calibrated: its input is always 0"):
        collect(kind, make_samples(2), tmp_path, (*LAYERS, "dead"))


@pytest.mark.parametrize("kind", [MAX, PERCENTILE, CalibrationSettings(smoothquant_alpha=0.5)], ids=str)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_layer_that_is_given_nan_is_refused_by_name(kind: CalibrationSettings, value: float, tmp_path: Path) -> None:
    samples = make_samples(2)
    samples[1][0] = (samples[1][0][0], torch.tensor(value))
    with pytest.raises(CalibrationError, match=r"the layer 'first' cannot be calibrated: its input holds NaN"):
        collect(kind, samples, tmp_path)


@pytest.mark.parametrize("kind", [MAX, PERCENTILE, CalibrationSettings(smoothquant_alpha=0.5)], ids=str)
@pytest.mark.parametrize("stop", [1, 2, 4])
def test_a_run_that_stopped_goes_on_with_the_next_trajectory(
    kind: CalibrationSettings, stop: int, tmp_path: Path
) -> None:
    samples = make_samples(3, outlier=30.0)
    seen: list[int] = []

    def reader(index: int) -> Callable[[], Any]:
        def note() -> Any:
            if len(seen) == stop:
                raise KeyboardInterrupt
            seen.append(index)
            return samples[index]

        return note

    functions = [reader(index) for index in range(3)]
    runs = 2 if kind.smoothquant_alpha else 1
    if stop < 3 * runs:
        with pytest.raises(KeyboardInterrupt):
            collect_scales(Small(), LAYERS, functions, kind, state=tmp_path / "a")
    stop = -1
    found = collect_scales(Small(), LAYERS, functions, kind, state=tmp_path / "a")
    assert seen == list(range(3)) * runs
    for name, scales in collect(kind, samples, tmp_path / "b").items():
        assert found[name].input_amax == scales.input_amax


def test_a_damaged_state_is_not_used(tmp_path: Path) -> None:
    samples = make_samples(2)
    expected = collect(PERCENTILE, samples, tmp_path)
    for damage in (b"", b"\x08\0\0\0\0\0\0\0{}      ", (tmp_path / "inputs.safetensors").read_bytes()[:-5]):
        (tmp_path / "inputs.safetensors").write_bytes(damage)
        assert collect(PERCENTILE, samples, tmp_path) == expected


# The stage, on tiny-shapes: trajectories of made inputs, so that nothing need be drawn.


@pytest.fixture(scope="module")
def plan() -> BuildPlan:
    recipe = BuildRecipe(source=str(TINY_SHAPES))
    return resolve_build(open_checkpoint(str(TINY_SHAPES)), recipe)


@pytest.fixture(scope="module")
def part(plan: BuildPlan) -> ComponentPlan:
    return plan.components[ComponentName.UNET]


@pytest.fixture(scope="module")
def trajectories(tmp_path_factory: pytest.TempPathFactory) -> Trajectories:
    folder, generator = tmp_path_factory.mktemp("trajectories"), torch.Generator().manual_seed(5)
    paths = []
    for number in range(2):
        tensors = {}
        for call, timestep in enumerate((900.0, 100.0)):
            tensors[f"unet.{call:03d}.in.sample"] = torch.randn(2, 4, 16, 16, generator=generator)
            tensors[f"unet.{call:03d}.in.timestep"] = torch.tensor(timestep)
            tensors[f"unet.{call:03d}.in.encoder_hidden_states"] = torch.randn(2, 77, 96, generator=generator)
            tensors[f"unet.{call:03d}.out.out_sample"] = torch.zeros(2, 4, 16, 16)
        paths.append(folder / f"{number}.safetensors")
        save_file(tensors, paths[-1])
    return Trajectories(tuple(paths), (), "ab" * 32)


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch) -> list[JsonTable]:
    started: list[JsonTable] = []

    def run(function: object, arguments: JsonTable) -> Outcome[JsonTable]:
        assert function is calibrate_in_child
        started.append(arguments)
        return Outcome(calibrate_in_child(arguments), 0, 0)

    monkeypatch.setattr(stage, "call", run)
    return started


def unet_layers(part: ComponentPlan) -> list[str]:
    with torch.device("meta"):
        network = build_network(ComponentName.UNET, part.config)
    kinds = (nn.Linear, nn.Conv2d)
    return [name.removeprefix("network.") for name, each in network.named_modules() if isinstance(each, kinds)]


def test_every_layer_of_the_unet_gets_a_scale(
    part: ComponentPlan, trajectories: Trajectories, tmp_path: Path, children: list[JsonTable]
) -> None:
    layers = unet_layers(part)
    path = calibrate(part, layers, trajectories, MAX, Store(tmp_path), tmp_path)
    scales = load_file(path)
    assert scales.keys() == {f"{name}.input_amax" for name in layers}
    assert all(value.shape == () and value.dtype is torch.float32 for value in scales.values())
    first = torch.cat([value for file in trajectories.calibration for key, value in load_file(file).items()
                       if key.endswith("in.sample")])  # fmt: skip
    assert scales["conv_in.input_amax"] == first.abs().max()
    assert not list((tmp_path / "calibration").rglob("*.safetensors"))


def test_smoothed_scales_are_written_for_linear_layers(
    part: ComponentPlan, trajectories: Trajectories, tmp_path: Path, children: list[JsonTable]
) -> None:
    layers = unet_layers(part)
    chosen = CalibrationSettings(smoothquant_alpha=0.4)
    scales = load_file(calibrate(part, layers, trajectories, chosen, Store(tmp_path), tmp_path))
    network = build_network(ComponentName.UNET, part.config)
    load_weights(network, part.tensors, torch.float32)
    for name in layers:
        layer = network.network.get_submodule(name)
        smooth = scales.get(f"{name}.smooth")
        if isinstance(layer, nn.Linear):
            assert smooth is not None
            assert smooth.shape == (layer.in_features,)
            assert (smooth > 0).all()
        else:
            assert smooth is None


def test_scales_that_are_there_are_not_made_again(
    part: ComponentPlan, trajectories: Trajectories, tmp_path: Path, children: list[JsonTable]
) -> None:
    store, layers = Store(tmp_path), ["conv_in", "mid_block.resnets.0.conv1"]
    first = calibrate(part, layers, trajectories, PERCENTILE, store, tmp_path)
    assert calibrate(part, layers, trajectories, PERCENTILE, store, tmp_path) == first
    unused = PERCENTILE.model_copy(update={"seed": 3})  # the trajectories' digest says so already
    assert calibrate(part, layers, trajectories, unused, store, tmp_path) == first
    assert len(children) == 1
    others = [
        calibrate(part, layers[:1], trajectories, PERCENTILE, store, tmp_path),
        calibrate(part, layers, dataclasses.replace(trajectories, digest="cd" * 32), PERCENTILE, store, tmp_path),
        calibrate(part, layers, trajectories, CalibrationSettings(percentile=99.0), store, tmp_path),
        calibrate(part, layers, trajectories, MAX, store, tmp_path),
    ]
    assert len({first, *others}) == 5


def test_two_runs_give_the_same_file(
    part: ComponentPlan, trajectories: Trajectories, tmp_path: Path, children: list[JsonTable]
) -> None:
    files = [
        calibrate(part, unet_layers(part), trajectories, PERCENTILE, Store(folder), folder)
        for folder in (tmp_path / "a", tmp_path / "b")
    ]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert files[0].parent.name == files[1].parent.name


def test_a_stage_that_stopped_goes_on_with_the_next_trajectory(
    part: ComponentPlan, trajectories: Trajectories, tmp_path: Path, children: list[JsonTable],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    read_arguments, seen = stage._read_arguments, []

    def read_some(path: Path, *rest: Any) -> Any:
        if len(seen) == 1:
            raise KeyboardInterrupt
        seen.append(path)
        return read_arguments(path, *rest)

    monkeypatch.setattr(stage, "_read_arguments", read_some)
    with pytest.raises(KeyboardInterrupt):
        calibrate(part, ["conv_in"], trajectories, MAX, Store(tmp_path), tmp_path)
    seen.clear()
    path = calibrate(part, ["conv_in"], trajectories, MAX, Store(tmp_path), tmp_path)
    assert seen == [trajectories.calibration[1]]
    monkeypatch.setattr(stage, "_read_arguments", read_arguments)
    whole = calibrate(part, ["conv_in"], trajectories, MAX, Store(tmp_path / "b"), tmp_path / "b")
    assert path.read_bytes() == whole.read_bytes()


def test_a_child_process_makes_them_and_names_a_dead_layer(
    part: ComponentPlan, trajectories: Trajectories, tmp_path: Path
) -> None:
    # Text states of zeros: what the keys and values of cross attention are made of.
    tensors = {key: value * (0 if "hidden_states" in key else 1)
               for key, value in load_file(trajectories.calibration[0]).items()}  # fmt: skip
    save_file(tensors, tmp_path / "dead.safetensors")
    dead = Trajectories((tmp_path / "dead.safetensors",), (), "ef" * 32)
    layers = [name for name in unet_layers(part) if name.endswith("attn2.to_k")]
    with pytest.raises(CalibrationError, match=rf"the layer '{layers[0]}' .* its input is always 0"):
        calibrate(part, layers, dead, MAX, Store(tmp_path), tmp_path)
