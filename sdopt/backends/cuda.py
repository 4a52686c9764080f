"""The NVIDIA GPU that the sessions of this process compute on, through torch: stream, turns, memory."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from weakref import WeakValueDictionary

import torch

from sdopt.errors import MissingHardware
from sdopt.machine.gpus import find_gpus


@dataclass(frozen=True)
class GpuIdentity:
    """`generation` is the compute capability, as in `sm89`; `driver` is empty where NVML cannot say it."""

    name: str
    generation: str
    driver: str
    uuid: str


def find_gpu() -> GpuIdentity | None:
    """The GPU that torch would use, or None where there is none or torch was built without CUDA."""
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    generation = f"sm{properties.major}{properties.minor}"
    driver = next((gpu.record.driver for gpu in find_gpus()), "")
    return GpuIdentity(properties.name, generation, driver, str(properties.uuid))


def describe_missing_gpu() -> tuple[str, str]:
    """(what is missing, what to do) where `find_gpu` finds none."""
    if torch.version.cuda is None and find_gpus():
        return (
            f"torch {torch.__version__} was built without CUDA",
            "pip install --force-reinstall torch, without --extra-index-url and PIP_EXTRA_INDEX_URL",
        )
    return "no NVIDIA GPU", "nvidia-smi shows whether the driver runs; a container has to be given its GPU (--gpus all)"


class Gpu:
    """One GPU, one stream on it, and one block of memory: what sessions need that run in turn.

    All sessions of a process that compute on a GPU share one of these, by `shared_gpu`. Their work is queued on a
    stream of its own, because engines run slower on the default stream, and is ordered against torch's by events: the
    host waits for nothing.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.arena = Arena(self)
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._caller = self._stream
        self._lock = threading.RLock()

    @property
    def stream_handle(self) -> int:
        """The `cudaStream_t` as a number."""
        return int(self._stream.cuda_stream)

    @contextmanager
    def turn(self) -> Iterator[None]:
        """What the body queues runs after all that the caller's stream has so far, and before what it gets next.

        One thread at a time: the memory of the arena and the buffers of an engine belong to whoever has the turn.
        """
        with self._lock:
            caller = torch.cuda.current_stream(self.device)
            self._caller = caller
            self._stream.wait_stream(caller)
            try:
                with torch.cuda.stream(self._stream):
                    yield
            finally:
                caller.wait_stream(self._stream)

    def give(self, value: torch.Tensor) -> torch.Tensor:
        """Inside a turn: a copy for the caller, who may use it on his stream and free it whenever he likes."""
        copy = value.clone()
        copy.record_stream(self._caller)
        return copy

    def capture(self, queue: Callable[[], None]) -> Callable[[], None]:
        """Inside a turn: record what `queue` queues, which is not run, and return what replays it."""
        graph = torch.cuda.CUDAGraph()
        # Other threads may allocate while this one captures.
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            queue()
        return graph.replay

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Raises `MissingHardware` where the GPU's memory is too small."""
        try:
            return torch.empty(shape, dtype=dtype, device=self.device)
        except torch.OutOfMemoryError as error:
            raise MissingHardware(
                f"the GPU has too little memory: {str(error).splitlines()[0]}",
                hint="end what else uses it (nvidia-smi lists it), or build with a smaller --size or --batch",
            ) from error

    def wait(self) -> None:
        """Until the device has done all that was queued."""
        torch.cuda.synchronize(self.device)


class Arena:
    """The scratch memory of every engine that runs on a GPU in turn: one block, as large as the largest need.

    `version` counts its moves: an engine that was given an older block has to be given the new one.
    """

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu
        self._block: torch.Tensor | None = None
        self.version = 0

    def reserve(self, size_bytes: int) -> None:
        """Make the block at least this large. Raises `MissingHardware`."""
        if size_bytes <= self.size_bytes:
            return
        self._gpu.wait()  # work that is queued still uses the block that goes
        self._block = None
        self._block = self._gpu.empty((size_bytes,), torch.uint8)
        self.version += 1

    @property
    def size_bytes(self) -> int:
        return 0 if self._block is None else self._block.numel()

    @property
    def address(self) -> int:
        """Aligned to 256 bytes at least, as torch allocates; 0 where there is no block."""
        return 0 if self._block is None else self._block.data_ptr()


_shared: WeakValueDictionary[int, Gpu] = WeakValueDictionary()
_sharing = threading.Lock()


def shared_gpu() -> Gpu:
    """The one `Gpu` of this process and torch's current device; it goes with its last session.

    Raises `MissingHardware` without a GPU.
    """
    if find_gpu() is None:
        missing, remedy = describe_missing_gpu()
        raise MissingHardware(missing, hint=remedy)
    index = torch.cuda.current_device()
    with _sharing:
        gpu = _shared.get(index)
        if gpu is None:
            gpu = _shared[index] = Gpu(torch.device("cuda", index))
        return gpu
