"""The child's entry, called in this process on small random networks."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sdopt.backends.protocol import DeviceMemory
from sdopt.bench.case.report import DeviceMemoryRecord, ProcessRecord, Stage
from sdopt.bench.measure.measure import measure, read_device_memory
from sdopt.bench.measure.unet import measure_unet, require_finite, write_inputs
from sdopt.errors import SdoptError
from sdopt.fidelity.drawings import DrawJob, draw, read_drawing
from sdopt.fidelity.scene import Scene, write_scene
from sdopt.model.component import ComponentName
from sdopt.model.family import Family
from sdopt.model.shape import ShapeProfile
from tests.checkpoints import make_model, small_recipe, write_folder
from tests.reference_session import ReferenceBundle, make_bundle

# Schedulers of diffusers 0.42 call numpy on tensors, whose torch 2.13 speaks numpy 1's protocol.
pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> ReferenceBundle:
    source = write_folder(tmp_path_factory.mktemp("model") / "source", make_model(small_recipe(Family.SD1)))
    return make_bundle(
        tmp_path_factory.mktemp("bundle"), source, profile=ShapeProfile.static(height_px=32, width_px=32)
    )


def make_arguments(bundle: ReferenceBundle, folder: Path, **changes: Any) -> dict[str, Any]:
    scene = Scene(
        prompts=("a castle", "the sea"), seed=0, steps=3, guidance_scale=5, inputs=folder / "inputs.safetensors"
    )
    write_scene(bundle.folder, bundle.manifest, scene)
    return {
        "folder": str(bundle.folder),
        "manifest": bundle.manifest.model_dump_json(),
        "settings": None,
        "scene": scene.model_dump(mode="json"),
        "output": str(folder / "drawing.safetensors"),
        "label": "a test",
        "effort": {"least_pictures": 2, "most_pictures": 4, "picture_budget_s": 0.0},
        "launched_ns": time.monotonic_ns(),
    } | changes


def test_it_draws_for_fidelity_then_times_the_least_of_pictures(bundle: ReferenceBundle, tmp_path: Path) -> None:
    result = measure(make_arguments(bundle, tmp_path))
    assert result.pop("scheduler") == "DDIM"
    record = ProcessRecord.model_validate(result | {"position": 0, "peak_rss_bytes": 1})
    assert {stage: len(samples) for stage, samples in record.samples_ns.items()} == {
        Stage.TEXT_ENCODER: 4, Stage.UNET_STEP: 6, Stage.VAE_DECODER: 2, Stage.OVERHEAD: 2, Stage.END_TO_END: 2,
        Stage.FIRST_STEP: 2,
    }  # fmt: skip
    pairs = zip(record.samples_ns[Stage.FIRST_STEP], record.samples_ns[Stage.END_TO_END], strict=True)
    assert all(first < whole for first, whole in pairs)
    assert len(record.warm_up_ns) == 1  # the scene's second picture; the budget leaves no more
    assert {steps: len(samples) for steps, samples in record.sweep_ns.items()} == {1: 1, 3: 2}
    assert record.sweep_ns[3] == record.samples_ns[Stage.END_TO_END]
    assert record.rss_imported_bytes is not None
    assert record.rss_loaded_bytes is not None
    assert record.rss_imported_bytes > 0
    assert record.rss_loaded_bytes > 0  # not more than before: this process has other tests' memory to give back
    assert record.conditions.clock_steps == 0
    assert record.cold_start_ns == record.import_ns + record.load_ns + record.first_picture_ns
    assert all(sample > 0 for samples in record.samples_ns.values() for sample in samples)
    assert record.device_memory == {}
    assert read_drawing(tmp_path / "drawing.safetensors").images.shape == (2, 32, 32, 3)


def test_the_memory_of_engines_on_a_gpu_is_recorded_by_component() -> None:
    def session(name: ComponentName, device: DeviceMemory | None) -> Any:
        return SimpleNamespace(spec=SimpleNamespace(name=name), memory=lambda: SimpleNamespace(device=device))

    sessions = [session(ComponentName.UNET, DeviceMemory(7, None, 2)), session(ComponentName.VAE_DECODER, None)]
    values = read_device_memory(sessions)
    record = DeviceMemoryRecord.model_validate(values.pop("unet"))
    assert values == {}
    assert (record.weights_bytes, record.activations_bytes, record.buffers_bytes) == (7, None, 2)


def test_a_later_process_draws_no_more_than_it_times(bundle: ReferenceBundle, tmp_path: Path) -> None:
    effort = {"least_pictures": 2, "most_pictures": 4, "picture_budget_s": 1e9, "most_warm_up": 2}
    result = measure(make_arguments(bundle, tmp_path, output="", effort=effort))
    assert len(result["samples_ns"][Stage.END_TO_END]) == 4
    assert len(result["warm_up_ns"]) == 2
    assert not (tmp_path / "drawing.safetensors").exists()


def test_a_later_process_has_no_sweep_that_leaves_its_budget(bundle: ReferenceBundle, tmp_path: Path) -> None:
    result = measure(make_arguments(bundle, tmp_path, output=""))
    assert list(result["sweep_ns"]) == [3]


def test_the_unet_alone_is_timed_by_steps(bundle: ReferenceBundle, tmp_path: Path) -> None:
    inputs = tmp_path / "inputs.safetensors"
    arguments = make_arguments(bundle, tmp_path)
    write_inputs(bundle.folder, bundle.manifest, inputs)
    result = measure_unet(arguments)
    record = ProcessRecord.model_validate(result | {"position": 0, "peak_rss_bytes": 1})
    assert {stage: len(samples) for stage, samples in record.samples_ns.items()} == {Stage.UNET_STEP: 2}
    assert record.cold_start_ns == record.import_ns + record.load_ns + record.first_picture_ns
    assert record.sweep_ns == {}
    before = inputs.read_bytes()
    write_inputs(bundle.folder, bundle.manifest, inputs)
    assert inputs.read_bytes() == before


def test_a_unet_that_computes_nan_is_refused() -> None:
    require_finite({"sample": torch.ones(2)})
    with pytest.raises(SdoptError, match="NaN or Inf"):
        require_finite({"sample": torch.tensor([1.0, float("nan")])})


def test_bench_and_verdict_draw_the_same(bundle: ReferenceBundle, tmp_path: Path) -> None:
    arguments = make_arguments(bundle, tmp_path)
    measure(arguments)
    by_bench = read_drawing(tmp_path / "drawing.safetensors")
    scene = Scene.model_validate(arguments["scene"])
    draw(DrawJob(bundle.folder, bundle.manifest, None, scene, tmp_path / "again.safetensors", "a test"))
    by_verdict = read_drawing(tmp_path / "again.safetensors")
    assert (by_bench.latents == by_verdict.latents).all()
    assert (by_bench.images == by_verdict.images).all()
