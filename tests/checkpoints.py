"""Small random models of every family, as diffusers folders and as single files in the original layout.

The way from diffusers' names to the original ones is written here with the index arithmetic of diffusers' own
export scripts, apart from the package's code, which goes the other way by looking at what is there.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from sdopt.checkpoint.tokenizer import END_OF_TEXT, EXCLAMATION, write_clip_tokenizer
from sdopt.model.family import Family
from sdopt.model.precision import DType
from sdopt.weights.safetensors_header import TensorRef
from sdopt.weights.tensor_layout import plan_layout

State = dict[str, Tensor]


@dataclass
class Recipe:
    """Configs of a model's networks, as its diffusers folder would say them."""

    family: Family
    unet: dict[str, Any]
    vae: dict[str, Any]
    text: dict[str, dict[str, Any]]
    scheduler: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class Model:
    recipe: Recipe
    unet: State
    vae: State
    text: dict[str, State]


def small_recipe(family: Family, *, inpainting: bool = False) -> Recipe:
    """Two levels, one layer; widths that are multiples of 32 (norm groups) and 64 (channels of a head)."""
    wide = (32, 64) if family is Family.SD1 else (64, 128)
    unet: dict[str, Any] = {
        "in_channels": 9 if inpainting else 4, "block_out_channels": wide, "layers_per_block": 1,
        "cross_attention_dim": 64, "sample_size": {Family.SD1: 64, Family.SD2: 96}.get(family, 128),
        "attention_head_dim": 8, "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }  # fmt: skip
    if family is not Family.SD1:
        unet.update(use_linear_projection=True, attention_head_dim=(1, 2), upcast_attention=family is Family.SD2)
    text: dict[str, dict[str, Any]] = {}
    if family in (Family.SD1, Family.SDXL):
        text["text_encoder"] = _text(64, 128, "quick_gelu", projection=64)
    if family is Family.SD2:
        text["text_encoder"] = _text(64, 128, "gelu", projection=512)
    if family.is_xl:
        text["text_encoder_2"] = _text(64, 256, "gelu", projection=96, projected=True)
        ids = 6 if family is Family.SDXL else 5
        unet.update(
            addition_embed_type="text_time", addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=ids * 8 + 96, transformer_layers_per_block=2,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=128 if family is Family.SDXL else 64,
        )  # fmt: skip
    vae = {
        "block_out_channels": (32, 64), "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2, "layers_per_block": 1, "latent_channels": 4,
        "sample_size": family.native_size_px, "scaling_factor": 0.13025 if family.is_xl else 0.18215,
    }  # fmt: skip
    return Recipe(family, unet, vae, text)


def _text(
    width: int, inner: int, activation: str, *, projection: int, projected: bool = False, layers: int = 2
) -> dict[str, Any]:
    return {
        "architectures": ["CLIPTextModelWithProjection" if projected else "CLIPTextModel"],
        "hidden_size": width, "intermediate_size": inner, "hidden_act": activation,
        "projection_dim": projection, "num_hidden_layers": layers, "num_attention_heads": width // 64,
        "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1,
    }  # fmt: skip


def make_model(recipe: Recipe, *, device: str = "cpu") -> Model:
    """Random fp16 weights; on the device `meta`, names and shapes only."""
    torch.manual_seed(0)
    with torch.device(device):
        unet = UNet2DConditionModel(**recipe.unet).half().state_dict()
        vae = AutoencoderKL(**recipe.vae).half().state_dict()
        text = {}
        for name, config in recipe.text.items():
            projected = "WithProjection" in config["architectures"][0]
            kind = CLIPTextModelWithProjection if projected else CLIPTextModel
            text[name] = kind(CLIPTextConfig(**config)).half().state_dict()
    return Model(recipe, unet, vae, text)


def write_folder(folder: Path, model: Model) -> Path:
    """A diffusers folder."""
    xl = model.recipe.family.is_xl
    index: dict[str, Any] = {
        "_class_name": f"StableDiffusion{'XL' if xl else ''}Pipeline",
        **model.recipe.options,
    }
    parts = {"unet": (model.unet, model.recipe.unet), "vae": (model.vae, model.recipe.vae)}
    parts |= {name: (state, model.recipe.text[name]) for name, state in model.text.items()}
    for name, (state, config) in parts.items():
        (folder / name).mkdir(parents=True)
        text = name.startswith("text")
        save_file(state, folder / name / f"{'model' if text else 'diffusion_pytorch_model'}.safetensors")
        kind = config["architectures"][0] if text else {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL"}[name]
        index[name] = ["transformers" if text else "diffusers", kind]
        (folder / name / "config.json").write_text(json.dumps(config if text else {"_class_name": kind, **config}))
        if text:
            tokenizer = folder / name.replace("text_encoder", "tokenizer")
            tokenizer.mkdir()
            for file in write_clip_tokenizer(EXCLAMATION if config["hidden_act"] == "gelu" else END_OF_TEXT).iterdir():
                (tokenizer / file.name).write_bytes(file.read_bytes())
    (folder / "scheduler").mkdir()
    scheduler = {"_class_name": "EulerDiscreteScheduler", **model.recipe.scheduler}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def to_original(model: Model) -> State:
    """All tensors by the names of the original layout, with what published files carry besides."""
    family, device = model.recipe.family, next(iter(model.unet.values())).device
    state = {
        f"model.diffusion_model.{key}": value for key, value in unet_to_original(model.unet, model.recipe.unet).items()
    }
    state |= {f"first_stage_model.{key}": value for key, value in vae_to_original(model.vae).items()}
    state["alphas_cumprod"] = torch.ones(1000, device=device)
    state["model_ema.decay"] = torch.ones((), device=device)
    first = {
        re.sub(r"^(text_model\.)?", "text_model.", key): value
        for key, value in model.text.get("text_encoder", {}).items()
    }
    match family:
        case Family.SD1:
            state |= {f"cond_stage_model.transformer.{key}": value for key, value in first.items()}
            state["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77, device=device)[
                None
            ]
        case Family.SD2:
            state |= {
                f"cond_stage_model.model.{key}": v
                for key, v in to_openclip(model.text["text_encoder"], unused=True).items()
            }
        case Family.SDXL:
            state |= {f"conditioner.embedders.0.transformer.{key}": value for key, value in first.items()}
            state |= {
                f"conditioner.embedders.1.model.{key}": v
                for key, v in to_openclip(model.text["text_encoder_2"]).items()
            }
        case Family.SDXL_REFINER:
            state |= {
                f"conditioner.embedders.0.model.{key}": v
                for key, v in to_openclip(model.text["text_encoder_2"]).items()
            }
    return state


_RESNET = [
    ("norm1", "in_layers.0"), ("conv1", "in_layers.2"), ("time_emb_proj", "emb_layers.1"),
    ("norm2", "out_layers.0"), ("conv2", "out_layers.3"), ("conv_shortcut", "skip_connection"),
]  # fmt: skip
_ENDS = [
    ("time_embedding.linear_1", "time_embed.0"), ("time_embedding.linear_2", "time_embed.2"),
    ("conv_in", "input_blocks.0.0"), ("add_embedding.linear_1", "label_emb.0.0"),
    ("add_embedding.linear_2", "label_emb.0.2"), ("conv_norm_out", "out.0"), ("conv_out", "out.2"),
]  # fmt: skip


def unet_to_original(state: State, config: dict[str, Any]) -> State:
    """UNet without prefix. Block numbers: one for the first convolution, then layers + 1 a level."""
    step = int(config.get("layers_per_block", 2)) + 1
    names = {}
    for key in state:
        name = key
        for ours, theirs in _ENDS:
            if name.startswith(ours + "."):
                name = name.replace(ours, theirs, 1)
        if ".resnets." in name:
            for ours, theirs in _RESNET:
                name = name.replace(f".{ours}.", f".{theirs}.")
        for level in range(len(config["block_out_channels"])):
            attention = any(k.startswith(f"up_blocks.{level}.attentions.") for k in state)
            for layer in range(step):
                into, out = (
                    f"input_blocks.{step * level + layer + 1}",
                    f"output_blocks.{step * level + layer}",
                )
                for kind, slot in (("resnets", 0), ("attentions", 1)):
                    name = name.replace(f"down_blocks.{level}.{kind}.{layer}.", f"{into}.{slot}.")
                    name = name.replace(f"up_blocks.{level}.{kind}.{layer}.", f"{out}.{slot}.")
            name = name.replace(f"down_blocks.{level}.downsamplers.0.conv.", f"input_blocks.{step * (level + 1)}.0.op.")
            last = f"output_blocks.{step * (level + 1) - 1}.{2 if attention else 1}."
            name = name.replace(f"up_blocks.{level}.upsamplers.0.", last)
        for ours, theirs in (("resnets.0", "0"), ("attentions.0", "1"), ("resnets.1", "2")):
            name = name.replace(f"mid_block.{ours}.", f"middle_block.{theirs}.")
        names[key] = name
    assert len(set(names.values())) == len(names)
    return {names[key]: value for key, value in state.items()}


def vae_to_original(state: State) -> State:
    """VAE without prefix; its attention's linear layers are 1x1 convolutions there."""
    levels = len({key.split(".")[2] for key in state if key.startswith("decoder.up_blocks.")})
    original = {}
    for key, value in state.items():
        name, tensor = (
            key.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out"),
            value,
        )
        for level in range(levels):
            name = name.replace(f"encoder.down_blocks.{level}.downsamplers.0.", f"encoder.down.{level}.downsample.")
            name = name.replace(
                f"decoder.up_blocks.{level}.upsamplers.0.", f"decoder.up.{levels - level - 1}.upsample."
            )
            name = name.replace(f"encoder.down_blocks.{level}.resnets.", f"encoder.down.{level}.block.")
            name = name.replace(f"decoder.up_blocks.{level}.resnets.", f"decoder.up.{levels - level - 1}.block.")
        name = name.replace("mid_block.resnets.0", "mid.block_1").replace("mid_block.resnets.1", "mid.block_2")
        if "mid_block.attentions.0." in name:
            name = name.replace("mid_block.attentions.0.", "mid.attn_1.").replace("group_norm", "norm")
            name = name.replace("to_q", "q").replace("to_k", "k").replace("to_v", "v").replace("to_out.0", "proj_out")
            tensor = value[:, :, None, None] if value.ndim == 2 else value
        original[name] = tensor
    return original


def to_openclip(state: State, *, unused: bool = False) -> State:
    """OpenCLIP's names without prefix; `unused` adds the last layer, which SD 2.x carries and does not
    use."""
    plain = {key.removeprefix("text_model."): value for key, value in state.items()}
    names = {
        "embeddings.token_embedding.weight": "token_embedding.weight",
        "final_layer_norm.weight": "ln_final.weight",
        "embeddings.position_embedding.weight": "positional_embedding",
        "final_layer_norm.bias": "ln_final.bias",
    }  # fmt: skip
    original: State = {names[key]: value for key, value in plain.items() if key in names}
    layers = len({key.split(".")[2] for key in plain if key.startswith("encoder.layers.")})
    for layer in range(layers + unused):
        ours, theirs = f"encoder.layers.{min(layer, layers - 1)}", f"transformer.resblocks.{layer}"
        for last in ("weight", "bias"):
            fused = torch.cat([plain[f"{ours}.self_attn.{part}_proj.{last}"] for part in "qkv"])
            original[f"{theirs}.attn.in_proj_{last}"] = fused
            for our, their in (
                ("self_attn.out_proj", "attn.out_proj"), ("layer_norm1", "ln_1"), ("layer_norm2", "ln_2"),
                ("mlp.fc1", "mlp.c_fc"), ("mlp.fc2", "mlp.c_proj"),
            ):  # fmt: skip
                tensor = plain[f"{ours}.{our}.{last}"]
                original[f"{theirs}.{their}.{last}"] = tensor.clone() if layer == layers else tensor
    width = original["ln_final.weight"].shape[0]
    device = original["ln_final.weight"].device
    projection = (
        plain["text_projection.weight"].T if "text_projection.weight" in plain else torch.eye(width, device=device)
    )
    original["text_projection"] = projection.contiguous()
    original["logit_scale"] = torch.ones((), device=device)
    return original


def write_single_file(path: Path, state: State, metadata: dict[str, str] | None = None) -> Path:
    save_file({key: value.contiguous() for key, value in state.items()}, path, metadata)
    return path


def write_hollow_file(path: Path, state: State) -> Path:
    """A safetensors file with a true header and a hole in place of the data: full size, no disk."""
    dtypes = {torch.float16: DType.FP16, torch.float32: DType.FP32, torch.int64: DType.INT64}
    layout = plan_layout(path, {key: (dtypes[value.dtype], tuple(value.shape)) for key, value in state.items()})
    path.write_bytes(layout.header)
    os.truncate(path, layout.size_bytes)
    return path


def read_tensor(ref: TensorRef) -> Tensor:
    """The tensor behind a byte range, as the weights' writer reads it."""
    dtypes = {DType.FP16: torch.float16, DType.FP32: torch.float32, DType.BF16: torch.bfloat16}
    with ref.file.open("rb") as file:
        file.seek(ref.offset_bytes)
        raw = bytearray(file.read(ref.nbytes))
    stored = ref.shape[::-1] if ref.transposed else ref.shape
    tensor = torch.frombuffer(raw, dtype=dtypes[ref.dtype]).reshape(stored)
    return tensor.T.contiguous() if ref.transposed else tensor
