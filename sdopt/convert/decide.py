"""Recipe -> plan: open the checkpoint, and find out what no file says."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from pydantic import TypeAdapter

from sdopt import progress
from sdopt.adapters.bake import bake
from sdopt.checkpoint.checkpoint import Checkpoint, Choice
from sdopt.checkpoint.infer import sample_size
from sdopt.checkpoint.scheduler_config import with_prediction
from sdopt.checkpoint.source import open_checkpoint
from sdopt.convert.plan import BuildPlan, resolve_build
from sdopt.convert.vae_precision import choose_vae_precisions
from sdopt.disk.store import Store, cache_root
from sdopt.model.component import ComponentName
from sdopt.model.family import Prediction
from sdopt.model.lora import LoraChoice, parse_lora
from sdopt.model.recipe import BuildRecipe
from sdopt.processes.call import call
from sdopt.processes.channel import JsonTable
from sdopt.weights.safetensors_header import TensorRef

_TENSORS = TypeAdapter(dict[str, TensorRef])


def open_plan(recipe: BuildRecipe) -> BuildPlan:
    """Open the recipe's source and decide everything. Local paths in the recipe become absolute."""
    progress.update("reading the checkpoint", 0.0)
    recipe = _with_absolute_paths(recipe)
    checkpoint = open_checkpoint(recipe.source, Choice(recipe.vae, recipe.prediction, recipe.ema))
    if checkpoint.prediction is None:
        checkpoint = _probe_prediction(checkpoint)
    checkpoint = _with_adapters(checkpoint, recipe)
    plan = resolve_build(checkpoint, recipe)
    chosen = choose_vae_precisions(plan)
    return resolve_build(checkpoint, recipe, chosen) if chosen else plan


def _with_adapters(checkpoint: Checkpoint, recipe: BuildRecipe) -> Checkpoint:
    tensors = {name: source.tensors for name, source in checkpoint.components.items()}
    baked = bake(tensors, [parse_lora(text) for text in recipe.lora], Store(cache_root()))
    components = {
        name: dataclasses.replace(source, tensors=baked.components[name])
        for name, source in checkpoint.components.items()
    }
    source = checkpoint.source.model_copy(update={"adapters": baked.adapters})
    return dataclasses.replace(checkpoint, components=components, source=source)


def _with_absolute_paths(recipe: BuildRecipe) -> BuildRecipe:
    """The recipe is kept in the bundle, and `sdopt convert --again` may be typed in another folder."""
    paths = {"source": recipe.source, "vae": recipe.vae}
    if recipe.quantization.endswith(".toml") or os.sep in recipe.quantization:
        paths["quantization"] = recipe.quantization
    lora = tuple(_with_absolute_path(parse_lora(text)) for text in recipe.lora)
    found = {key: path for key, text in paths.items() if text and (path := Path(text).expanduser()).exists()}
    return recipe.model_copy(update={"lora": lora} | {key: str(path.resolve()) for key, path in found.items()})


def _with_absolute_path(lora: LoraChoice) -> str:
    path = Path(lora.source).expanduser()
    return str(dataclasses.replace(lora, source=str(path.resolve())) if path.exists() else lora)


def _probe_prediction(checkpoint: Checkpoint) -> Checkpoint:
    unet = checkpoint.unet
    progress.update("finding out what the UNet predicts", 0.0)
    tensors = _TENSORS.dump_python(dict(unet.tensors), mode="json")
    outcome = call(probe_in_child, {"config": dict(unet.config), "tensors": tensors})
    prediction = Prediction(outcome.value["prediction"])
    # The reader of a single file gives the size of the published models that predict the velocity.
    config = {**unet.config, "sample_size": sample_size(checkpoint.family, prediction)}
    components = {**checkpoint.components, ComponentName.UNET: dataclasses.replace(unet, config=config)}
    scheduler = with_prediction(checkpoint.scheduler, prediction)
    return dataclasses.replace(checkpoint, prediction=prediction, scheduler=scheduler, components=components)


def probe_in_child(arguments: JsonTable) -> JsonTable:
    """Run the UNet once, at the noisiest step on a constant input without a prompt, and see what comes out.

    At step 999 the latent is all noise. A UNet that predicts the noise gives its input back; one that predicts the
    velocity gives about minus the picture, which has nothing of the input. (A1111 tells SD2 models apart like this.)
    """
    import torch
    from accelerate import init_empty_weights

    from sdopt.networks.modules import build_network
    from sdopt.weights.to_torch import load_weights

    config = arguments["config"]
    with init_empty_weights(include_buffers=False):
        network = build_network(ComponentName.UNET, config)
    load_weights(network, _TENSORS.validate_python(arguments["tensors"]), torch.float32)
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(1, int(config["in_channels"]), 16, 16, generator=generator)
    text = torch.zeros(1, 77, int(config["cross_attention_dim"]))
    with torch.inference_mode():
        output = network(sample, torch.tensor(999.0), text)
    latent = sample[:, : output.shape[1]]
    likeness = torch.nn.functional.cosine_similarity(latent.flatten(), output.flatten(), dim=0).item()
    return {"prediction": Prediction.EPSILON if likeness > 0.5 else Prediction.V_PREDICTION, "likeness": likeness}
