"""A scene with LoRAs: engines draw it from slots, torch from W + dW, and both draw the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sdopt.bundle.manifest import read_manifest
from sdopt.disk.files import hash_file
from sdopt.errors import AdapterError, UsageError
from sdopt.fidelity.candidate import open_candidate
from sdopt.fidelity.drawings import Drawing, draw_scene
from sdopt.fidelity.scene import Scene, SceneJob, write_scene_in_child
from sdopt.model.backend_settings import BackendSettings, OnnxRuntimeSettings, TorchSettings
from sdopt.model.lora import LoraUse
from tests.slotted_bundle import add_slots_to, write_lora

ENGINES, TORCH = OnnxRuntimeSettings(), TorchSettings()


@pytest.fixture(scope="module")
def folder(pristine_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return add_slots_to(pristine_bundle, tmp_path_factory.mktemp("scene") / "bundle")


def use(path: Path, unet: float, text: float) -> LoraUse:
    return LoraUse(source=str(path), unet=unet, text=text, sha256=hash_file(path))


@pytest.fixture(scope="module")
def loras(folder: Path) -> tuple[LoraUse, ...]:
    first = write_lora(folder.parent / "ink.safetensors", folder, 3)
    second = write_lora(folder.parent / "glow.safetensors", folder, 4, endings=("conv1", "to_q", "q_proj"))
    return use(first, 0.7, 0.4), use(second, -0.3, 0.5)


def draw(folder: Path, settings: BackendSettings, loras: tuple[LoraUse, ...]) -> Drawing:
    manifest = read_manifest(folder)
    scene = Scene(
        prompts=("a red circle",), seed=1, steps=2, guidance_scale=5.0, inputs=folder.parent / "inputs.safetensors",
        loras=loras,
    )  # fmt: skip
    write_scene_in_child(SceneJob(folder, manifest, scene))
    with open_candidate(folder, manifest, settings, loras=scene.loras) as pipeline:
        return draw_scene(pipeline, manifest, scene, lambda share: None)


def distance(drawing: Drawing, other: Drawing) -> float:
    return float(np.linalg.norm(drawing.latents - other.latents) / np.linalg.norm(other.latents))


def test_slots_draw_what_torch_draws_with_changed_weights(folder: Path, loras: tuple[LoraUse, ...]) -> None:
    plain, engines, torch = (draw(folder, *each) for each in ((TORCH, ()), (ENGINES, loras), (TORCH, loras)))
    assert distance(engines, torch) < 1e-4
    assert distance(torch, plain) > 0.02
    # Both of them, and with their own weights: or one would be enough for the above.
    for changed in ((loras[0],), (loras[1],), (loras[0], loras[1].model_copy(update={"text": 0.0}))):
        assert distance(draw(folder, TORCH, changed), torch) > 1e-3


def test_what_a_bundle_does_not_take_is_an_error_for_both(
    pristine_bundle: Path, folder: Path, loras: tuple[LoraUse, ...], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="no LoRA slots"):
        draw_on(pristine_bundle, ENGINES, loras)
    wrong = write_lora(tmp_path / "wrong.safetensors", folder, 0)
    wrong.write_bytes(wrong.read_bytes().replace(b"mid_block", b"mid_black"))
    for settings in (ENGINES, TORCH):
        with pytest.raises(AdapterError, match="wrong"):
            draw_on(folder, settings, (use(wrong, 1.0, 1.0),))


def draw_on(folder: Path, settings: BackendSettings, loras: tuple[LoraUse, ...]) -> None:
    with open_candidate(folder, read_manifest(folder), settings, loras=loras):
        pass
