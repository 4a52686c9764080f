"""Which range of a layer's inputs its scale is made for: by their maximum, a percentile or least divergence.

nvidia-modelopt puts a quantiser before each layer, which here only watches; the percentile, the entropy search and the
formula of SmoothQuant are the library's. What is noted is kept after each trajectory, so that a run which was killed
goes on with the next one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from sdopt import progress
from sdopt.disk.files import write_file
from sdopt.errors import CalibrationError, MissingDependency
from sdopt.model.quantization import CalibrationSettings
from sdopt.quantize.observers import BINS, ChannelLargest, Histogram, Largest, Observer

try:
    from modelopt.torch.quantization.calib import HistogramCalibrator
    from modelopt.torch.quantization.nn import QuantModuleRegistry
except ImportError as error:
    raise MissingDependency.of("nvidia-modelopt", extra="quant") from error

Samples = Callable[[], Sequence[tuple[Tensor, ...]]]
"""Reads the arguments of each call that one trajectory makes of the network."""

# The search takes minutes for a network over every bin of a fine histogram, and finds no other scale.
_ENTROPY_BINS, _ENTROPY_STRIDE = 2048, 16
# modelopt's, for inputs that are nearly always 0: an exact inverse would overflow 16 bits.
_SMOOTH_RANGE = (1e-4, 1e4)
_SMOOTH_LEAST_INPUT = 2.0**-31
_DONE = "trajectories"


@dataclass(frozen=True)
class LayerScales:
    """`input_amax` is the largest magnitude that the input's scale is made for, of the input times `smooth`, if any.

    `smooth`, fp32 [inputs], multiplies the input of a linear layer, whose weight is divided by it, column by column.
    """

    input_amax: float
    smooth: Tensor | None


def collect_scales(
    network: nn.Module, layers: Sequence[str], samples: Sequence[Samples], settings: CalibrationSettings, *, state: Path
) -> dict[str, LayerScales]:
    """Run an fp32 network on the samples, and find the scales of the inputs of linear layers and convolutions.

    Names of layers are torch's; a leading `network.` is left out. `state` is a folder for what is kept after each
    trajectory. The network is changed and of no further use. SmoothQuant takes a second run over the samples. Raises
    `CalibrationError` that names a layer whose input is always 0, or holds NaN or infinity.
    """
    watched = _watch(network, layers)
    smooth: dict[str, Tensor] = {}
    if settings.smoothquant_alpha:
        linear = {name: layer for name, layer in watched.items() if isinstance(layer, nn.Linear)}
        channels = {name: ChannelLargest(name, layer.in_features) for name, layer in linear.items()}
        _observe(network, watched, channels, samples, state / "channels.safetensors", "looking for outliers")
        for name, layer in linear.items():
            smooth[name] = _smooth(layer, channels[name].largest, settings.smoothquant_alpha)
    kind = Largest if settings.scales == "max" else Histogram
    inputs = {name: kind(name) for name in watched}
    _observe(network, watched, inputs, samples, state / "inputs.safetensors", "calibrating")
    return {name: LayerScales(find_amax(name, inputs[name], settings), smooth.get(name)) for name in watched}


def _watch(network: nn.Module, layers: Sequence[str]) -> dict[str, Any]:
    """The named layers, each with modelopt's quantisers, which do not quantise and note nothing yet."""
    modules = {name.removeprefix("network."): module for name, module in network.named_modules()}
    watched: dict[str, Any] = {}
    for name in layers:
        if not isinstance(modules.get(name), nn.Linear | nn.Conv2d):
            raise CalibrationError(f"the network has no linear layer or convolution {name!r} to calibrate")
        # In place. `mtq.quantize` would do it to every layer, and replace the kernel of attention, too.
        layer = QuantModuleRegistry.convert(modules[name])
        layer.weight_quantizer.disable()
        layer.input_quantizer.disable_quant()
        watched[name] = layer
    return watched


def _observe(
    network: nn.Module, watched: Mapping[str, Any], observers: Mapping[str, Observer], samples: Sequence[Samples],
    file: Path, doing: str,
) -> None:  # fmt: skip
    """Run the network on all samples that `file` has not noted yet; only the layers that have an observer are noted."""
    done = _restore(observers, file)
    for name, layer in watched.items():
        if name in observers:
            layer.input_quantizer._calibrator = observers[name]
            layer.input_quantizer.enable_calib()
        else:
            layer.input_quantizer.disable_calib()
    with torch.inference_mode():
        for index in range(done, len(samples)):
            calls = samples[index]()
            for number, arguments in enumerate(calls):
                progress.update(doing, (index + number / len(calls)) / len(samples))
                network(*arguments)
            _keep(observers, file, index + 1)


def _keep(observers: Mapping[str, Observer], file: Path, done: int) -> None:
    tensors = {f"{name}/{key}": value for name, each in observers.items() for key, value in each.state().items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    write_file(file, save({**tensors, _DONE: torch.tensor(done)}))


def _restore(observers: Mapping[str, Observer], file: Path) -> int:
    """How many trajectories are in what the observers know from `file`; 0 where there is none, or a damaged one."""
    try:
        tensors = load_file(file)
        states = {name: _part(tensors, name) for name in observers}
        done = int(tensors[_DONE])
        for name, observer in observers.items():
            observer.restore(states[name])
    except (FileNotFoundError, SafetensorError, KeyError):
        return 0
    return done


def _part(tensors: Mapping[str, Tensor], layer: str) -> dict[str, Tensor]:
    return {key.rpartition("/")[2]: value for key, value in tensors.items() if key.rpartition("/")[0] == layer}


def _smooth(layer: Any, largest: Tensor, alpha: float) -> Tensor:
    """Move a share of the inputs' outliers into the weight, and return what the input is multiplied by, [inputs]."""
    factor = find_smoothing(largest, layer.weight.detach(), alpha)
    with torch.no_grad():
        layer.weight.div_(factor)
    layer.input_quantizer.pre_quant_scale = factor
    return factor


def find_smoothing(largest: Tensor, weight: Tensor, alpha: float) -> Tensor:
    """SmoothQuant's factor of each input, fp32 [inputs], by its largest magnitude and the weight [outputs, inputs]."""
    factor = weight.float().abs().amax(dim=0).pow(1 - alpha) / largest.pow(alpha)
    factor[largest <= _SMOOTH_LEAST_INPUT] = 1
    return factor.clamp(*_SMOOTH_RANGE)


def find_amax(layer: str, observed: Largest, settings: CalibrationSettings) -> float:
    """The range that a layer's scale is made for. Raises `CalibrationError` for a layer whose input was always 0."""
    if not observed.largest:
        raise CalibrationError(
            f"the layer {layer!r} cannot be calibrated: its input is always 0",
            hint="keep it in 16 bits: name it under `keep` in the quantization file",
        )
    if not isinstance(observed, Histogram):
        return observed.largest
    bins = _ENTROPY_BINS if settings.scales == "entropy" else BINS
    counts = observed.counts.reshape(bins, -1).sum(dim=1)
    calibrator = HistogramCalibrator(num_bits=8)
    calibrator._calib_hist = counts.numpy()
    calibrator._calib_bin_edges = np.linspace(0, observed.top, bins + 1)
    if settings.scales == "entropy":
        with np.errstate(divide="ignore", invalid="ignore"):  # where all values lie above the bins that are tried
            amax = calibrator.compute_amax("entropy", stride=_ENTROPY_STRIDE)
    else:
        amax = calibrator.compute_amax("percentile", percentile=settings.percentile)
    # The library returns the lower edge of a bin, which is 0 for the first; the last bin reaches beyond the maximum.
    return min(max(float(amax), observed.top / bins), observed.largest)
