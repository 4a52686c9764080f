"""Network -> plan file, hashed and counted as it comes, with progress. Knows neither bundles nor the store."""

from __future__ import annotations

import hashlib
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sdopt import progress
from sdopt.backends.tensorrt.parsed_network import ParsedNetwork
from sdopt.backends.tensorrt.weight_search import WeightSearch
from sdopt.errors import BackendError, MissingHardware
from sdopt.model.target import PORTABLE

Bounds = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
"""Smallest, usual and largest shape of one input."""

_NO_KERNEL = "not supported by a dedicated kernel"
_NO_MEMORY = ("bad_alloc", "out of memory", "outofmemory", "cannot allocate", "memory allocation")


class NoFusedKernelError(BackendError):
    """Attention of some shape has no dedicated kernel, and was not allowed to be decomposed."""


@dataclass(frozen=True)
class BuildOptions:
    """How to build. `profiles` has one table of input bounds for each optimisation profile, for dynamic graphs only."""

    generation: str
    """`sm89`, `ampere+` for a portable plan; general TensorRT builds for the GPU that is there."""
    profiles: tuple[dict[str, Bounds], ...] = ()
    weight_streaming: bool = False
    workspace_bytes: int | None = None
    timing_cache: bytes | None = None
    """Of general TensorRT; TensorRT-RTX has none."""


@dataclass(frozen=True)
class BuiltPlan:
    size_bytes: int
    sha256: str
    zero_share: float
    timing_cache: bytes | None


def build_plan(parsed: ParsedNetwork, options: BuildOptions, output: Path, *, label: str) -> BuiltPlan:
    """Build and write the plan.

    `options.generation` is one of `buildable_generations`. Raises `NoFusedKernelError`, `MissingHardware` where memory
    ran out, and `BackendError` with TensorRT's own words for anything else.
    """
    library, builder, messages = parsed.library, parsed.builder, parsed.messages
    config = builder.create_builder_config()
    # Names of layers and kernels stay in the plan, for the audit on a GPU; they take some kilobytes.
    config.profiling_verbosity = library.ProfilingVerbosity.DETAILED
    config.progress_monitor = monitor = _make_monitor(library, label)
    _set_generation(config, library, options.generation)
    _set_profiles(parsed, config, options.profiles)
    if options.weight_streaming:
        config.set_flag(library.BuilderFlag.WEIGHT_STREAMING)
    if options.workspace_bytes is not None:
        config.set_memory_pool_limit(library.MemoryPoolType.WORKSPACE, options.workspace_bytes)
    cache = None
    if options.timing_cache is not None:
        cache = config.create_timing_cache(options.timing_cache)
        config.set_timing_cache(cache, ignore_mismatch=False)
    writer = _make_writer(library, output, parsed.search)
    try:
        done = builder.build_serialized_network_to_stream(parsed.network, config, writer)
        writer.finish()
    except MemoryError as error:
        raise _out_of_memory(label) from error
    finally:
        writer.close()
        del monitor
    if not done:
        if messages.say(_NO_KERNEL):
            raise NoFusedKernelError(f"{label}: attention has no dedicated kernel for its shapes")
        if messages.say(*_NO_MEMORY):
            raise _out_of_memory(label)
        raise BackendError(f"TensorRT failed while {label}: {messages.text}")
    return BuiltPlan(
        writer.size_bytes, writer.digest.hexdigest(), writer.zeros / max(1, writer.size_bytes),
        None if cache is None else bytes(cache.serialize()),
    )  # fmt: skip


def _set_generation(config: Any, library: Any, generation: str) -> None:
    known = getattr(library, "ComputeCapability", None)
    if known is None or generation == PORTABLE:
        return
    config.num_compute_capabilities = 1
    config.set_compute_capability(known.__members__[generation.upper()], 0)


def _set_profiles(parsed: ParsedNetwork, config: Any, profiles: tuple[dict[str, Bounds], ...]) -> None:
    for bounds in profiles:
        profile = parsed.builder.create_optimization_profile()
        for index in range(parsed.network.num_inputs):
            tensor = parsed.network.get_input(index)
            if -1 in tuple(tensor.shape):
                profile.set_shape(tensor.name, *bounds[tensor.name])
        config.add_optimization_profile(profile)


def _out_of_memory(label: str) -> MissingHardware:
    return MissingHardware(
        f"there was not enough memory while {label}", hint="close other programs, or give more with --max-memory"
    )


def _make_writer(library: Any, output: Path, search: WeightSearch) -> Any:
    class Writer(library.IStreamWriter):  # type: ignore[misc]  # the library is chosen at run time
        """Takes the plan in pieces of tens of megabytes; one is written and counted while the next is made."""

        def __init__(self) -> None:
            library.IStreamWriter.__init__(self)
            self.digest, self.zeros, self.size_bytes = hashlib.sha256(), 0, 0
            self._file = output.open("wb", buffering=0)
            self._pool = ThreadPoolExecutor(2)
            self._pending: list[Future[None]] = []

        def write(self, data: Any) -> int:
            piece = bytes(data)
            # An exception must not cross TensorRT's own code: `finish` raises it when the build has ended.
            wait(self._pending)
            if any(future.exception() for future in self._pending):
                return 0
            self._pending = [self._pool.submit(self._count, piece), self._pool.submit(self._save, piece)]
            return len(piece)

        def _count(self, piece: bytes) -> None:
            self.digest.update(piece)
            self.zeros += len(piece) - int(np.count_nonzero(np.frombuffer(piece, np.uint8)))
            self.size_bytes += len(piece)
            search.feed(piece)

        def _save(self, piece: bytes) -> None:
            rest = memoryview(piece)
            while rest:
                rest = rest[self._file.write(rest) :]

        def finish(self) -> None:
            """Wait for the last piece. Raises what writing raised."""
            for future in self._pending:
                future.result()

        def close(self) -> None:
            self._pool.shutdown()
            self._file.close()

    return Writer()


def _make_monitor(library: Any, label: str) -> Any:
    class Monitor(library.IProgressMonitor):  # type: ignore[misc]
        """Turns nested phases into one share: a phase's step is split among the phases inside it."""

        def __init__(self) -> None:
            library.IProgressMonitor.__init__(self)
            self._phases: dict[str, tuple[str | None, int, int]] = {}
            self._share = 0.0

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._phases[phase_name] = (parent_phase, num_steps, 0)
            self._tell()

        def step_complete(self, phase_name: str, step: int) -> bool:
            parent, steps, _ = self._phases[phase_name]
            self._phases[phase_name] = (parent, steps, step + 1)
            self._tell()
            return True

        def phase_finish(self, phase_name: str) -> None:
            self._phases.pop(phase_name, None)

        def _tell(self) -> None:
            share, width = 0.0, 1.0
            for _, steps, done in self._phases.values():
                share += width * min(1.0, done / max(1, steps))
                width /= max(1, steps)
            # A phase that ends takes its share with it until its parent's step is counted: never go back.
            self._share = max(self._share, share)
            progress.update(label, self._share)

    return Monitor()
