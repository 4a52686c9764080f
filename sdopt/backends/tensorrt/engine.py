"""A plan file -> an engine on the GPU, or one sentence that says why not and the command that mends it."""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdopt.backends.cuda import GpuIdentity
from sdopt.backends.tensorrt.messages import Messages, make_logger
from sdopt.bundle.again import again_command
from sdopt.bundle.plan_header import find_rtx_target
from sdopt.bundle.records import PlanRecord
from sdopt.errors import ArtifactError, BackendError, MissingDependency, MissingHardware, SdoptError
from sdopt.model.target import Runtime, Target

_OUT_OF_MEMORY = ("out of memory", "outofmemory")


@dataclass(frozen=True)
class LoadedEngine:
    """An `ICudaEngine` with what must live as long. `streamed_bytes` are weights that stay on the host."""

    library: Any
    runtime: Any
    engine: Any
    messages: Messages
    record: PlanRecord
    streamed_bytes: int

    @property
    def weights_bytes(self) -> int:
        """On the GPU."""
        stat = self.engine.get_engine_stat(self.library.EngineStat.TOTAL_WEIGHTS_SIZE)
        return max(0, int(stat) - self.streamed_bytes)

    @property
    def scratch_bytes(self) -> int:
        """Device memory that a context of this engine needs while it runs, whichever profile it has."""
        return int(self.engine.device_memory_size_v2)


def load_engine(library: Any, path: Path, sha256: str, record: PlanRecord, gpu: GpuIdentity) -> LoadedEngine:
    """Deserialise a plan whose bytes have the digest `sha256`.

    The very mapping that is hashed is handed to TensorRT, so that a file put in its place in between is not opened; the
    host holds no copy of the plan beside the page cache. Who may write into the file while it is read may as well write
    the manifest: that is not defended against.

    Raises `ArtifactError` for other bytes, `MissingHardware` or `MissingDependency` for a plan that does not fit this
    machine, and `BackendError` with TensorRT's own words for anything else.
    """
    messages = Messages()
    runtime = library.Runtime(make_logger(library, messages))
    with _mapped(path) as data:
        if hashlib.sha256(data).hexdigest() != sha256:
            raise ArtifactError(
                f"{path} was changed: its SHA-256 differs from the manifest's",
                hint=f"build the bundle again: {again_command(path.parent.parent)}",
            )
        _require_valid(library, runtime, data, record, gpu, messages, path.parent.parent)
        engine = runtime.deserialize_cuda_engine(data)
    if engine is None:
        if messages.say(*_OUT_OF_MEMORY):
            raise _too_little_memory(record)
        raise BackendError(
            f"{record.flavour} cannot open {path}: {messages.text}",
            hint=f"build the bundle again: {again_command(path.parent.parent)}",
        )
    return LoadedEngine(library, runtime, engine, messages, record, _stream_weights(engine, record))


def _stream_weights(engine: Any, record: PlanRecord) -> int:
    """Keep as many weights on the GPU as fit beside the rest; returns the bytes that do not. Before any context."""
    if not record.weight_streaming:
        return 0
    budget_bytes = int(engine.get_weight_streaming_automatic_budget())
    engine.weight_streaming_budget_v2 = budget_bytes
    return max(0, int(engine.streamable_weights_size) - budget_bytes)


@contextmanager
def _mapped(path: Path) -> Iterator[mmap.mmap]:
    try:
        with path.open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
        raise ArtifactError(f"cannot read {path}: {error}", hint="sdopt check names every damaged file") from error
    with data:
        yield data


def _require_valid(
    library: Any, runtime: Any, data: mmap.mmap, record: PlanRecord, gpu: GpuIdentity, messages: Messages, folder: Path
) -> None:
    """Ask TensorRT-RTX, which knows it from the plan's header. General TensorRT says it when it deserialises."""
    if record.flavour != "tensorrt-rtx":
        return
    validity, diagnostics = runtime.get_engine_validity(data[: int(runtime.engine_header_size)])
    if validity == library.EngineValidity.INVALID:
        raise explain_invalidity(library, int(diagnostics), record, gpu, folder, messages.text)


def explain_invalidity(
    library: Any, diagnostics: int, record: PlanRecord, gpu: GpuIdentity, folder: Path, said: str = ""
) -> SdoptError:
    """The bits of `EngineInvalidityDiagnostics` as an error: the first is the one to mend, the others follow it.

    `folder` is the bundle, for the hint.
    """
    bits = library.EngineInvalidityDiagnostics
    plan = f"the plan {record.file}"
    again = again_command(folder)
    mended = again_command(folder, target=find_rtx_target(gpu.generation) or Target(Runtime.CUDA))
    known: tuple[tuple[Any, type[SdoptError], str, str], ...] = (
        (bits.MALFORMED_ENGINE, ArtifactError, f"{plan} is not a plan of TensorRT-RTX {library.__version__}",
         f"build it again: {again}"),
        (bits.CUDA_ERROR, MissingHardware, f"CUDA does not work here: {said}",
         "nvidia-smi shows whether the driver runs"),
        (bits.OLD_CUDA_DRIVER, MissingHardware,
         f"the NVIDIA driver {gpu.driver} is too old for {plan}".replace("  ", " "),
         "install a newer NVIDIA driver; nvidia-smi shows the one that is there"),
        (bits.OLD_CUDA_RUNTIME, MissingDependency, f"the CUDA runtime here is too old for {plan}",
         "pip install --upgrade 'sdopt[rtx]'"),
        (bits.VERSION_MISMATCH, MissingDependency,
         f"{plan} was made by TensorRT-RTX {record.version}, and {library.__version__} is installed",
         f"pip install 'tensorrt-rtx=={record.version}', or build it again: {again}"),
        (bits.UNSUPPORTED_CC, MissingHardware,
         f"{plan} was built for {record.generation}, and this GPU ({gpu.name}) is {gpu.generation}",
         f"build it for this GPU: {mended}"),
        (bits.INSUFFICIENT_GPU_MEMORY, MissingHardware, _too_little_memory(record).message,
         _too_little_memory(record).hint),
    )  # fmt: skip
    found = [(kind, sentence, hint) for bit, kind, sentence, hint in known if diagnostics & int(bit)]
    if not found:
        return BackendError(
            f"TensorRT-RTX cannot run {plan} here: {said}", hint="nvidia-smi shows whether the driver runs"
        )
    kind, _, hint = found[0]
    return kind("; ".join(sentence for _, sentence, _ in found), hint=hint)


def _too_little_memory(record: PlanRecord) -> MissingHardware:
    return MissingHardware(
        f"this GPU has too little free memory for the plan {record.file}",
        hint="close other programs that use it (nvidia-smi lists them), or build with a smaller --size or --batch",
    )
