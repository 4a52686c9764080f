"""diffusers folders as they are found: variants, shards, pickles, old names, links, and what is wrong with
them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sdopt.checkpoint import hub
from sdopt.checkpoint.checkpoint import Choice, ComponentSource
from sdopt.checkpoint.source import open_checkpoint
from sdopt.errors import CheckpointError, UnsafeInputError
from sdopt.model.component import ComponentName
from sdopt.model.family import Family, Prediction
from tests.checkpoints import make_model, read_tensor, small_recipe, vae_to_original, write_folder

INDEX, SCHEDULER = "model_index.json", "scheduler/scheduler_config.json"
UNET_FILE = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("folders") / "model", make_model(small_recipe(Family.SD1)))


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "model"))


def read_all(component: ComponentSource) -> dict[str, torch.Tensor]:
    return {key: read_tensor(ref) for key, ref in component.tensors.items()}


def read_unet(folder: Path) -> dict[str, torch.Tensor]:
    return read_all(open_checkpoint(str(folder)).components[ComponentName.UNET])


def equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def test_a_variant_is_taken_where_there_is_nothing_plain(folder: Path) -> None:
    unet = folder / "unet"
    state = load_file(unet / UNET_FILE)
    save_file({key: value + 1 for key, value in state.items()}, unet / "diffusion_pytorch_model.fp16.safetensors")
    save_file({key: value + 2 for key, value in state.items()}, unet / "diffusion_pytorch_model.non_ema.safetensors")
    assert equal(read_unet(folder), state)
    (unet / UNET_FILE).unlink()
    assert equal(read_unet(folder), {key: value + 1 for key, value in state.items()})
    (unet / "diffusion_pytorch_model.fp16.safetensors").unlink()
    assert equal(read_unet(folder), {key: value + 2 for key, value in state.items()})
    (unet / "diffusion_pytorch_model.non_ema.safetensors").unlink()
    with pytest.raises(CheckpointError, match="holds no weights"):
        open_checkpoint(str(folder))


@pytest.mark.parametrize("variant", ["", "fp16"])
def test_shards(folder: Path, variant: str) -> None:
    unet = folder / "unet"
    state = load_file(unet / UNET_FILE)
    (unet / UNET_FILE).unlink()
    dot = f".{variant}" if variant else ""
    names = [f"diffusion_pytorch_model{dot}-0000{i}-of-00002.safetensors" for i in (1, 2)]
    places = {key: names[i % 2] for i, key in enumerate(state)}
    for name in names:
        save_file({key: value for key, value in state.items() if places[key] == name}, unet / name)
    index = unet / f"diffusion_pytorch_model.safetensors.index{dot}.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    assert equal(read_unet(folder), state)
    for shard in ("../unet/x.safetensors", "/etc/passwd", "..", "a/b.safetensors", "a\\b"):
        index.write_text(json.dumps({"weight_map": {**places, "conv_in.bias": shard}}))
        with pytest.raises(UnsafeInputError, match="not a plain file name"):
            open_checkpoint(str(folder))
    index.write_text(json.dumps({"weight_map": {**places, "conv_in.bias": "absent.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"absent\.safetensors is missing"):
        open_checkpoint(str(folder))
    index.write_text(json.dumps({"weight_map": {**places, "more": names[0]}}))
    with pytest.raises(CheckpointError, match="the shards lack tensor 'more'"):
        open_checkpoint(str(folder))


def test_pickled_weights_go_through_the_sandbox(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SDOPT_CACHE", str(tmp_path / "cache"))
    state = load_file(folder / "unet" / UNET_FILE)
    (folder / "unet" / UNET_FILE).unlink()
    torch.save(state, folder / "unet" / "diffusion_pytorch_model.bin")
    assert equal(read_unet(folder), state)
    assert len(list((tmp_path / "cache" / "pickles").iterdir())) == 1


def test_old_names_of_the_vae_and_of_the_text_encoder(folder: Path) -> None:
    checkpoint = open_checkpoint(str(folder))
    expected = {name: read_all(component) for name, component in checkpoint.components.items()}
    vae = load_file(folder / "vae" / UNET_FILE)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for key, value in vae.items():
        for new, before in old.items():
            key = key.replace(f"attentions.0.{new}.", f"attentions.0.{before}.")
        renamed[key] = value[:, :, None, None] if ".query.weight" in key else value
    assert renamed.keys() != vae.keys()
    save_file(renamed, folder / "vae" / UNET_FILE)
    text = load_file(folder / "text_encoder" / "model.safetensors")
    prefixed = {f"text_model.{key.removeprefix('text_model.')}": value for key, value in text.items()}
    prefixed["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    save_file(prefixed, folder / "text_encoder" / "model.safetensors")
    found = open_checkpoint(str(folder))
    for name, component in checkpoint.components.items():
        assert component.config == found.components[name].config
        assert equal(expected[name], read_all(found.components[name]))


def test_short_configs_of_old_models_are_completed(folder: Path) -> None:
    expected = open_checkpoint(str(folder)).components[ComponentName.UNET].config
    path = folder / "unet" / "config.json"
    config = {"_diffusers_version": "0.6.0", "_name_or_path": "x", **json.loads(path.read_text())}
    assert "use_linear_projection" not in config
    path.write_text(json.dumps(config))
    found = open_checkpoint(str(folder)).components[ComponentName.UNET].config
    assert found == expected
    assert found["use_linear_projection"] is False


def test_scheduler_and_options_and_licence(folder: Path) -> None:
    (folder / "README.md").write_text("---\nlicense: creativeml-openrail-m\ntags:\n- x\n---\n# x\nlicense: no\n")
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"requires_safety_checker": False, "safety_checker": [None, None]}
    (folder / "model_index.json").write_text(json.dumps(index))
    checkpoint = open_checkpoint(str(folder))
    assert checkpoint.prediction is Prediction.EPSILON
    assert checkpoint.source.licence == "creativeml-openrail-m"
    assert checkpoint.pipeline_options == {"requires_safety_checker": False}
    scheduler = {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    assert open_checkpoint(str(folder)).prediction is Prediction.V_PREDICTION
    assert open_checkpoint(str(folder), Choice(prediction=Prediction.EPSILON)).scheduler["prediction_type"] == "epsilon"
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps({**scheduler, "prediction_type": "sample"}))
    with pytest.raises(CheckpointError, match="is 'sample'"):
        open_checkpoint(str(folder))


def test_links_of_the_cache_are_followed_and_others_refused(folder: Path, tmp_path: Path) -> None:
    state = load_file(folder / "unet" / UNET_FILE)
    snapshot = tmp_path / "hub" / "models--owner--name" / "snapshots" / "0123abc"
    blobs = snapshot.parent.parent / "blobs"
    blobs.mkdir(parents=True)
    shutil.copytree(folder, snapshot)
    for i, file in enumerate(path for path in list(snapshot.rglob("*")) if path.is_file()):
        file.rename(blobs / str(i))
        file.symlink_to(blobs / str(i))
    assert equal(read_unet(snapshot), state)
    (folder / "unet" / UNET_FILE).unlink()
    (folder / "unet" / UNET_FILE).symlink_to(snapshot / "unet" / UNET_FILE)
    with pytest.raises(UnsafeInputError, match="link that leaves its model"):
        open_checkpoint(str(folder))
    (tmp_path / "link").symlink_to(snapshot)
    assert open_checkpoint(str(tmp_path / "link")).source.location == str(tmp_path / "link")


def remove_tensor(folder: Path) -> None:
    state = load_file(folder / "unet" / UNET_FILE)
    for key in [key for key in state if key.startswith("mid_block.attentions")]:
        del state[key]
    save_file(state, folder / "unet" / UNET_FILE)


def add_tensor(folder: Path) -> None:
    save_file(
        {**load_file(folder / "unet" / UNET_FILE), "control.weight": torch.zeros(1)},
        folder / "unet" / UNET_FILE,
    )


def reshape_tensor(folder: Path) -> None:
    save_file(
        {**load_file(folder / "unet" / UNET_FILE), "conv_in.bias": torch.zeros(7)},
        folder / "unet" / UNET_FILE,
    )


def quantise_tensor(folder: Path) -> None:
    state = load_file(folder / "unet" / UNET_FILE)
    save_file({**state, "conv_in.bias": state["conv_in.bias"].to(torch.int8)}, folder / "unet" / UNET_FILE)


def change_config(part: str, **values: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / part
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return change


def write(part: str, text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / part).write_text(text)


def break_json(folder: Path) -> None:
    (folder / "unet" / "config.json").write_text("{")


def truncate_weights(folder: Path) -> None:
    path = folder / "unet" / UNET_FILE
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (remove_tensor, r"lacks \d+ tensors: mid_block\.attentions\.0\..* and \d+ more"),
        (add_tensor, r"does not explain: 1 tensor: control\.weight"),
        (reshape_tensor, r"'conv_in\.bias' has the shape \[7\], and its config asks for \[32\]"),
        (quantise_tensor, "stored as int8: the checkpoint is quantised"),
        (break_json, r"config\.json is not JSON"),
        (truncate_weights, "truncated"),
        (change_config("unet/config.json", block_out_channels=[32]), "cannot be built"),
        (change_config("unet/config.json", block_out_channels=None), "cannot be built: TypeError"),
        (change_config("text_encoder/config.json", hidden_size="x"), "cannot be read: .*hidden_size.*expected int"),
        (change_config("vae/config.json", scaling_factor="x"), "scaling_factor='x', which should be a finite number"),
        (change_config("vae/config.json", scaling_factor=0), "scaling_factor=0, which"),
        (change_config("vae/config.json", scaling_factor=None), "scaling_factor=None, which"),
        (change_config("vae/config.json", shift_factor=float("inf")), "shift_factor=inf, which"),
        (change_config("unet/config.json", _class_name="UNet3DConditionModel"), "UNet3DConditionModel"),
        (change_config("unet/config.json", class_embed_type="projection"), "class_embed_type='projection'"),
        (change_config("vae/config.json", _class_name="AutoencoderTiny"), "AutoencoderTiny"),
        (change_config(INDEX, _class_name="FluxPipeline"), "FluxPipeline, not one of Stable Diffusion"),
        (change_config(INDEX, _class_name="StableDiffusion3Pipeline"), "StableDiffusion3Pipeline, not"),
        (change_config(INDEX, text_encoder=["transformers", "T5EncoderModel"]), "T5EncoderModel"),
        (lambda folder: shutil.rmtree(folder / "vae"), "lacks the folder vae"),
        (lambda folder: shutil.rmtree(folder / "unet"), "lacks the folder unet"),
        (change_config(INDEX, controlnet=["diffusers", "ControlNetModel"]), "a pipeline with controlnet"),
        (change_config("unet/config.json", attention_type="gated"), "GLIGEN"),
        (lambda folder: shutil.rmtree(folder / "text_encoder"), "has no text encoder"),
        (lambda folder: shutil.rmtree(folder / "tokenizer"), "lacks tokenizer/vocab.json"),
        (write("tokenizer/vocab.json", "oops"), r"vocab\.json is not JSON"),
        (write("tokenizer/vocab.json", '{"a": "b"}'), "is not a vocabulary"),
        (write("tokenizer/merges.txt", "#version: 0.2\na b\n<html lang=en dir=ltr>"), "is not a list of merges"),
        (write("tokenizer/tokenizer.json", "{}"), "is not a tokenizer"),
        (write("tokenizer/tokenizer_config.json", "[]"), "is not a table"),
        (lambda folder: (folder / "unet" / "config.json").unlink(), r"lacks unet/config\.json"),
        (lambda folder: (folder / SCHEDULER).unlink(), r"scheduler_config\.json is missing"),
        (change_config(SCHEDULER, _class_name="FlowMatchEulerDiscreteScheduler"), "set up for flow matching"),
        (change_config(SCHEDULER, use_flow_sigmas=True), "EulerDiscreteScheduler is set up for flow matching"),
        (change_config(SCHEDULER, _class_name="MyScheduler"), "'MyScheduler', which is not a scheduler that sdopt"),
        (change_config(SCHEDULER, _class_name="VQDiffusionScheduler"), "'VQDiffusionScheduler', which is not a sched"),
        (change_config(SCHEDULER, beta_schedule="wiggly"), "cannot be built from scheduler/.*wiggly"),
        (change_config(SCHEDULER, num_train_timesteps="many"), "cannot be built from scheduler/.*TypeError"),
        (change_config(SCHEDULER, timestep_spacing="even"), "cannot be built from scheduler/.*even is not supported"),
        (change_config(SCHEDULER, _class_name=None), "the scheduler has no _class_name"),
        (lambda folder: (folder / INDEX).unlink(), r"not a diffusers model: it has no model_index\.json"),
        (lambda folder: (folder / "bundle.json").touch(), "is a bundle that sdopt built"),
    ],
)  # fmt: skip
def test_a_damaged_folder_is_named(folder: Path, harm: Callable[[Path], object], message: str) -> None:
    harm(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(str(folder))
    assert caught.value.exit_code == 1
    assert "\n" not in caught.value.message
    assert str(folder.name) in str(caught.value)


def test_a_folder_that_is_no_model_gets_advice(folder: Path, tmp_path: Path) -> None:
    for given, advice in (
        (folder / "unet", "give the folder above"),
        (tmp_path, "model"),
        (folder / "scheduler", "give the folder above"),
    ):
        with pytest.raises(CheckpointError, match=r"not a diffusers model|a UNet alone|a scheduler alone") as caught:
            open_checkpoint(str(given))
        assert advice in caught.value.hint


def test_vae_with_the_original_names_in_a_diffusers_folder_is_refused(folder: Path) -> None:
    save_file(
        {k: v.contiguous() for k, v in vae_to_original(load_file(folder / "vae" / UNET_FILE)).items()},
        folder / "vae" / UNET_FILE,
    )
    with pytest.raises(CheckpointError, match="the vae_decoder lacks"):
        open_checkpoint(str(folder))


@pytest.mark.parametrize("online", [True, False])
def test_an_id_is_looked_up_in_the_cache_when_offline(
    folder: Path, tmp_path: Path, online: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub
    from huggingface_hub import constants, errors

    http_error = next(kind for kind in errors.HfHubHTTPError.__mro__ if kind.__name__ == "HTTPError")

    def refuse_connection(*_: object, **__: object) -> None:
        raise http_error("connection refused")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(CheckpointError, match="nor in the Hugging Face cache") as caught:
        open_checkpoint("owner/name")
    assert "HF_HUB_OFFLINE" in caught.value.hint
    # Not asked to stay offline, but nobody answers: the cache is asked too.
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", online is False)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", refuse_connection)
    with pytest.raises(CheckpointError, match="the hub was not reached"):
        open_checkpoint("owner/name")
    revision = "0123456789abcdef0123456789abcdef01234567"
    model = tmp_path / "hub" / "models--owner--name"
    shutil.copytree(folder, model / "snapshots" / revision)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(revision)
    source = open_checkpoint("owner/name").source
    assert (source.kind, source.location, source.revision) == ("huggingface", "owner/name", revision)


def test_the_files_of_a_repository_that_are_downloaded() -> None:
    names = [
        "model_index.json", "README.md", "v1-5-pruned.ckpt", "v1-5-pruned.safetensors",
        "scheduler/scheduler_config.json", "unet/config.json", "unet/diffusion_pytorch_model.bin",
        "unet/diffusion_pytorch_model.safetensors", "unet/diffusion_pytorch_model.fp16.safetensors",
        "unet/diffusion_pytorch_model.non_ema.safetensors", "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.fp16.bin",
        "text_encoder/config.json", "text_encoder/pytorch_model.bin", "text_encoder/flax_model.msgpack",
        "text_encoder_2/config.json", "text_encoder_2/model-00001-of-00002.safetensors",
        "text_encoder_2/model-00002-of-00002.safetensors", "text_encoder_2/model.safetensors.index.json",
        "tokenizer/vocab.json", "tokenizer/merges.txt", "safety_checker/model.safetensors", "unet/model.onnx",
    ]  # fmt: skip
    chosen = hub.choose_files(names, "owner/name")
    assert chosen == sorted([
        "model_index.json", "README.md", "scheduler/scheduler_config.json", "unet/config.json",
        "unet/diffusion_pytorch_model.fp16.safetensors", "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors", "text_encoder/config.json",
        "text_encoder/pytorch_model.bin", "text_encoder_2/config.json",
        "text_encoder_2/model-00001-of-00002.safetensors", "text_encoder_2/model-00002-of-00002.safetensors",
        "text_encoder_2/model.safetensors.index.json", "tokenizer/vocab.json", "tokenizer/merges.txt",
    ])  # fmt: skip
    with pytest.raises(CheckpointError, match="not a diffusers model") as caught:
        hub.choose_files(["a.safetensors", "README.md"], "owner/name")
    assert "a.safetensors" in caught.value.hint


@pytest.mark.parametrize(
    ("source", "known"),
    [
        ("owner/name", True),
        ("o/n-1.5", True),
        ("o/n@fp16", True),
        ("a/b.ckpt", False),
        ("name", False),
        ("a/b/c", False),
        ("./a", False),
        ("/a/b", False),
    ],
)
def test_what_reads_as_an_id(source: str, known: bool) -> None:
    assert hub.is_hub_id(source) is known
