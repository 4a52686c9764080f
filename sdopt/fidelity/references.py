"""What torch and the engines draw of the scene that a recipe asks for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sdopt.bundle.manifest import BundleManifest
from sdopt.errors import MissingHardware
from sdopt.fidelity.candidate import find_reference_device
from sdopt.fidelity.drawings import Drawing, draw_isolated, draw_twice_isolated
from sdopt.fidelity.scene import DEFAULT_PROMPTS, Scene, write_scene
from sdopt.model.backend_settings import TorchSettings

REFERENCE = TorchSettings()
NOISE_FLOOR = TorchSettings(attention="math")
_TOO_SMALL_GPU = "torch drew on the CPU, because the GPU has too little memory for torch in fp32"


@dataclass(frozen=True)
class References:
    """What torch draws of a scene, and again for the noise floor. `remark` says why not on the engines' device."""

    scene: Scene
    drawing: Drawing
    floor: Drawing
    device: Literal["cpu", "cuda"]
    remark: str = ""


def make_scene(folder: Path, manifest: BundleManifest, work: Path) -> Scene:
    """The scene that the recipe asks for, its inputs written to `work`."""
    verify = manifest.recipe.verify
    scene = Scene(
        prompts=verify.prompts or DEFAULT_PROMPTS, seed=verify.seed, steps=verify.steps,
        guidance_scale=verify.guidance_scale, inputs=work / "inputs.safetensors",
    )  # fmt: skip
    write_scene(folder, manifest, scene)
    return scene


def draw_engines(folder: Path, manifest: BundleManifest, work: Path, scene: Scene) -> Drawing:
    return draw_isolated(folder, manifest, None, scene, work / "engines.safetensors", label="the engines")


def draw_references(folder: Path, manifest: BundleManifest, work: Path, scene: Scene) -> References:
    """Draw with torch fp32, twice: on the GPU where the engines draw there and its memory is large enough."""

    def draw_both(device: Literal["cpu", "cuda"], remark: str) -> References:
        outputs = (work / "torch.safetensors", work / "noise-floor.safetensors")
        settings = on_device(device, REFERENCE)
        drawn = draw_twice_isolated(folder, manifest, settings, scene, outputs, label="torch fp32")
        return References(scene, *drawn, device, remark)

    device = find_reference_device(manifest)
    try:
        return draw_both(device, "")
    except MissingHardware as error:
        if device == "cpu":
            raise
        return draw_both("cpu", f"; {_TOO_SMALL_GPU} ({error.message})")


def on_device(device: Literal["cpu", "cuda"], settings: TorchSettings) -> TorchSettings:
    return settings.model_copy(update={"device": device})
