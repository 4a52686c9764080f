"""Any number of rows through an engine that was built for a fixed or bounded batch.

The rows of a batch do not know each other in these networks, so they can be cut into runs and padded at will.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from sdopt.backends.protocol import check_inputs
from sdopt.errors import ShapeError
from sdopt.weights.to_torch import TORCH_DTYPES

if TYPE_CHECKING:
    from sdopt.backends.protocol import Session


def run_rows(session: Session, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Run a session on tensors of any number of rows and any float type; the outputs are fp32.

    Runs are as large as the engine takes. One that is too small is padded with copies of its last row, and
    the copies' results are dropped. A UNet that takes a number of rows or its double takes nothing between. An input
    without a batch axis (the timestep) goes to every run as it is.
    Raises `ShapeError` for no rows, for inputs that disagree on their number, and for sizes not built for.
    """
    spec = session.spec
    batch = spec.inputs[0].axes[0]
    batched = {tensor.name for tensor in spec.inputs if tensor.axes[:1] == (batch,)}
    rows = inputs[spec.inputs[0].name].shape[0]
    for name in batched & inputs.keys():
        if inputs[name].shape[0] != rows or not rows:
            raise ShapeError(
                f"{spec.name}: {name} has {inputs[name].shape[0]} rows, and {spec.inputs[0].name} has {rows}"
            )
    extent = session.extents[str(batch)]
    runs: list[dict[str, torch.Tensor]] = []
    for start in range(0, rows, extent.max):
        stop = min(rows, start + extent.max)
        least = extent.max if extent.max == 2 * extent.min < 2 * (stop - start) else extent.min
        part = {name: _cut(value, start, stop, least) if name in batched else value for name, value in inputs.items()}
        runs.append({name: value[: stop - start].float() for name, value in _run(session, part).items()})
    return runs[0] if len(runs) == 1 else {name: torch.cat([run[name] for run in runs]) for name in runs[0]}


def _cut(value: torch.Tensor, start: int, stop: int, least: int) -> torch.Tensor:
    part = value[start:stop]
    missing = least - part.shape[0]
    return torch.cat([part, part[-1:].expand(missing, *part.shape[1:])]) if missing > 0 else part


def _run(session: Session, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    check_inputs(session.spec, session.extents, inputs, session.profiles)
    device = session.device
    return session.run(
        {t.name: _move(inputs[t.name].detach(), device, TORCH_DTYPES[t.dtype]) for t in session.spec.inputs}
    )


def _move(value: torch.Tensor, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """The value where the session computes. The host waits for no GPU, except where a value comes back from one."""
    if device.type == "cpu" or value.device == device:
        return value.to(device, dtype).contiguous()
    if value.ndim == 0 and value.device.type == "cpu":
        # A timestep. Filled in by a kernel: a copy from ordinary host memory waits for all that the GPU has to do.
        return torch.full((), value.item(), dtype=dtype, device=device)
    return value.to(device, dtype, non_blocking=True).contiguous()
