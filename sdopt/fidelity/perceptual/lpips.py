"""LPIPS: how different two pictures look, by the features of AlexNet or VGG-16, in version 0.1 of its weights.

Zhang, Isola, Efros, Shechtman and Wang, "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", 2018.
The tensors are named as they are published: `features.0.weight` and so on by torchvision for the backbone (of
`alexnet` or `vgg16`), `lin0.model.1.weight` to `lin4.model.1.weight` by the lpips package for what it learnt.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from sdopt.errors import CheckpointError
from sdopt.fidelity.metrics import Picture
from sdopt.weights.safetensors_header import TensorRef
from sdopt.weights.to_torch import read_tensor

# Of the lpips package: what brings pictures in -1..1 to the mean and spread of ImageNet's.
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
_EPSILON = 1e-10
_FIRST = "features.0.weight"


@dataclass(frozen=True)
class _Convolution:
    """`index` is its place in torchvision's `features`. A maximum over 2 or 3 elements may come before it, and a tap
    after its ReLU.
    """

    index: int
    channels: tuple[int, int]
    kernel: int
    stride: int = 1
    pool: int = 0
    tap: bool = False


def _vgg(index: int, inputs: int, outputs: int, *, pool: int = 0, tap: bool = False) -> _Convolution:
    return _Convolution(index, (inputs, outputs), 3, pool=pool, tap=tap)


_ALEXNET = (
    _Convolution(0, (3, 64), 11, stride=4, tap=True),
    _Convolution(3, (64, 192), 5, pool=3, tap=True),
    _Convolution(6, (192, 384), 3, pool=3, tap=True),
    _Convolution(8, (384, 256), 3, tap=True),
    _Convolution(10, (256, 256), 3, tap=True),
)
_VGG16 = (
    _vgg(0, 3, 64), _vgg(2, 64, 64, tap=True),
    _vgg(5, 64, 128, pool=2), _vgg(7, 128, 128, tap=True),
    _vgg(10, 128, 256, pool=2), _vgg(12, 256, 256), _vgg(14, 256, 256, tap=True),
    _vgg(17, 256, 512, pool=2), _vgg(19, 512, 512), _vgg(21, 512, 512, tap=True),
    _vgg(24, 512, 512, pool=2), _vgg(26, 512, 512), _vgg(28, 512, 512, tap=True),
)  # fmt: skip


class Lpips:
    """LPIPS with given weights; `network` names its backbone. Raises `CheckpointError` for tensors that do not fit."""

    def __init__(self, tensors: Mapping[str, TensorRef]) -> None:
        self.network, self._layers = _choose_network(tensors)
        expected = list_tensors(self._layers)
        for name, shape in expected.items():
            if name not in tensors:
                raise CheckpointError(
                    f"the weights of LPIPS lack the tensor {name!r}",
                    hint="it takes torchvision's alexnet or vgg16, and the lin layers of the lpips package (v0.1)",
                )
            if tensors[name].shape != shape:
                raise CheckpointError(f"LPIPS on {self.network}: {name!r} is {tensors[name].shape}, not {shape}")
        self._weights = {name: read_tensor(tensors[name]).float() for name in expected}

    def compare(self, a: Picture, b: Picture) -> float:
        """0 for equal pictures; about 0.1 is hard to see, 0.7 is another picture."""
        with torch.inference_mode():
            total = 0.0
            for place, (left, right) in enumerate(zip(self._find_features(a), self._find_features(b), strict=True)):
                difference = (_normalize(left) - _normalize(right)) ** 2
                total += float(functional.conv2d(difference, self._weights[_lin(place)]).mean())
        return total

    def _find_features(self, picture: Picture) -> list[Tensor]:
        values = torch.from_numpy(picture.astype("float32")).permute(2, 0, 1)[None] / 127.5 - 1
        values = (values - torch.tensor(_SHIFT)[:, None, None]) / torch.tensor(_SCALE)[:, None, None]
        taps = []
        for layer in self._layers:
            if layer.pool:
                values = functional.max_pool2d(values, layer.pool, 2)
            weight, bias = (self._weights[f"features.{layer.index}.{part}"] for part in ("weight", "bias"))
            padding = 2 if layer.kernel > 3 else 1
            values = functional.relu(functional.conv2d(values, weight, bias, layer.stride, padding))
            if layer.tap:
                taps.append(values)
        return taps


def _choose_network(tensors: Mapping[str, TensorRef]) -> tuple[str, tuple[_Convolution, ...]]:
    """By the first convolution: 11 elements wide in AlexNet, 3 in VGG."""
    first = tensors.get(_FIRST)
    is_vgg = first is not None and first.shape[2:] == (3, 3)
    return ("VGG-16", _VGG16) if is_vgg else ("AlexNet", _ALEXNET)


def list_tensors(layers: tuple[_Convolution, ...] = _ALEXNET) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a backbone's LPIPS takes."""
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in layers:
        inputs, outputs = layer.channels
        shapes[f"features.{layer.index}.weight"] = (outputs, inputs, layer.kernel, layer.kernel)
        shapes[f"features.{layer.index}.bias"] = (outputs,)
    taps = [layer.channels[1] for layer in layers if layer.tap]
    return shapes | {_lin(place): (1, channels, 1, 1) for place, channels in enumerate(taps)}


def _lin(place: int) -> str:
    return f"lin{place}.model.1.weight"


def _normalize(features: Tensor) -> Tensor:
    return features / (features.pow(2).sum(dim=1, keepdim=True).sqrt() + _EPSILON)
