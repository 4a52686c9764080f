"""Bytes on disk -> torch tensors, one at a time."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sdopt.errors import CheckpointError
from sdopt.model.precision import DType
from sdopt.weights.dtypes import DTYPES
from sdopt.weights.safetensors_header import TensorRef

TORCH_DTYPES: dict[DType, torch.dtype] = {dtype: getattr(torch, names.array) for dtype, names in DTYPES.items()}


def read_tensor(ref: TensorRef) -> Tensor:
    """Read one tensor from its file, in its stored type. Raises `CheckpointError` where the file is too short."""
    if not ref.nbytes:
        return torch.empty(ref.shape, dtype=TORCH_DTYPES[ref.dtype])
    buffer = bytearray(ref.nbytes)
    with ref.file.open("rb", buffering=0) as file:
        file.seek(ref.offset_bytes)
        view, filled = memoryview(buffer), 0
        # One read returns at most 2 GiB.
        while filled < ref.nbytes and (count := file.readinto(view[filled:])):
            filled += count
    if filled != ref.nbytes:
        raise CheckpointError(f"{ref.file} is truncated", hint="copy or download it again")
    flat = torch.frombuffer(buffer, dtype=TORCH_DTYPES[ref.dtype])
    if ref.transposed:
        return flat.reshape(tuple(reversed(ref.shape))).T.contiguous()
    return flat.reshape(ref.shape)


def load_weights(
    network: nn.Module, tensors: Mapping[str, TensorRef], dtype: torch.dtype, device: torch.device | None = None
) -> None:
    """Give a network made by `build_network` under `init_empty_weights` its weights, cast to `dtype`, one by one.

    They go to `device`, which is the CPU where it is None.
    """
    for prefix, module in network.named_modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            full = f"{prefix}.{name}".removeprefix("network.")
            ref = tensors.get(full)
            if ref is None or ref.shape != tuple(parameter.shape):
                raise CheckpointError(f"the tensor {full!r} of shape {tuple(parameter.shape)} is not among the weights")
            module._parameters[name] = nn.Parameter(read_tensor(ref).to(device, dtype), requires_grad=False)
