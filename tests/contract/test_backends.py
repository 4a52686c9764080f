"""What every backend must do, on the same bundle: the same numbers as torch, the same refusals, no aliasing."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from sdopt.backends.component_files import component_files
from sdopt.backends.open import backend_for, open_session
from sdopt.backends.probes import probe_all, probe_backend
from sdopt.backends.protocol import ComponentFiles, Session
from sdopt.bundle.manifest import read_manifest
from sdopt.errors import ArtifactError, BackendError, CheckpointError, SdoptError, ShapeError
from sdopt.machine.environment import find_machine
from sdopt.model.backend_settings import BackendSettings, OnnxRuntimeSettings, OpenVINOSettings, TorchSettings
from sdopt.model.component import ComponentName
from sdopt.model.precision import Precision
from sdopt.preflight.plan_choice import choose_plans
from sdopt.trace.seeded_inputs import make_inputs
from sdopt.weights.to_torch import TORCH_DTYPES

# Relative L2 distance from torch fp32 that is rounding: fp32 by the order of sums, bf16 by its 8 bits in every layer.
BACKENDS: dict[str, tuple[BackendSettings, float]] = {
    "torch-fp32": (TorchSettings(), 0.0),
    "torch-fp32-math": (TorchSettings(attention="math"), 1e-5),
    "torch-fp32-flash": (TorchSettings(attention="flash"), 1e-5),
    "torch-fp32-channels-last": (TorchSettings(channels_last=True), 1e-5),
    "torch-bf16": (TorchSettings(precision=Precision.BF16), 0.1),
    "onnxruntime": (OnnxRuntimeSettings(), 1e-5),
    "onnxruntime-low-memory": (OnnxRuntimeSettings(low_memory=True), 1e-5),
    "openvino-fp32": (OpenVINOSettings(), 1e-5),
    "openvino-bf16": (OpenVINOSettings(inference_precision=Precision.BF16), 0.1),
}

# The networks are too small to share out, and tests run beside each other.
torch.set_num_threads(1)

COMPONENTS = (ComponentName.TEXT_ENCODER, ComponentName.UNET, ComponentName.VAE_DECODER, ComponentName.VAE_ENCODER)
Tensors = dict[str, torch.Tensor]


def component_of(folder: Path, name: ComponentName) -> ComponentFiles:
    manifest = read_manifest(folder)
    plans = choose_plans(folder, manifest, find_machine())
    return component_files(folder, manifest, name, plans.get(name, ()))


def inputs_of(component: ComponentFiles) -> Tensors:
    return make_inputs(component.spec, component.config, component.extents)


@pytest.fixture(scope="module")
def expected(pristine_bundle: Path) -> dict[ComponentName, Tensors]:
    """What torch fp32 gives for every component."""
    outputs = {}
    for name in COMPONENTS:
        component = component_of(pristine_bundle, name)
        with open_session(component, TorchSettings()) as session:
            outputs[name] = session.run(inputs_of(component))
    return outputs


@pytest.fixture(scope="module", params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> tuple[BackendSettings, float]:
    settings, tolerance = BACKENDS[request.param]
    probe = probe_backend(settings)
    if not probe.available:
        pytest.skip(f"{probe.missing}: {probe.remedy}")
    wanted = getattr(settings, "inference_precision", Precision.FP32)
    if wanted not in probe.precisions:
        pytest.skip(f"this processor has no {wanted} arithmetic for {settings.kind}")
    return settings, tolerance


@pytest.fixture(scope="module")
def sessions(backend: tuple[BackendSettings, float], pristine_bundle: Path) -> Iterator[dict[ComponentName, Session]]:
    with contextlib.ExitStack() as stack:
        yield {
            name: stack.enter_context(open_session(component_of(pristine_bundle, name), backend[0]))
            for name in COMPONENTS
        }


def distance(actual: torch.Tensor, reference: torch.Tensor) -> float:
    actual, reference = actual.double().cpu(), reference.double().cpu()
    return ((actual - reference).norm() / reference.norm()).item()


def test_the_probe_says_what_runs(backend: tuple[BackendSettings, float]) -> None:
    probe = probe_backend(backend[0])
    assert probe.available
    assert probe.version[0].isdigit()
    assert Precision.FP32 in probe.precisions
    assert Precision.AUTO not in probe.precisions
    assert backend[0].kind == probe.backend
    assert probe in probe_all()


def test_threads_that_run_one_session_get_what_each_gets_alone(
    sessions: dict[ComponentName, Session], pristine_bundle: Path
) -> None:
    session = sessions[ComponentName.UNET]
    base = inputs_of(component_of(pristine_bundle, ComponentName.UNET))
    several = [base | {"sample": base["sample"] * factor} for factor in (1.0, 0.5, -1.0, 2.0)]
    alone = [session.run(inputs)["out_sample"].cpu() for inputs in several]
    start = threading.Barrier(len(several))

    def run(inputs: Tensors) -> torch.Tensor:
        start.wait()
        return session.run(inputs)["out_sample"].cpu()

    with ThreadPoolExecutor(len(several)) as pool:
        together = list(pool.map(run, several))
    assert all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))


@pytest.mark.parametrize("name", COMPONENTS)
def test_the_outputs_are_those_of_torch(
    name: ComponentName, backend: tuple[BackendSettings, float], sessions: dict[ComponentName, Session],
    expected: dict[ComponentName, Tensors], pristine_bundle: Path,
) -> None:  # fmt: skip
    component = component_of(pristine_bundle, name)
    outputs = sessions[name].run(inputs_of(component))
    assert list(outputs) == [spec.name for spec in component.spec.outputs]
    for spec in component.spec.outputs:
        output = outputs[spec.name]
        assert output.shape == spec.shape(component.extents)
        assert output.dtype is TORCH_DTYPES[spec.dtype]
        assert output.device == sessions[name].device
        assert output.isfinite().all()
        assert distance(output, expected[name][spec.name]) <= backend[1], spec.name


@pytest.mark.parametrize("name", COMPONENTS)
def test_the_same_inputs_give_the_same_outputs_and_stay_as_they_were(
    name: ComponentName, sessions: dict[ComponentName, Session], pristine_bundle: Path
) -> None:
    inputs = inputs_of(component_of(pristine_bundle, name))
    before = {key: value.clone() for key, value in inputs.items()}
    first, second = sessions[name].run(inputs), sessions[name].run(inputs)
    assert all(torch.equal(inputs[key], before[key]) for key in inputs)
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("name", COMPONENTS)
def test_outputs_outlive_the_next_run_and_the_session(
    name: ComponentName, backend: tuple[BackendSettings, float], pristine_bundle: Path
) -> None:
    component = component_of(pristine_bundle, name)
    with open_session(component, backend[0]) as session:
        inputs = inputs_of(component)
        outputs = session.run(inputs)
        kept = {key: value.clone() for key, value in outputs.items()}
        others = {
            key: (value + 1) % 100 if not value.is_floating_point() else value * -0.5 for key, value in inputs.items()
        }
        again = session.run(others)
        assert any(not torch.equal(again[key], kept[key]) for key in kept)
        for value in again.values():
            value.mul_(0)  # what is returned is the caller's own
    assert all(torch.equal(outputs[key], kept[key]) for key in kept)


def test_inputs_need_not_be_contiguous(sessions: dict[ComponentName, Session], pristine_bundle: Path) -> None:
    inputs = inputs_of(component_of(pristine_bundle, ComponentName.UNET))
    strided = inputs | {"sample": inputs["sample"].to(memory_format=torch.channels_last)}
    assert not strided["sample"].is_contiguous()
    session = sessions[ComponentName.UNET]
    difference = distance(session.run(strided)["out_sample"], session.run(inputs)["out_sample"])
    assert difference <= 1e-2


def test_the_inputs_are_used(sessions: dict[ComponentName, Session], pristine_bundle: Path) -> None:
    """A graph whose timestep was folded into a constant would pass parity."""
    inputs = inputs_of(component_of(pristine_bundle, ComponentName.UNET))
    session = sessions[ComponentName.UNET]
    reference = session.run(inputs)["out_sample"]
    for name in inputs:
        changed = session.run(inputs | {name: inputs[name] * 0.1})["out_sample"]
        assert distance(changed, reference) > 1e-3, name


WRONG = {
    "missing input": lambda i: {key: value for key, value in i.items() if key != "timestep"},
    "no input": lambda _: {},
    "another name": lambda i: {"latent": i["sample"], **{key: i[key] for key in i if key != "sample"}},
    "one too many": lambda i: i | {"extra": i["sample"]},
    "another size": lambda i: i | {"sample": i["sample"][..., :-1]},
    "another batch": lambda i: i | {key: i[key].repeat_interleave(2, 0) for key in ("sample", "encoder_hidden_states")},
    "two batches": lambda i: i | {"sample": i["sample"].repeat(2, 1, 1, 1)},
    "other channels": lambda i: i | {"sample": i["sample"][:, :3]},
    "other tokens": lambda i: i | {"encoder_hidden_states": i["encoder_hidden_states"][:, :76]},
    "other rank": lambda i: i | {"timestep": i["timestep"].reshape(1)},
    "empty": lambda i: i | {"sample": i["sample"][:0]},
}


@pytest.mark.parametrize("fault", WRONG)
def test_wrong_inputs_are_refused(fault: str, sessions: dict[ComponentName, Session], pristine_bundle: Path) -> None:
    inputs = inputs_of(component_of(pristine_bundle, ComponentName.UNET))
    session = sessions[ComponentName.UNET]
    with pytest.raises(ShapeError, match="unet"):
        session.run(WRONG[fault](inputs))


def test_memory_is_plausible(sessions: dict[ComponentName, Session], pristine_bundle: Path) -> None:
    for name, session in sessions.items():
        use = session.memory()
        assert use.weights_bytes == (pristine_bundle / name / "weights.safetensors").stat().st_size
        assert 0 < use.weights_bytes < use.process_bytes <= use.process_peak_bytes < 64e9


def test_a_session_knows_what_it_runs(sessions: dict[ComponentName, Session], pristine_bundle: Path) -> None:
    for name, session in sessions.items():
        component = component_of(pristine_bundle, name)
        assert session.spec == component.spec
        assert dict(session.extents) == dict(component.extents)


def test_a_closed_session_refuses(backend: tuple[BackendSettings, float], pristine_bundle: Path) -> None:
    component = component_of(pristine_bundle, ComponentName.VAE_DECODER)
    with open_session(component, backend[0]) as session:
        session.run(inputs_of(component))
    with pytest.raises(BackendError, match="closed"):
        session.run(inputs_of(component))
    session.close()  # twice is no error


def test_a_session_closes_when_its_user_fails(backend: tuple[BackendSettings, float], pristine_bundle: Path) -> None:
    component = component_of(pristine_bundle, ComponentName.VAE_DECODER)
    with pytest.raises(ZeroDivisionError), open_session(component, backend[0]) as session:
        raise ZeroDivisionError
    with pytest.raises(BackendError, match="closed"):
        session.run(inputs_of(component))


@pytest.mark.parametrize("fault", ["noise", "empty", "missing", "half"])
def test_what_a_backend_cannot_open_is_its_error(
    fault: str, backend: tuple[BackendSettings, float], bundle: Path
) -> None:
    component = component_of(bundle, ComponentName.VAE_DECODER)
    # torch runs the weights, plans are whole; the others read the graph first.
    path = component.weights if isinstance(backend[0], TorchSettings) else component.graph
    if component.plans:
        path = bundle / component.plans[0].file
    data = path.read_bytes()
    path.unlink()
    if fault != "missing":
        path.write_bytes({"noise": bytes(range(256)) * 9, "empty": b"", "half": data[: len(data) // 2]}[fault])
    with pytest.raises(SdoptError) as caught, backend_for(backend[0]).open(component) as session:
        session.run(inputs_of(component))
    assert isinstance(caught.value, BackendError | CheckpointError | ArtifactError)
    assert path.name in str(caught.value) or component.name in str(caught.value)


def test_truncated_weights_are_an_error(backend: tuple[BackendSettings, float], bundle: Path) -> None:
    component = component_of(bundle, ComponentName.VAE_DECODER)
    if component.plans:
        pytest.skip("a plan has its weights in it")
    with component.weights.open("r+b") as file:
        file.truncate(component.weights.stat().st_size // 2)
    with pytest.raises((BackendError, CheckpointError)), backend_for(backend[0]).open(component) as session:
        session.run(inputs_of(component))


def test_a_library_that_is_missing_is_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    probe = probe_backend(OpenVINOSettings())
    assert not probe.available
    assert "pip install" in probe.remedy
