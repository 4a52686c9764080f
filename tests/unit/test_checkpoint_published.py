"""Full-size files of the published models, without their data: the inferred configs are the published
ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sdopt.checkpoint.source import open_checkpoint
from sdopt.model.component import ComponentName
from sdopt.model.family import Family, Prediction
from tests.checkpoints import Recipe, make_model, to_original, write_hollow_file

CLIP_L = {
    "architectures": ["CLIPTextModel"], "attention_dropout": 0.0, "bos_token_id": 0, "eos_token_id": 2,
    "hidden_act": "quick_gelu", "hidden_size": 768, "initializer_factor": 1.0, "initializer_range": 0.02,
    "intermediate_size": 3072, "layer_norm_eps": 1e-05, "max_position_embeddings": 77,
    "model_type": "clip_text_model", "num_attention_heads": 12, "num_hidden_layers": 12, "pad_token_id": 1,
    "projection_dim": 768, "vocab_size": 49408,
}  # fmt: skip
OPENCLIP_H = {
    **CLIP_L, "hidden_act": "gelu", "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16,
    "num_hidden_layers": 23, "projection_dim": 512,
}  # fmt: skip
OPENCLIP_G = {
    **CLIP_L, "architectures": ["CLIPTextModelWithProjection"], "hidden_act": "gelu", "hidden_size": 1280,
    "intermediate_size": 5120, "num_attention_heads": 20, "num_hidden_layers": 32, "projection_dim": 1280,
}  # fmt: skip
VAE = {
    "act_fn": "silu", "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4, "in_channels": 3, "latent_channels": 4,
    "layers_per_block": 2, "norm_num_groups": 32, "out_channels": 3, "sample_size": 512,
    "up_block_types": ["UpDecoderBlock2D"] * 4, "scaling_factor": 0.18215,
}  # fmt: skip
VAE_XL = {**VAE, "sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": True}
CROSS_DOWN = ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"]
CROSS_UP = ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3
UNET = {
    "act_fn": "silu", "attention_head_dim": 8, "block_out_channels": [320, 640, 1280, 1280],
    "center_input_sample": False, "cross_attention_dim": 768, "down_block_types": CROSS_DOWN,
    "downsample_padding": 1, "flip_sin_to_cos": True, "freq_shift": 0, "in_channels": 4,
    "layers_per_block": 2, "mid_block_scale_factor": 1, "norm_eps": 1e-05, "norm_num_groups": 32,
    "out_channels": 4, "sample_size": 64, "up_block_types": CROSS_UP,
}  # fmt: skip
UNET_2 = {
    **UNET, "attention_head_dim": [5, 10, 20, 20], "cross_attention_dim": 1024, "use_linear_projection": True,
    "upcast_attention": True, "sample_size": 96,
}  # fmt: skip
UNET_XL = {
    **UNET, "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
    "attention_head_dim": [5, 10, 20], "block_out_channels": [320, 640, 1280], "cross_attention_dim": 2048,
    "sample_size": 128, "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "projection_class_embeddings_input_dim": 2816, "transformer_layers_per_block": [1, 2, 10],
    "use_linear_projection": True,
}  # fmt: skip
UNET_REFINER = {
    **UNET_XL, "attention_head_dim": [6, 12, 24, 24], "block_out_channels": [384, 768, 1536, 1536],
    "cross_attention_dim": 1280,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "projection_class_embeddings_input_dim": 2560, "transformer_layers_per_block": 4,
}  # fmt: skip
UNET_SSD = {
    **UNET_XL, "mid_block_type": "UNetMidBlock2D", "transformer_layers_per_block": [1, [2, 2], [4, 4]],
    "reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], 1],
}  # fmt: skip

PUBLISHED = {
    "sd1.5": Recipe(Family.SD1, UNET, VAE, {"text_encoder": CLIP_L}),
    "sd1.5-inpainting": Recipe(Family.SD1, {**UNET, "in_channels": 9}, VAE, {"text_encoder": CLIP_L}),
    "sd2.1": Recipe(Family.SD2, UNET_2, {**VAE, "sample_size": 768}, {"text_encoder": OPENCLIP_H}),
    "sdxl": Recipe(Family.SDXL, UNET_XL, VAE_XL, {"text_encoder": CLIP_L, "text_encoder_2": OPENCLIP_G}),
    "refiner": Recipe(Family.SDXL_REFINER, UNET_REFINER, VAE_XL, {"text_encoder_2": OPENCLIP_G}),
    "ssd-1b": Recipe(Family.SDXL, UNET_SSD, VAE_XL, {"text_encoder": CLIP_L, "text_encoder_2": OPENCLIP_G}),
}


def assert_says(config: Any, published: dict[str, Any]) -> None:
    assert {key: config[key] for key in published} == published


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_full_size_file_gives_the_published_configs(tmp_path: Path, name: str) -> None:
    recipe = PUBLISHED[name]
    model = make_model(recipe, device="meta")
    file = write_hollow_file(tmp_path / "a name that says nothing.bin", to_original(model))
    checkpoint = open_checkpoint(str(file))
    assert checkpoint.family is recipe.family
    assert checkpoint.prediction == (None if recipe.family is Family.SD2 else Prediction.EPSILON)
    assert_says(checkpoint.components[ComponentName.UNET].config, recipe.unet)
    assert_says(checkpoint.components[ComponentName.VAE_DECODER].config, recipe.vae)
    for part, config in recipe.text.items():
        assert_says(checkpoint.components[ComponentName(part)].config, config)
        tensors = checkpoint.components[ComponentName(part)].tensors
        assert {k: ref.shape for k, ref in tensors.items()} == {k: tuple(v.shape) for k, v in model.text[part].items()}
    unet = checkpoint.components[ComponentName.UNET].tensors
    assert {key: ref.shape for key, ref in unet.items()} == {key: tuple(v.shape) for key, v in model.unet.items()}
    vae = {
        **checkpoint.components[ComponentName.VAE_DECODER].tensors,
        **checkpoint.components[ComponentName.VAE_ENCODER].tensors,
    }
    assert {key: ref.shape for key, ref in vae.items()} == {key: tuple(v.shape) for key, v in model.vae.items()}


def test_a_file_of_sd2_with_its_unused_layer_lost(tmp_path: Path) -> None:
    state = to_original(make_model(PUBLISHED["sd2.1"], device="meta"))
    lost = {key: value for key, value in state.items() if ".resblocks.23." not in key}
    assert len(lost) < len(state)
    checkpoint = open_checkpoint(str(write_hollow_file(tmp_path / "x.safetensors", lost)))
    assert checkpoint.components[ComponentName.TEXT_ENCODER].config["num_hidden_layers"] == 23
