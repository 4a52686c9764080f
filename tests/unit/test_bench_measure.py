"""The child's entry, called in this process on small random networks."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sdopt.backends.protocol import DeviceMemory
from sdopt.bench.measure import measure, read_device_memory
from sdopt.bench.report import DeviceMemoryRecord, ProcessRecord, Stage
from sdopt.fidelity.draw import draw, read_drawing
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
        "least_pictures": 2,
        "most_pictures": 4,
        "picture_budget_s": 0.0,
        "launched_ns": time.monotonic_ns(),
    } | changes


def test_it_draws_for_fidelity_then_times_the_least_of_pictures(bundle: ReferenceBundle, tmp_path: Path) -> None:
    result = measure(make_arguments(bundle, tmp_path))
    assert result.pop("scheduler") == "DDIM"
    record = ProcessRecord.model_validate(result | {"position": 0, "peak_rss_bytes": 1})
    assert {stage: len(samples) for stage, samples in record.samples_ns.items()} == {
        Stage.TEXT_ENCODER: 4, Stage.UNET_STEP: 6, Stage.VAE_DECODER: 2, Stage.OVERHEAD: 2, Stage.END_TO_END: 2,
    }  # fmt: skip
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
    result = measure(make_arguments(bundle, tmp_path, output="", picture_budget_s=1e9))
    assert len(result["samples_ns"][Stage.END_TO_END]) == 4
    assert not (tmp_path / "drawing.safetensors").exists()


def test_bench_and_verdict_draw_the_same(bundle: ReferenceBundle, tmp_path: Path) -> None:
    arguments = make_arguments(bundle, tmp_path, least_pictures=1, most_pictures=1)
    measure(arguments)
    by_bench = read_drawing(tmp_path / "drawing.safetensors")
    draw(arguments | {"output": str(tmp_path / "again.safetensors")})
    by_verdict = read_drawing(tmp_path / "again.safetensors")
    assert (by_bench.latents == by_verdict.latents).all()
    assert (by_bench.images == by_verdict.images).all()
