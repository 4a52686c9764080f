"""A component's plans as a session: the plan whose profile fits the inputs, opened when it is first needed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from sdopt.backends.cuda import Gpu, GpuIdentity
from sdopt.backends.engine_session import EngineSession
from sdopt.backends.protocol import ComponentFiles, DeviceMemory, axis_sizes
from sdopt.backends.tensorrt.context import BoundContext
from sdopt.backends.tensorrt.engine import LoadedEngine, load_engine
from sdopt.backends.tensorrt.runtime_cache import RuntimeCacheFile, runtime_cache_path
from sdopt.bundle.again import again_command
from sdopt.bundle.records import PlanRecord
from sdopt.disk.files import resolve_inside
from sdopt.errors import ArtifactError, ShapeError
from sdopt.model.backend_settings import TensorRTSettings
from sdopt.model.shape import CHUNK_TOKENS, Extent
from sdopt.weights.dtypes import BY_TENSORRT


class OpenPlan:
    """One plan file on the GPU, and a context for each of its optimisation profiles that is in use."""

    def __init__(
        self, component: ComponentFiles, record: PlanRecord, settings: TensorRTSettings, library: Any, gpu: Gpu,
        identity: GpuIdentity,
    ) -> None:  # fmt: skip
        self._spec, self._gpu = component.spec, gpu
        path = resolve_inside(component.folder.parent, record.file)
        digest = component.plan_digests.get(record.file)
        if digest is None:
            raise ArtifactError(
                f"the manifest has no digest of {record.file}",
                hint=f"build the bundle again: {again_command(component.folder.parent)}",
            )
        self.loaded = load_engine(library, path, digest, record, identity)
        _require_same_tensors(self.loaded, component)
        config = self.loaded.engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(library.ExecutionContextAllocationStrategy.USER_MANAGED)
        self._cache: RuntimeCacheFile | None = None
        # Streamed weights come from the host at each run.
        graphs = settings.cuda_graphs and not self.loaded.streamed_bytes
        if record.flavour == "tensorrt-rtx":
            _configure_rtx(library, config, graphs=graphs)
            cache = config.create_runtime_cache()
            self._cache = RuntimeCacheFile(cache, runtime_cache_path(digest, identity))
            config.set_runtime_cache(cache)
        # TensorRT-RTX captures graphs itself.
        self._captures = graphs and record.flavour == "tensorrt"
        self._config = config
        self._contexts: dict[int, BoundContext] = {}
        with gpu.turn():
            gpu.arena.reserve(self.loaded.scratch_bytes)

    def run(
        self, inputs: Mapping[str, torch.Tensor], profile: int, extra: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        with self._gpu.turn():
            bound = self._contexts.get(profile)
            if fresh := bound is None or not bound.is_current:
                self._contexts.pop(profile, None)
                bound = BoundContext(self.loaded, self._spec, self._gpu, self._config, profile, capture=self._captures)
                self._contexts[profile] = bound
            outputs = bound.run(inputs, extra)
        if fresh and self._cache is not None:
            self._cache.save()
        return outputs

    @property
    def buffers_bytes(self) -> int:
        return sum(context.buffers_bytes for context in self._contexts.values())

    def close(self) -> None:
        self._gpu.wait()
        if self._cache is not None:
            self._cache.save()
        self._contexts.clear()


class TensorRTSession(EngineSession):
    """A `Session` on a GPU. `engine` are the open plans by their file; None once closed.

    Inputs may be tensors of the CPU or of the GPU; outputs are on the GPU, and any DLPack consumer takes them. The
    plans are those of `component.plans`, which all fit this machine.
    """

    def __init__(
        self, component: ComponentFiles, settings: TensorRTSettings, library: Any, gpu: Gpu, identity: GpuIdentity
    ) -> None:
        super().__init__(component, {})
        self._settings, self._library, self._gpu, self._identity = settings, library, gpu, identity
        # What the first profile needs is opened now: a plan that does not fit is known before the first picture.
        self._open(component.plans[0])

    @property
    def device(self) -> torch.device:
        return self._gpu.device

    def _compute(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        sizes = axis_sizes(self.spec, inputs)
        record = choose_plan(self._component, sizes)
        chunks = sizes.get("prompt_tokens", CHUNK_TOKENS) // CHUNK_TOKENS
        plan: OpenPlan = self.engine.get(record.file) or self._open(record)
        place = record.prompt_chunks.index(chunks)
        rows = self._component.profiles[record.profile].get("cfg_batch")
        if rows is not None and sizes.get("cfg_batch") == rows.min < rows.opt and rows.max == 2 * rows.min:
            # The optimisation profiles of drawings without guidance come after the others.
            place += len(record.prompt_chunks)
        return plan.run(inputs, place, self.bound)

    def _open(self, record: PlanRecord) -> OpenPlan:
        plan = OpenPlan(self._component, record, self._settings, self._library, self._gpu, self._identity)
        self.engine[record.file] = plan
        return plan

    def _device_memory(self) -> DeviceMemory:
        plans: list[OpenPlan] = list((self.engine or {}).values())
        return DeviceMemory(
            weights_bytes=sum(plan.loaded.weights_bytes for plan in plans),
            activations_bytes=max((plan.loaded.scratch_bytes for plan in plans), default=0),
            buffers_bytes=sum(plan.buffers_bytes for plan in plans),
        )

    def close(self) -> None:
        with self._running:
            for plan in (self.engine or {}).values():
                plan.close()
            super().close()


def choose_plan(component: ComponentFiles, sizes: Mapping[str, int]) -> PlanRecord:
    """The plan for these sizes of the named axes: of several that take them, the one with the narrowest profile.

    Raises `ShapeError` where no plan takes them, as for a size between two that were built for.
    """
    fitting = [
        (sum(_width(extent) for extent in profile.values()), number)
        for number, record in enumerate(component.plans)
        if all(size in (profile := component.profiles[record.profile])[axis] for axis, size in sizes.items())
        and sizes.get("prompt_tokens", CHUNK_TOKENS) // CHUNK_TOKENS in record.prompt_chunks
    ]
    if fitting:
        return component.plans[min(fitting)[1]]
    asked = ", ".join(f"{axis} {size}" for axis, size in sizes.items())
    raise ShapeError(
        f"{component.name} was built for no profile with {asked}",
        hint="build another bundle with sdopt convert --again FOLDER -o ANOTHER and --size, --batch or --tokens",
    )


def _width(extent: Extent) -> int:
    return extent.max - extent.min


def _configure_rtx(library: Any, config: Any, *, graphs: bool) -> None:
    strategies = library.CudaGraphStrategy
    config.cuda_graph_strategy = strategies.WHOLE_GRAPH_CAPTURE if graphs else strategies.DISABLED
    # Lazily, another kernel would take over in the middle of a picture: the same seed would not give the same picture.
    config.dynamic_shapes_kernel_specialization_strategy = library.DynamicShapesKernelSpecializationStrategy.EAGER


def _require_same_tensors(loaded: LoadedEngine, component: ComponentFiles) -> None:
    """The plan's inputs and outputs against the manifest's: their memory is bound by the latter."""
    engine = loaded.engine
    names = {engine.get_tensor_name(index) for index in range(engine.num_io_tensors)}
    wanted = {tensor.name: tensor.dtype for tensor in (*component.spec.inputs, *component.spec.outputs)}
    wanted |= dict.fromkeys(component.slot_inputs, component.spec.outputs[0].dtype)
    found = {name: BY_TENSORRT.get(engine.get_tensor_dtype(name).name) for name in names}
    if found != wanted:
        wrong = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
        raise ArtifactError(
            f"{loaded.record.file} is not a plan of this {component.name}: {', '.join(wrong)} differ from the manifest",
            hint=f"build the bundle again: {again_command(component.folder.parent)}",
        )
