"""The same model as a diffusers folder and as one original file gives the same components."""

from __future__ import annotations

from pathlib import Path

import diffusers.loaders.single_file_utils as oracle
import pytest
import torch

from sdopt.checkpoint.checkpoint import Checkpoint
from sdopt.checkpoint.source import open_checkpoint
from sdopt.errors import CheckpointError
from sdopt.model.component import ComponentName
from sdopt.model.family import Family, Prediction
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
    assert ours.inpainting == other.inpainting == (model.recipe.unet["in_channels"] == 9)
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
    asked = open_checkpoint(str(file), prediction=Prediction.EPSILON)
    assert (asked.prediction, asked.scheduler["prediction_type"]) == (Prediction.EPSILON, "epsilon")


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
            checkpoint = open_checkpoint(str(source), vae=vae)
            decoder = list_tensors(checkpoint, ComponentName.VAE_DECODER)
            assert all(torch.equal(decoder[key], other[key]) for key in decoder)
    for vae in (folder, folder / "vae"):
        assert ComponentName.VAE_ENCODER in open_checkpoint(str(bare), vae=str(vae)).components
    with pytest.raises(CheckpointError, match="no VAE at"):
        open_checkpoint(str(file), vae=str(tmp_path / "nowhere"))
    with pytest.raises(CheckpointError, match="no VAE with encoder and decoder"):
        open_checkpoint(str(folder), vae=str(bare))


def test_a_vae_of_another_family_is_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "sd1", make_model(small_recipe(Family.SD1)))
    other = write_folder(tmp_path / "xl", make_model(small_recipe(Family.SDXL_REFINER)))
    with pytest.raises(CheckpointError, match=r"scales its latents by 0\.13025"):
        open_checkpoint(str(folder), vae=str(other / "vae"))
