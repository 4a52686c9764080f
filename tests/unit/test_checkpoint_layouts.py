"""The same model as a diffusers folder and as one original file gives the same components."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers.loaders.single_file_utils as oracle
import pytest
import torch

from sdopt.checkpoint.checkpoint import Checkpoint, Choice
from sdopt.checkpoint.source import open_checkpoint
from sdopt.errors import CheckpointError
from sdopt.model.component import ComponentName
from sdopt.model.family import Family, Prediction
from sdopt.model.task import Task
from tests.checkpoints import (
    Model,
    make_model,
    read_tensor,
    small_recipe,
    to_openclip,
    to_original,
    unet_to_original,
    vae_to_original,
    write_folder,
    write_single_file,
)

KINDS = [*((family, False) for family in Family), (Family.SD1, True), (Family.SDXL, True)]


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: f"{kind[0]}{'-inpainting' if kind[1] else ''}")
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Path, Path]:
    family, inpainting = request.param
    root = tmp_path_factory.mktemp("model")
    model = make_model(small_recipe(family, inpainting=inpainting))
    return (
        model,
        write_folder(root / "folder", model),
        write_single_file(root / "one.safetensors", to_original(model)),
    )


def list_tensors(checkpoint: Checkpoint, name: ComponentName) -> dict[str, torch.Tensor]:
    return {key: read_tensor(ref) for key, ref in checkpoint.components[name].tensors.items()}


def test_folder_and_single_file_are_the_same_model(made: tuple[Model, Path, Path]) -> None:
    model, folder, file = made
    ours, other = open_checkpoint(str(folder)), open_checkpoint(str(file))
    assert ours.family == other.family == model.recipe.family
    assert ours.tasks == other.tasks
    assert (ours.tasks == (Task.INPAINT,)) == (model.recipe.unet["in_channels"] == 9)
    assert list(ours.components) == list(other.components)
    for name, component in ours.components.items():
        assert component.config == other.components[name].config, name
        left, right = list_tensors(ours, name), list_tensors(other, name)
        assert left.keys() == right.keys()
        assert all(torch.equal(left[key], right[key]) for key in left), name
    assert ours.tokenizers.keys() == other.tokenizers.keys()
    for part, path in ours.tokenizers.items():
        assert (path / "tokenizer_config.json").read_bytes() == (
            other.tokenizers[part] / "tokenizer_config.json"
        ).read_bytes()
    assert other.prediction == (None if model.recipe.family is Family.SD2 else Prediction.EPSILON)


def test_the_tensors_are_the_modules_own(made: tuple[Model, Path, Path]) -> None:
    model, folder, _ = made
    checkpoint = open_checkpoint(str(folder))
    unet = list_tensors(checkpoint, ComponentName.UNET)
    assert unet.keys() == model.unet.keys()
    assert all(torch.equal(unet[key], model.unet[key]) for key in unet)
    vae = list_tensors(checkpoint, ComponentName.VAE_DECODER) | list_tensors(checkpoint, ComponentName.VAE_ENCODER)
    assert vae.keys() == model.vae.keys()
    assert "post_quant_conv.weight" in checkpoint.components[ComponentName.VAE_DECODER].tensors
    assert "quant_conv.weight" in checkpoint.components[ComponentName.VAE_ENCODER].tensors
    for name, state in model.text.items():
        text = list_tensors(checkpoint, ComponentName(name))
        assert text.keys() == state.keys()
        assert all(torch.equal(text[key], state[key]) for key in text)


def test_unet_and_vae_agree_with_diffusers_own_reader(made: tuple[Model, Path, Path]) -> None:
    model, _, file = made
    checkpoint = open_checkpoint(str(file))
    state = to_original(model)
    config = dict(checkpoint.components[ComponentName.UNET].config)
    config["class_embed_type"] = None
    expected = oracle.convert_ldm_unet_checkpoint(dict(state), config)
    ours = list_tensors(checkpoint, ComponentName.UNET)
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[key], expected[key]) for key in ours)
    expected = oracle.convert_ldm_vae_checkpoint(dict(state), checkpoint.components[ComponentName.VAE_DECODER].config)
    vae = list_tensors(checkpoint, ComponentName.VAE_DECODER) | list_tensors(checkpoint, ComponentName.VAE_ENCODER)
    assert vae.keys() == expected.keys()
    assert all(torch.equal(vae[key], expected[key].reshape(vae[key].shape)) for key in vae)


@pytest.mark.parametrize("family", [Family.SD2, Family.SDXL, Family.SDXL_REFINER])
def test_openclip_agrees_with_diffusers_own_reader(tmp_path: Path, family: Family) -> None:
    model = make_model(small_recipe(family))
    name = list(model.text)[-1]
    state = {f"p.{key}": value for key, value in to_openclip(model.text[name], unused=family is Family.SD2).items()}
    module = type("Module", (), {"config": object()})()
    expected = oracle.convert_open_clip_checkpoint(module, state, prefix="p.")
    # It knows the unused layer by the published model's number only, and always keeps the projection.
    dropped = (".layers.2.", "text_projection") if family is Family.SD2 else ()
    expected = {
        key: value for key, value in expected.items() if not any(part in key for part in (*dropped, "position_ids"))
    }
    file = write_single_file(tmp_path / "x.safetensors", to_original(model))
    ours = list_tensors(open_checkpoint(str(file)), ComponentName(name))
    if family is Family.SD2:
        expected = {key.removeprefix("text_model."): value for key, value in expected.items()}
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[key], expected[key]) for key in ours)


def test_clip_of_old_files_without_prefix(tmp_path: Path) -> None:
    model = make_model(small_recipe(Family.SD1))
    state = {key.replace("transformer.text_model.", "transformer."): value for key, value in to_original(model).items()}
    checkpoint = open_checkpoint(str(write_single_file(tmp_path / "old.safetensors", state)))
    assert checkpoint.components[ComponentName.TEXT_ENCODER].tensors.keys() == model.text["text_encoder"].keys()


@pytest.mark.parametrize(
    ("signs", "metadata", "expected"),
    [
        (("v_pred",), {}, Prediction.V_PREDICTION),
        ((), {"modelspec.prediction_type": "v"}, Prediction.V_PREDICTION),
        ((), {"modelspec.predict_key": "epsilon"}, Prediction.EPSILON),
        ((), {"prediction_type": "V-Prediction"}, Prediction.V_PREDICTION),
        ((), {"modelspec.prediction_type": "velocity"}, Prediction.V_PREDICTION),
        ((), {"Prediction_Type": '"eps"'}, Prediction.EPSILON),
        ((), {"ss_v_parameterization": "True"}, Prediction.V_PREDICTION),
        ((), {"ss_v_parameterization": "False"}, None),
        (("v_pred",), {"modelspec.prediction_type": "v"}, Prediction.V_PREDICTION),
        ((), {"modelspec.prediction_type": ""}, None),
        ((), {}, None),
    ],
)
def test_prediction_of_a_single_file(
    tmp_path: Path, signs: tuple[str, ...], metadata: dict[str, str], expected: Prediction | None
) -> None:
    state = to_original(make_model(small_recipe(Family.SD2)))
    state |= {sign: torch.tensor([]) for sign in signs}
    file = write_single_file(tmp_path / "x.safetensors", state, {**metadata, "modelspec.license": "OpenRAIL++"})
    checkpoint = open_checkpoint(str(file))
    assert checkpoint.prediction == expected
    assert checkpoint.scheduler.get("prediction_type") == expected
    assert checkpoint.source.licence == "OpenRAIL++"
    assert checkpoint.components[ComponentName.UNET].config["sample_size"] == (64 if expected == "epsilon" else 96)
    asked = open_checkpoint(str(file), Choice(prediction=Prediction.EPSILON))
    assert (asked.prediction, asked.scheduler["prediction_type"]) == (Prediction.EPSILON, "epsilon")


@pytest.mark.parametrize(
    ("signs", "metadata", "words"),
    [
        (("v_pred",), {"modelspec.prediction_type": "epsilon"}, ("'v_pred'", "modelspec.prediction_type='epsilon'")),
        ((), {"prediction_type": "v", "modelspec.predict_key": "eps"}, ("prediction_type='v'", "predict_key='eps'")),
    ],
)
def test_signs_that_differ_are_both_named_and_the_user_decides(
    tmp_path: Path, signs: tuple[str, ...], metadata: dict[str, str], words: tuple[str, str]
) -> None:
    state = to_original(make_model(small_recipe(Family.SD1))) | {sign: torch.tensor([]) for sign in signs}
    file = write_single_file(tmp_path / "x.safetensors", state, metadata)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(str(file))
    assert [word for word in words if word not in caught.value.message] == []
    assert "--prediction" in caught.value.hint
    for prediction in Prediction:
        checkpoint = open_checkpoint(str(file), Choice(prediction=prediction))
        assert (checkpoint.prediction, checkpoint.scheduler["prediction_type"]) == (prediction, prediction.value)


@pytest.mark.parametrize("said", ["sample", "flow", "x0"])
def test_a_prediction_that_is_not_known_is_named(tmp_path: Path, said: str) -> None:
    state = to_original(make_model(small_recipe(Family.SD1)))
    file = write_single_file(tmp_path / "x.safetensors", state, {"modelspec.prediction_type": said})
    with pytest.raises(CheckpointError, match=f"modelspec.prediction_type='{said}'"):
        open_checkpoint(str(file))


def test_the_yaml_file_beside_a_checkpoint_says_what_it_predicts(tmp_path: Path) -> None:
    file = write_single_file(tmp_path / "x.safetensors", to_original(make_model(small_recipe(Family.SD2))))
    beside = tmp_path / "x.yaml"
    beside.write_text('model:\n  params:\n    parameterization: "v"  # velocity\n    linear_start: 0.00085\n')
    assert open_checkpoint(str(file)).prediction is Prediction.V_PREDICTION
    beside.write_text("model:\n  params:\n    linear_start: 0.00085\n")
    assert open_checkpoint(str(file)).prediction is None
    other = write_single_file(
        tmp_path / "y.safetensors", to_original(make_model(small_recipe(Family.SD1))), {"prediction_type": "epsilon"}
    )
    (tmp_path / "y.yaml").write_text("parameterization: v\n")
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(str(other))
    assert "prediction_type='epsilon'" in caught.value.message
    assert "y.yaml" in caught.value.message


def test_zero_snr_in_metadata(tmp_path: Path) -> None:
    state = to_original(make_model(small_recipe(Family.SDXL)))
    metadata = {"ss_zero_terminal_snr": "True", "ss_v_parameterization": "True"}
    scheduler = open_checkpoint(str(write_single_file(tmp_path / "z.safetensors", state, metadata))).scheduler
    assert (scheduler["rescale_betas_zero_snr"], scheduler["prediction_type"]) == (True, "v_prediction")


def flatten_ema(key: str) -> str:
    """As CompVis's LitEma names the average of `model.<key>`."""
    return "model_ema." + key.removeprefix("model.").replace(".", "")


def test_the_ema_copy_is_taken_where_it_is_asked_for(tmp_path: Path) -> None:
    state = to_original(make_model(small_recipe(Family.SD1)))
    unet = {key: value for key, value in state.items() if key.startswith("model.diffusion_model.")}
    averaged = {flatten_ema(key): value + 1 for key, value in unet.items()}
    both = write_single_file(tmp_path / "x.safetensors", {**state, **averaged, "model_ema.decay": torch.ones(())})
    plain, ema = (open_checkpoint(str(both), Choice(ema=ema)) for ema in (False, True))
    last, mean = (list_tensors(checkpoint, ComponentName.UNET) for checkpoint in (plain, ema))
    assert all(torch.equal(mean[key], last[key] + 1) for key in last)
    assert plain.ignored["EMA copy of the UNet (--ema takes it)"] == len(averaged) + 1
    without = write_single_file(tmp_path / "y.safetensors", state)
    with pytest.raises(CheckpointError, match="has no EMA copy of its UNet"):
        open_checkpoint(str(without), Choice(ema=True))
    some = dict(list(averaged.items())[1:])
    with pytest.raises(CheckpointError, match="has no EMA copy"):
        open_checkpoint(str(write_single_file(tmp_path / "z.safetensors", {**state, **some})), Choice(ema=True))


@pytest.mark.parametrize("wrapper", ["", "module.", "state_dict."])
def test_tensors_that_no_component_uses_are_listed_and_ignored(tmp_path: Path, wrapper: str) -> None:
    model = make_model(small_recipe(Family.SD1))
    left = {
        "cond_stage_model.transformer.text_projection.weight": torch.zeros(4, 4),
        "cond_stage_model.logit_scale": torch.zeros(()), "cond_stage_model.transformer.logit_scale": torch.zeros(()),
        "betas": torch.zeros(8), "sqrt_alphas_cumprod": torch.zeros(8), "denoiser.sigmas": torch.zeros(8),
        "first_stage_model.loss.discriminator.weight": torch.zeros(3), "optimizer_states.0": torch.zeros(2),
        "global_step": torch.zeros(()),
    }  # fmt: skip
    state = {wrapper + key: value for key, value in (to_original(model) | left).items()}
    checkpoint = open_checkpoint(str(write_single_file(tmp_path / "x.safetensors", state)))
    reference = open_checkpoint(str(write_single_file(tmp_path / "y.safetensors", to_original(model))))
    for name in reference.components:
        ours, expected = (list_tensors(each, name) for each in (checkpoint, reference))
        assert ours.keys() == expected.keys()
        assert all(torch.equal(ours[key], expected[key]) for key in expected)
    assert sum(checkpoint.ignored.values()) - sum(reference.ignored.values()) == len(left)


def test_a_tensor_that_could_change_the_picture_is_still_an_error(tmp_path: Path) -> None:
    state = to_original(make_model(small_recipe(Family.SD1)))
    state["model.diffusion_model.input_blocks.0.0.extra_gate"] = torch.ones(3)
    with pytest.raises(CheckpointError, match="extra_gate"):
        open_checkpoint(str(write_single_file(tmp_path / "x.safetensors", state)))


def test_zero_snr_and_edm_signs(tmp_path: Path) -> None:
    state = to_original(make_model(small_recipe(Family.SD1)))
    signed = {**state, "v_pred": torch.tensor([]), "ztsnr": torch.tensor([])}
    scheduler = open_checkpoint(str(write_single_file(tmp_path / "z.safetensors", signed))).scheduler
    assert scheduler["_class_name"] == "DDIMScheduler"
    assert (scheduler["rescale_betas_zero_snr"], scheduler["timestep_spacing"]) == (True, "trailing")
    signed = {**state, "edm_mean": torch.zeros(4)}
    with pytest.raises(CheckpointError, match="EDM"):
        open_checkpoint(str(write_single_file(tmp_path / "e.safetensors", signed)))


@pytest.mark.parametrize("middle", ["UNetMidBlock2D", None])
def test_pruned_unet_of_the_ssd_kind(tmp_path: Path, middle: str | None) -> None:
    recipe = small_recipe(Family.SDXL)
    recipe.unet.update(
        layers_per_block=2, mid_block_type=middle, transformer_layers_per_block=[1, [2, 3]],
        reverse_transformer_layers_per_block=[[3, 1, 2], 1],
    )  # fmt: skip
    model = make_model(recipe)
    assert unet_to_original(model.unet, recipe.unet)
    folder = open_checkpoint(str(write_folder(tmp_path / "folder", model)))
    file = open_checkpoint(str(write_single_file(tmp_path / "x.safetensors", to_original(model))))
    ours, other = (c.components[ComponentName.UNET] for c in (folder, file))
    assert ours.config == other.config
    assert {k: ref.shape for k, ref in ours.tensors.items()} == {k: ref.shape for k, ref in other.tensors.items()}


def test_another_vae(tmp_path: Path) -> None:
    model = make_model(small_recipe(Family.SD1))
    other = {key: value + 1 for key, value in model.vae.items()}
    original = vae_to_original(other)
    files = {
        "diffusers": other,
        "bare": original,
        "prefixed": {f"first_stage_model.{k}": v for k, v in original.items()} | {"loss.logvar": torch.zeros(())},
    }
    file = write_single_file(tmp_path / "model.safetensors", to_original(model))
    without = {key: value for key, value in to_original(model).items() if not key.startswith("first_stage")}
    bare = write_single_file(tmp_path / "without.safetensors", without)
    folder = write_folder(tmp_path / "folder", make_model(small_recipe(Family.SD1)))
    with pytest.raises(CheckpointError, match="--vae"):
        open_checkpoint(str(bare))
    vaes = [str(write_single_file(tmp_path / f"{name}.safetensors", state)) for name, state in files.items()]
    for source in (file, bare, folder):
        for vae in vaes:
            checkpoint = open_checkpoint(str(source), Choice(vae=vae))
            decoder = list_tensors(checkpoint, ComponentName.VAE_DECODER)
            assert all(torch.equal(decoder[key], other[key]) for key in decoder)
    for vae in (folder, folder / "vae"):
        assert ComponentName.VAE_ENCODER in open_checkpoint(str(bare), Choice(vae=str(vae))).components
    with pytest.raises(CheckpointError, match="no VAE at"):
        open_checkpoint(str(file), Choice(vae=str(tmp_path / "nowhere")))
    with pytest.raises(CheckpointError, match="not a VAE with encoder and decoder"):
        open_checkpoint(str(folder), Choice(vae=str(bare)))


@pytest.mark.parametrize("single", [False, True])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"scaling_factor": 0.13025}, r"scales its latents by 0\.13025.*trained on 0\.18215"),
        ({"shift_factor": 0.1159}, r"shifts its latents by 0\.1159"),
    ],
)
def test_a_vae_that_does_not_fit_is_refused_for_files_as_for_folders(
    tmp_path: Path, single: bool, change: dict[str, float], words: str
) -> None:
    model = make_model(small_recipe(Family.SD1))
    folder = write_folder(tmp_path / "folder", model)
    source = write_single_file(tmp_path / "x.safetensors", to_original(model)) if single else folder
    other = tmp_path / "vae"
    shutil.copytree(folder / "vae", other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint(str(source), Choice(vae=str(other)))
    shutil.copyfile(folder / "vae" / "config.json", other / "config.json")
    assert open_checkpoint(str(source), Choice(vae=str(other))).components


def test_a_vae_file_that_names_another_family_is_refused(tmp_path: Path) -> None:
    model = make_model(small_recipe(Family.SD1))
    source = write_single_file(tmp_path / "x.safetensors", to_original(model))
    metadata = {"modelspec.architecture": "stable-diffusion-xl-v1-base"}
    vae = write_single_file(tmp_path / "vae.safetensors", vae_to_original(model.vae), metadata)
    with pytest.raises(CheckpointError, match="stable-diffusion-xl-v1-base"):
        open_checkpoint(str(source), Choice(vae=str(vae)))


def test_a_vae_fills_the_gap_of_a_folder_without_one(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "folder", make_model(small_recipe(Family.SD1)))
    (folder / "vae").rename(tmp_path / "other")
    with pytest.raises(CheckpointError, match="lacks the folder vae") as caught:
        open_checkpoint(str(folder))
    assert "--vae" in caught.value.hint
    checkpoint = open_checkpoint(str(folder), Choice(vae=str(tmp_path / "other")))
    assert {ComponentName.VAE_DECODER, ComponentName.VAE_ENCODER} <= checkpoint.components.keys()
    assert list(checkpoint.components) == [name for name in ComponentName if name in checkpoint.components]


@pytest.mark.parametrize(
    "said", ["LongPromptWeightingPipeline", ["pipeline", "MyPipeline"], ["diffusers_modules.local.x", "Custom"]]
)
def test_a_custom_pipeline_is_read_by_its_parts(tmp_path: Path, said: Any) -> None:
    folder = write_folder(tmp_path / "folder", make_model(small_recipe(Family.SD1)))
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": said}))
    assert open_checkpoint(str(folder)).family is Family.SD1
    others = (("prior", ["x", "PriorTransformer"]), ("unet", ["diffusers", "UNetSpatioTemporalConditionModel"]))
    for part, kind in others:
        (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": said, part: kind}))
        with pytest.raises(CheckpointError):
            open_checkpoint(str(folder))


def test_a_vae_of_another_family_is_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "sd1", make_model(small_recipe(Family.SD1)))
    other = write_folder(tmp_path / "xl", make_model(small_recipe(Family.SDXL_REFINER)))
    with pytest.raises(CheckpointError, match=r"scales its latents by 0\.13025"):
        open_checkpoint(str(folder), Choice(vae=str(other / "vae")))
