"""Sessions of TensorRT over a double of the library: which plan, which memory, which address, which words."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch

from sdopt.backends.cuda import GpuIdentity
from sdopt.backends.protocol import ComponentFiles
from sdopt.backends.tensorrt.engine import explain_invalidity
from sdopt.backends.tensorrt.runtime_cache import RuntimeCacheFile, runtime_cache_path
from sdopt.backends.tensorrt.session import OpenPlan, TensorRTSession, choose_plan
from sdopt.bundle.records import PlanRecord
from sdopt.errors import ArtifactError, BackendError, MissingDependency, MissingHardware, ShapeError
from sdopt.model.backend_settings import TensorRTSettings
from sdopt.model.component import ComponentName, describe_component
from sdopt.model.family import Family
from sdopt.model.precision import DType
from sdopt.model.shape import Extent, ShapeProfile
from sdopt.weights.to_torch import TORCH_DTYPES
from tests import tensorrt_double as double

RTX = TensorRTSettings(kind="tensorrt-rtx")
GENERAL = TensorRTSettings(kind="tensorrt")
IDENTITY = GpuIdentity("NVIDIA GeForce RTX 4090", "sm89", "580.65.06", "")
UNET = {"in_channels": 4, "out_channels": 4, "cross_attention_dim": 8, "block_out_channels": [8, 16]}
SPEC = describe_component(ComponentName.UNET, UNET, Family.SD1, DType.FP16)
SQUARE = ShapeProfile.static(height_px=64, width_px=64)
Tensors = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SDOPT_CACHE", str(tmp_path / "cache"))


def record_of(file: str, profile: int = 0, **changes: Any) -> PlanRecord:
    values = {
        "file": file, "flavour": "tensorrt-rtx", "version": "1.7.1.116", "generation": "ampere+",
        "system": "Linux x86_64", "profile": profile, "prompt_chunks": (1,), "weight_streaming": False,
    }  # fmt: skip
    return PlanRecord.model_construct(**(values | changes))


def by_chunks(profile: ShapeProfile) -> list[dict[str, Extent]]:
    """A plan's optimisation profiles: one for each prompt length."""
    return [
        dataclasses.replace(profile, tokens=Extent.static(77 * count)).axis_extents(8)
        for count in profile.chunk_counts
    ]  # fmt: skip


def component_of(
    folder: Path, profiles: tuple[ShapeProfile, ...] = (SQUARE,), *, plan: dict[str, Any] | None = None,
    **changes: Any,
) -> ComponentFiles:  # fmt: skip
    """A bundle's UNet with a plan of the double for each profile."""
    (folder / "unet").mkdir()
    records, digests = [], {}
    for index, profile in enumerate(profiles):
        file = f"unet/{index}.plan"
        data = double.make_plan(SPEC, by_chunks(profile), **(plan or {}))
        (folder / file).write_bytes(data)
        digests[file] = hashlib.sha256(data).hexdigest()
        records.append(record_of(file, index, prompt_chunks=profile.chunk_counts, **changes))
    return ComponentFiles(
        folder / "unet", SPEC, UNET, Family.SD1, ShapeProfile.covering(profiles).axis_extents(8), tuple(records),
        tuple(profile.axis_extents(8) for profile in profiles), digests,
    )  # fmt: skip


def inputs_of(profile: ShapeProfile = SQUARE, seed: int = 0) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    extents = profile.axis_extents(8)
    return {
        tensor.name: torch.rand(tensor.shape(extents), generator=generator).to(TORCH_DTYPES[tensor.dtype])
        for tensor in SPEC.inputs
    }


def open_double(
    component: ComponentFiles, settings: TensorRTSettings = RTX, gpu: double.HostGpu | None = None, library: Any = None
) -> tuple[TensorRTSession, Any, double.HostGpu]:
    gpu, library = gpu or double.HostGpu(), library or double.make_library()
    return TensorRTSession(component, settings, library, gpu, IDENTITY), library, gpu  # type: ignore[arg-type]


def expected(inputs: Tensors) -> float:
    return sum(value.double().mean().item() for value in inputs.values())


def test_numbers_pass_through_the_bound_addresses_and_outputs_are_the_callers(tmp_path: Path) -> None:
    session, library, gpu = open_double(component_of(tmp_path))
    first, second = inputs_of(seed=1), inputs_of(seed=2)
    one = session.run(first)["out_sample"]
    two = session.run(second)["out_sample"]
    assert one.shape == (2, 4, 8, 8)
    assert one.dtype is torch.float16
    assert one[0, 0, 0, 0].item() == pytest.approx(expected(first), abs=2e-3)
    assert two[0, 0, 0, 0].item() == pytest.approx(expected(second), abs=2e-3)
    strided = first | {"sample": first["sample"].to(memory_format=torch.channels_last)}
    assert torch.equal(session.run(strided)["out_sample"], one)
    assert gpu.turns == 4
    assert len(library.Runtime.made[0].contexts) == 1
    assert session.device == gpu.device


def test_the_prompts_length_picks_the_optimisation_profile_each_with_its_own_context(tmp_path: Path) -> None:
    profile = dataclasses.replace(SQUARE, tokens=Extent(77, 77, 231))
    session, library, _ = open_double(component_of(tmp_path, (profile,)))
    for tokens in (77, 231, 77):
        inputs = inputs_of(dataclasses.replace(SQUARE, tokens=Extent.static(tokens)), seed=tokens)
        assert session.run(inputs)["out_sample"][0, 0, 0, 0].item() == pytest.approx(expected(inputs), abs=2e-3)
    contexts = library.Runtime.made[0].contexts
    assert [context.profile for context in contexts] == [0, 2]
    assert [context.runs for context in contexts] == [2, 1]


@pytest.mark.parametrize("batch", [1, 3])
def test_a_drawing_without_guidance_takes_the_optimisation_profiles_behind_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch: int
) -> None:
    """In the order in which a plan is built: see `input_shapes`."""
    places: list[int] = []

    def run(self: Any, inputs: Tensors, place: int, extra: Tensors) -> Tensors:
        places.append(place)
        return {}

    guided = dataclasses.replace(SQUARE, batch=Extent.static(batch), tokens=Extent(77, 77, 154))
    session, _, _ = open_double(component_of(tmp_path, (dataclasses.replace(guided, unguided=True),)))
    monkeypatch.setattr(OpenPlan, "run", run)
    for tokens in (77, 154):
        inputs = inputs_of(dataclasses.replace(guided, tokens=Extent.static(tokens)))
        session.run(inputs)
        session.run({name: value[:batch] if value.ndim else value for name, value in inputs.items()})
    assert places == [0, 2, 1, 3]


def test_a_plan_is_opened_when_its_size_is_first_drawn(tmp_path: Path) -> None:
    wide = ShapeProfile.static(height_px=64, width_px=128)
    session, library, _ = open_double(component_of(tmp_path, (SQUARE, wide)))
    assert len(library.Runtime.made) == 1
    assert session.run(inputs_of(wide))["out_sample"].shape == (2, 4, 8, 16)
    assert len(library.Runtime.made) == 2
    session.run(inputs_of(SQUARE))
    assert len(library.Runtime.made) == 2


def test_of_several_profiles_that_fit_the_narrowest_is_taken(tmp_path: Path) -> None:
    span = Extent(64, 64, 128)
    component = component_of(tmp_path, (ShapeProfile(Extent.static(1), span, span), SQUARE))
    sizes = {"cfg_batch": 2, "latent_height": 8, "latent_width": 8, "prompt_tokens": 77}
    assert choose_plan(component, sizes).profile == 1
    assert choose_plan(component, sizes | {"latent_width": 12}).profile == 0
    with pytest.raises(ShapeError, match=r"unet was built for no profile with .*latent_width 99"):
        choose_plan(component, sizes | {"latent_width": 99})


def test_profiles_that_share_a_plan_open_it_once(tmp_path: Path) -> None:
    component = component_of(tmp_path)
    twice = (component.plans[0], component.plans[0].model_copy(update={"profile": 1}))
    wide = component.profiles[0] | {"width": Extent.static(999)}
    session, library, _ = open_double(
        dataclasses.replace(component, plans=twice, profiles=(*component.profiles, wide))
    )  # fmt: skip
    session.run(inputs_of())
    assert len(library.Runtime.made) == 1


def test_sessions_that_run_in_turn_share_one_block_that_grows_to_the_largest_need(tmp_path: Path) -> None:
    for name in ("small", "large"):
        (tmp_path / name).mkdir()
    gpu = double.HostGpu()
    small, library, _ = open_double(component_of(tmp_path / "small", plan={"scratch_bytes": 1000}), gpu=gpu)
    inputs = inputs_of()
    first = small.run(inputs)["out_sample"]
    assert gpu.arena.size_bytes == 1000
    large, other, _ = open_double(component_of(tmp_path / "large", plan={"scratch_bytes": 5000}), gpu=gpu)
    assert gpu.arena.size_bytes == 5000
    large.run(inputs)
    # The first context was given the block that is gone: another takes its place, before it runs again.
    assert torch.equal(small.run(inputs)["out_sample"], first)
    stale, fresh = library.Runtime.made[0].contexts
    assert (stale.runs, fresh.runs) == (1, 1)
    assert fresh.memory == other.Runtime.made[0].contexts[0].memory == (gpu.arena.address, 5000)
    assert small._device_memory().activations_bytes == 1000


def test_general_tensorrt_captures_a_static_engine_after_one_run_and_replays_it(tmp_path: Path) -> None:
    component = component_of(tmp_path, flavour="tensorrt")
    session, library, gpu = open_double(component, GENERAL)
    results = [session.run(inputs_of(seed=seed))["out_sample"] for seed in range(3)]
    assert [step for step in gpu.log if step != "wait"] == ["capture", "replay", "replay"]
    for seed, result in enumerate(results):
        assert result[0, 0, 0, 0].item() == pytest.approx(expected(inputs_of(seed=seed)), abs=2e-3)
    context = library.Runtime.made[0].contexts[0]
    assert context.config.cuda_graph_strategy is double.CudaGraphStrategy.DISABLED
    assert context.config.get_runtime_cache() is None


def test_no_graph_is_captured_where_shapes_differ_or_weights_are_streamed_or_it_is_turned_off(tmp_path: Path) -> None:
    span = Extent(64, 64, 128)
    cases: dict[str, Any] = {
        "dynamic": component_kwargs(profiles=(ShapeProfile(Extent.static(1), span, span),)),
        "streamed": component_kwargs(
            plan={"streamable_bytes": 900, "automatic_budget": 300}, weight_streaming=True
        ),
        "off": component_kwargs(),
    }  # fmt: skip
    for name, arguments in cases.items():
        (tmp_path / name).mkdir()
        component = component_of(tmp_path / name, flavour="tensorrt", **arguments)
        settings = GENERAL if name != "off" else TensorRTSettings(kind="tensorrt", cuda_graphs=False)
        session, _, gpu = open_double(component, settings)
        session.run(inputs_of())
        session.run(inputs_of())
        assert "capture" not in gpu.log, name


def component_kwargs(**values: Any) -> dict[str, Any]:
    return values


def test_tensorrt_rtx_captures_by_itself_and_compiles_for_shapes_at_once(tmp_path: Path) -> None:
    session, library, gpu = open_double(component_of(tmp_path))
    session.run(inputs_of())
    config = library.Runtime.made[0].contexts[0].config
    assert config.cuda_graph_strategy is double.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
    eager = double.DynamicShapesKernelSpecializationStrategy.EAGER
    assert config.dynamic_shapes_kernel_specialization_strategy is eager
    assert "capture" not in gpu.log


def test_weights_that_do_not_fit_are_streamed(tmp_path: Path) -> None:
    component = component_of(
        tmp_path, plan={"streamable_bytes": 900, "automatic_budget": 300}, weight_streaming=True
    )  # fmt: skip
    session, library, _ = open_double(component)
    session.run(inputs_of())
    engine = library.Runtime.made[0]
    assert engine.weight_streaming_budget_v2 == 300
    assert engine.contexts[0].config.cuda_graph_strategy is double.CudaGraphStrategy.DISABLED
    device = session._device_memory()
    assert device.weights_bytes == 1000 - 600
    assert device.activations_bytes == 4096
    buffers = sum(value.nbytes for value in inputs_of().values()) + 2 * 4 * 8 * 8 * 2
    assert device.buffers_bytes == buffers


def test_compiled_kernels_are_kept_for_the_next_start(tmp_path: Path) -> None:
    component = component_of(tmp_path)
    digest = component.plan_digests[component.plans[0].file]
    path = runtime_cache_path(digest, IDENTITY)
    assert path.name == f"{digest}-NVIDIA-GeForce-RTX-4090-580.65.06"
    session, library, _ = open_double(component)
    assert not path.exists()
    session.run(inputs_of())
    written = path.read_bytes()
    session.run(inputs_of())
    session.close()
    again, library, _ = open_double(component)
    cache = library.Runtime.made[0].create_runtime_config().create_runtime_cache()
    assert RuntimeCacheFile(cache, path)
    assert len(cache.kernels) == 1
    again.run(inputs_of())
    assert path.read_bytes() == written


@pytest.mark.parametrize("fault", ["torn", "noise", "empty", "refused"])
def test_a_bad_cache_never_reaches_the_library_and_is_written_anew(fault: str, tmp_path: Path) -> None:
    path = tmp_path / "cache" / "entry"
    first = double.IRuntimeCache()
    first.kernels = ["a", "b"]
    RuntimeCacheFile(first, path).save()
    good = path.read_bytes()
    if fault != "refused":
        path.write_bytes({"torn": good[:-3], "noise": bytes(range(99)), "empty": b""}[fault])
    second = double.IRuntimeCache()
    second.refuses = fault == "refused"
    file = RuntimeCacheFile(second, path)
    assert second.kernels == []
    second.kernels = ["c"]
    file.save()
    third = double.IRuntimeCache()
    RuntimeCacheFile(third, path)
    assert third.kernels == ["c"]


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    RuntimeCacheFile(double.IRuntimeCache(), tmp_path / "file" / "entry").save()


def test_other_bytes_than_the_manifests_are_not_handed_to_tensorrt(tmp_path: Path) -> None:
    component = component_of(tmp_path)
    path = tmp_path / component.plans[0].file
    path.write_bytes(path.read_bytes() + b" ")
    library = double.make_library()
    with pytest.raises(ArtifactError, match=r"0\.plan was changed"):
        open_double(component, library=library)
    path.write_bytes(b"")
    with pytest.raises(ArtifactError, match=r"cannot read .*0\.plan"):
        open_double(component, library=library)
    path.unlink()
    with pytest.raises(ArtifactError, match=r"cannot read .*0\.plan"):
        open_double(component, library=library)
    with pytest.raises(ArtifactError, match="no digest"):
        open_double(dataclasses.replace(component, plan_digests={}), library=library)
    assert library.Runtime.made == []


def test_a_plan_of_another_network_is_refused_by_its_tensors(tmp_path: Path) -> None:
    component = component_of(tmp_path)
    other = describe_component(ComponentName.UNET, UNET, Family.SD1, DType.FP32)
    with pytest.raises(ArtifactError, match="encoder_hidden_states, out_sample, sample differ"):
        open_double(dataclasses.replace(component, spec=other))


BITS = double.EngineInvalidityDiagnostics
SENTENCES = {
    BITS.VERSION_MISMATCH: (MissingDependency, "was made by TensorRT-RTX 1.6.0", "pip install 'tensorrt-rtx==1.6.0'"),
    BITS.UNSUPPORTED_CC: (MissingHardware, "was built for sm120, and this GPU", "--again bundle --target rtx:sm89"),
    BITS.OLD_CUDA_DRIVER: (MissingHardware, "driver 580.65.06 is too old", "install a newer NVIDIA driver"),
    BITS.OLD_CUDA_RUNTIME: (MissingDependency, "CUDA runtime here is too old", "pip install --upgrade 'sdopt[rtx]'"),
    BITS.INSUFFICIENT_GPU_MEMORY: (MissingHardware, "too little free memory", "nvidia-smi"),
    BITS.MALFORMED_ENGINE: (ArtifactError, "is not a plan of TensorRT-RTX 1.7.1.116", "--again bundle"),
    BITS.CUDA_ERROR: (MissingHardware, "CUDA does not work here: cudaError 35", "nvidia-smi"),
}


@pytest.mark.parametrize("bit", list(BITS))
def test_each_reason_why_a_plan_cannot_run_is_a_sentence_and_a_command(bit: BITS) -> None:
    kind, sentence, hint = SENTENCES[bit]
    record = record_of("unet/0.plan", version="1.6.0", generation="sm120")
    error = explain_invalidity(double.make_library(), int(bit), record, IDENTITY, Path("bundle"), "cudaError 35")
    assert isinstance(error, kind)
    assert sentence in error.message
    assert hint in error.hint


def test_several_reasons_are_all_named_and_the_most_basic_is_mended_first() -> None:
    both = BITS.UNSUPPORTED_CC | BITS.OLD_CUDA_DRIVER
    error = explain_invalidity(double.make_library(), int(both), record_of("unet/0.plan"), IDENTITY, Path("bundle"))
    assert error.hint.startswith("install a newer NVIDIA driver")
    assert "too old" in error.message
    assert "was built for" in error.message


def test_a_gpu_that_rtx_does_not_know_is_sent_to_a_runtime_that_does() -> None:
    gpu = dataclasses.replace(IDENTITY, generation="sm90")
    error = explain_invalidity(
        double.make_library(), int(BITS.UNSUPPORTED_CC), record_of("unet/0.plan"), gpu, Path("bundle")
    )
    assert error.hint == "build it for this GPU: sdopt convert --again bundle --target cuda"


def test_an_invalid_plan_is_not_deserialised(tmp_path: Path) -> None:
    library = double.make_library()
    library.Runtime.validity = (double.EngineValidity.INVALID, int(BITS.UNSUPPORTED_CC))
    with pytest.raises(MissingHardware, match="was built for ampere"):
        open_double(component_of(tmp_path), library=library)
    assert library.Runtime.made == []
    library.Runtime.validity = (double.EngineValidity.INVALID, 0)
    library.Runtime.message = "cudaError 35: driver too old"
    (tmp_path / "again").mkdir()
    with pytest.raises(BackendError, match="cudaError 35"):
        open_double(component_of(tmp_path / "again"), library=library)


def test_tensorrts_own_words_are_in_the_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = [tmp_path / str(number) for number in range(5)]
    for folder in folders:
        folder.mkdir()
    session, _, _ = open_double(component_of(folders[0], plan={"fails": "cuda failure: misaligned address"}))
    with pytest.raises(BackendError, match="tensorrt-rtx cannot run unet: cuda failure: misaligned address"):
        session.run(inputs_of())
    session, _, _ = open_double(component_of(folders[1]))
    monkeypatch.setattr(double.Runtime, "allocation_fails", True)
    with pytest.raises(BackendError, match="cannot make a context for unet: no context today"):
        session.run(inputs_of())
    monkeypatch.undo()
    monkeypatch.setenv("SDOPT_CACHE", str(tmp_path / "cache"))
    library = double.make_library()
    library.Runtime.message = "Version tag does not match"
    with pytest.raises(BackendError, match=r"tensorrt cannot open .*0\.plan: Version tag does not match"):
        open_double(component_of(folders[2], flavour="tensorrt"), GENERAL, library=library)
    library.Runtime.message = "OutOfMemory: cudaMalloc"
    with pytest.raises(MissingHardware, match="too little free memory"):
        open_double(component_of(folders[3], flavour="tensorrt"), GENERAL, library=library)


def test_wrong_inputs_are_refused_before_a_plan_is_chosen(tmp_path: Path) -> None:
    session, _, gpu = open_double(component_of(tmp_path))
    turns = gpu.turns
    with pytest.raises(ShapeError, match="unet"):
        session.run(inputs_of() | {"sample": torch.zeros(2, 4, 8, 9)})
    assert gpu.turns == turns


def test_a_closed_session_refuses_and_has_waited_for_the_gpu(tmp_path: Path) -> None:
    session, _, gpu = open_double(component_of(tmp_path))
    session.run(inputs_of())
    gpu.log.clear()
    session.close()
    assert gpu.log == ["wait"]
    with pytest.raises(BackendError, match="closed"):
        session.run(inputs_of())
    session.close()


def test_every_name_of_the_double_is_one_of_the_real_library() -> None:
    library = pytest.importorskip("tensorrt_rtx")
    for kind in ("Runtime", "ICudaEngine", "IExecutionContext", "IRuntimeCache", "IRuntimeConfig", "ILogger"):
        mine = {name for name in vars(getattr(double, kind)) if not name.startswith("_")}
        missing = mine - set(dir(getattr(library, kind))) - OWN_NAMES
        assert not missing, f"{kind}: {missing}"
    for kind in (
        "EngineValidity", "EngineStat", "EngineInvalidityDiagnostics", "CudaGraphStrategy",
        "ExecutionContextAllocationStrategy", "DynamicShapesKernelSpecializationStrategy",
    ):  # fmt: skip
        members = {member.name for member in getattr(double, kind)}
        assert members == set(getattr(library, kind).__members__), kind
    assert {member.name for member in double.ILogger.Severity} == set(library.ILogger.Severity.__members__)
    for bit in BITS:
        assert int(library.EngineInvalidityDiagnostics.__members__[bit.name or ""]) == bit


OWN_NAMES = {"made", "validity", "message", "allocation_fails"}
"""How tests steer the double."""


def build_real_plan(library: Any) -> bytes:
    builder = library.Builder(library.Logger(library.Logger.ERROR))
    network = builder.create_network(1 << int(library.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    value = network.add_input("x", library.float16, (1, 8))
    network.mark_output(network.add_activation(value, library.ActivationType.RELU).get_output(0))
    return bytes(builder.build_serialized_network(network, builder.create_builder_config()))


@pytest.mark.parametrize("content", ["noise", "a real plan"])
def test_the_real_library_answers_without_a_gpu_and_its_words_are_kept(content: str, tmp_path: Path) -> None:
    library = pytest.importorskip("tensorrt_rtx")
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    component = component_of(tmp_path)
    file, words = component.plans[0].file, "is not a plan of TensorRT-RTX"
    if content == "a real plan":
        (tmp_path / file).write_bytes(build_real_plan(library))
        words = "cudaError"
    digest = hashlib.sha256((tmp_path / file).read_bytes()).hexdigest()
    with pytest.raises((ArtifactError, BackendError), match=rf"unet/0\.plan.*{words}"):
        TensorRTSession(
            dataclasses.replace(component, plan_digests={file: digest}), RTX, library,
            double.HostGpu(), IDENTITY,  # type: ignore[arg-type]
        )  # fmt: skip
