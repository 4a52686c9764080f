"""What the sessions of all runtimes share: checked inputs, a closed state, memory. Each adds how its engine is run."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil
import torch

from sdopt.backends.protocol import ComponentFiles, DeviceMemory, MemoryUse, check_inputs
from sdopt.errors import BackendError
from sdopt.model.component import ComponentSpec
from sdopt.model.shape import Extent
from sdopt.processes.child import peak_rss_bytes

# Of free memory for each byte of the weight file. OpenVINO in fp32 took 4.2 of SD1.5's UNet, whose file has 16 bits:
# its own copy widened, the same again packed, and room to run (benchmarks/lora_slots.py).
_ROOM = 5.0


def has_room(weights: Path, device: torch.device) -> bool:
    """Whether there is memory for another engine of these weights beside what is open."""
    needed = _ROOM * weights.stat().st_size
    if device.type == "cuda":
        return bool(torch.cuda.mem_get_info(device)[0] > needed)
    return bool(psutil.virtual_memory().available > needed)


class EngineSession(ABC):
    """A `Session` over one open `engine`, which is whatever the runtime calls with inputs; None once closed."""

    def __init__(self, component: ComponentFiles, engine: Any) -> None:
        self._component = component
        self.engine: Any = engine
        self.bound: Mapping[str, torch.Tensor] = {}
        """Inputs beside those of `spec` that every run takes, such as what is in LoRA slots."""
        # Runtimes keep the buffers of one run in an open engine, and some refuse a second run meanwhile.
        self._running = threading.RLock()

    @property
    def spec(self) -> ComponentSpec:
        return self._component.spec

    @property
    def extents(self) -> Mapping[str, Extent]:
        return self._component.extents

    @property
    def profiles(self) -> tuple[Mapping[str, Extent], ...]:
        return self._component.profiles or (self.extents,)

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def run(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        check_inputs(self.spec, self.extents, inputs, self.profiles)
        with self._running:
            if self.engine is None:
                raise BackendError(f"the session of {self.spec.name} is closed")
            return self._compute(inputs)

    def bind(self, inputs: Mapping[str, torch.Tensor]) -> None:
        """Give these inputs of the graph, which are not in `spec`, to every run from now on.

        They are kept as they are, on the session's device, until others are bound; the shapes may change each time.
        """
        with self._running:
            if self.engine is None:
                raise BackendError(f"the session of {self.spec.name} is closed")
            self._bind({name: value.detach().to(self.device).contiguous() for name, value in inputs.items()})

    def _bind(self, inputs: Mapping[str, torch.Tensor]) -> None:
        self.bound = inputs

    @abstractmethod
    def _compute(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Run the open engine on checked inputs; the outputs are the caller's own."""

    def memory(self) -> MemoryUse:
        resident_bytes = psutil.Process().memory_info().rss
        return MemoryUse(
            self._component.weights.stat().st_size, resident_bytes, peak_rss_bytes(), self._device_memory()
        )

    def _device_memory(self) -> DeviceMemory | None:
        return None

    def close(self) -> None:
        """Free the engine, once a run that another thread has begun is done."""
        with self._running:
            self.engine = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
