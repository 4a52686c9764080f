"""What a model can be asked for: the one table of tasks and diffusers' classes, and bundles that draw nothing."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
from diffusers.pipelines import auto_pipeline

import sdopt
from sdopt.bundle.damage import require_pipeline
from sdopt.bundle.manifest import BundleKind, BundleManifest, write_manifest
from sdopt.cli import main as main_module
from sdopt.errors import ArtifactError, UsageError
from sdopt.model.component import ComponentName
from sdopt.model.family import Family
from sdopt.model.request import TASKS, DrawRequest, parse_request
from sdopt.model.task import PIPELINE_CLASSES, Task, find_tasks
from sdopt.pipeline.assemble import assemble_pipeline
from sdopt.tasks.prepare import prepare
from tests.checkpoints import make_model, small_recipe, write_folder
from tests.reference_session import ReferenceBundle, make_bundle

RELATIVES: dict[Task, dict[str, Any]] = {
    Task.TEXT_TO_IMAGE: auto_pipeline.AUTO_TEXT2IMAGE_PIPELINES_MAPPING,
    Task.IMAGE_TO_IMAGE: auto_pipeline.AUTO_IMAGE2IMAGE_PIPELINES_MAPPING,
    Task.INPAINT: auto_pipeline.AUTO_INPAINT_PIPELINES_MAPPING,
}


@pytest.mark.parametrize("latent_channels", [3, 4, 16])
@pytest.mark.parametrize("family", Family)
def test_tasks_follow_from_the_channels_of_the_unet(family: Family, latent_channels: int) -> None:
    for channels in range(1, 3 * latent_channels):
        tasks = find_tasks(family, channels, latent_channels)
        assert len(set(tasks)) == len(tasks)
        if channels == latent_channels:
            assert (Task.TEXT_TO_IMAGE in tasks) == (family is not Family.SDXL_REFINER)
            assert {Task.IMAGE_TO_IMAGE, Task.INPAINT} <= set(tasks)
            assert tasks[0] is not Task.INPAINT
        elif channels == 2 * latent_channels + 1:
            assert tasks == (Task.INPAINT,)
        else:
            assert tasks == ()


@pytest.mark.parametrize("family", Family)
def test_every_class_of_diffusers_does_the_task(family: Family) -> None:
    for task, name in PIPELINE_CLASSES[family].items():
        kind: Any = getattr(diffusers, name)
        takes = inspect.signature(kind.__call__).parameters
        assert ("image" in takes) == (task is not Task.TEXT_TO_IMAGE)
        assert ("mask_image" in takes) == (task is Task.INPAINT)
        assert ("prompt_2" in takes) == family.is_xl
        # `from_pipe` finds the classes of the other tasks by these.
        assert kind in RELATIVES[task].values()


def test_requests_have_the_names_of_the_tasks() -> None:
    assert list(TASKS) == list(Task)
    for task in Task:
        request = ask(task)
        assert request.task is task
        assert json.loads(request.model_dump_json())["task"] == task.value
        assert task.label


def ask(task: Task) -> DrawRequest:
    pictures = {"image": "image.png", "mask": "mask.png"}
    fields = {name: path for name, path in pictures.items() if name in TASKS[task].model_fields}
    return parse_request({"task": task.value, "prompt": "a red circle", **fields})


@pytest.mark.parametrize("inpainting", [False, True], ids=["latents", "mask"])
@pytest.mark.parametrize("family", Family)
def test_a_bundle_draws_its_tasks_and_refuses_the_others(family: Family, inpainting: bool, tmp_path: Path) -> None:
    source = write_folder(tmp_path / "source", make_model(small_recipe(family, inpainting=inpainting)))
    bundle = make_bundle(tmp_path / "bundle", source, family=family, inpainting=inpainting)
    pipe: Any = assemble_pipeline(bundle.folder, bundle.manifest, bundle.sessions)
    tasks = bundle.manifest.tasks
    assert type(pipe).__name__ == PIPELINE_CLASSES[family][tasks[0]]
    for task in Task:
        # The pictures are not there: a request that the model can draw gets as far as them.
        said = "cannot read the picture" if task in tasks else "starts from a picture|needs a mask"
        if task is Task.TEXT_TO_IMAGE and task in tasks:
            prepare(pipe, [ask(task)])
            continue
        with pytest.raises(UsageError, match=said):
            prepare(pipe, [ask(task)])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> ReferenceBundle:
    bundle = make_bundle(tmp_path_factory.mktemp("bundle") / "b")
    write_manifest(bundle.folder, bundle.manifest)
    return bundle


def of_kind(tiny: ReferenceBundle, folder: Path, kind: BundleKind) -> Path:
    changes = {"kind": kind, "tasks": (), "pixels_per_latent": None, "components": {}}
    folder.mkdir()
    write_manifest(folder, tiny.manifest.model_copy(update=changes))
    return folder


COMMANDS: dict[str, Callable[[str, str], list[str]]] = {
    "generate": lambda folder, out: ["generate", folder, "a red circle", "-o", out],
    "bench": lambda folder, out: ["bench", folder, "--report", out],
    "triton": lambda folder, out: ["export", "triton", folder, "-o", out],
    "comfyui": lambda folder, out: ["export", "comfyui", folder, "--graph", "-o", out],
    "optimum": lambda folder, out: ["export", "optimum", folder, "-o", out],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_controlnet_is_refused_with_a_reason(
    command: str, tiny: ReferenceBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    folder = of_kind(tiny, tmp_path / "control", BundleKind.CONTROLNET)
    monkeypatch.setattr(sys, "argv", ["sdopt", *COMMANDS[command](str(folder), str(tmp_path / "out"))])
    with pytest.raises(SystemExit) as stopped:
        main_module.main()
    assert stopped.value.code == 1
    said = capsys.readouterr().err
    assert "is a ControlNet, and not a whole pipeline" in said
    assert "sdopt did not expect" not in said


@pytest.mark.parametrize("kind", [kind for kind in BundleKind if kind is not BundleKind.PIPELINE])
def test_only_a_pipeline_is_loaded(kind: BundleKind, tiny: ReferenceBundle, tmp_path: Path) -> None:
    folder = of_kind(tiny, tmp_path / "other", kind)
    with pytest.raises(ArtifactError, match=f"is {kind.label}, and not a whole pipeline"):
        sdopt.load(folder)


@pytest.mark.parametrize("name", [ComponentName.UNET, ComponentName.VAE_DECODER, ComponentName.TEXT_ENCODER])
def test_a_pipeline_without_a_network_says_what_it_lacks(name: ComponentName, tiny: ReferenceBundle) -> None:
    require_pipeline(tiny.folder, tiny.manifest)
    rest = {other: record for other, record in tiny.manifest.components.items() if other is not name}
    fewer: BundleManifest = tiny.manifest.model_copy(update={"components": rest})
    with pytest.raises(ArtifactError, match=f"lacks {name}"):
        require_pipeline(tiny.folder, fewer)
    with pytest.raises(ArtifactError, match=f"lacks {name}"):
        fewer.require_component(name)


def test_what_a_manifest_does_not_say_is_an_error_that_names_the_bundle(tiny: ReferenceBundle) -> None:
    silent: BundleManifest = tiny.manifest.model_copy(update={"pixels_per_latent": None, "tasks": ()})
    for ask_for in (lambda: silent.extents, lambda: silent.profile_extents, lambda: silent.own_task):
        with pytest.raises(ArtifactError, match=f"^{silent.name} is "):
            ask_for()
    assert tiny.manifest.extents["latent_height"].opt * tiny.manifest.require_pixels_per_latent() == 64
