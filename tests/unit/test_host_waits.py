"""Does anything in the denoising loop need a value that is on the GPU? Then the host waits there, in every step.

The device `meta` has shapes and no values: whatever would read one fails on it. Copies to a device do not show here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

from sdopt.backends.protocol import check_inputs
from sdopt.model.component import ComponentName, ComponentSpec, describe_component
from sdopt.model.family import Family, Prediction
from sdopt.model.precision import DType
from sdopt.model.samplers import SAMPLERS, SchedulerName
from sdopt.model.shape import Extent, ShapeProfile
from sdopt.pipeline.modules.engine_text_encoder import EngineTextEncoder
from sdopt.pipeline.modules.engine_unet import EngineUNet
from sdopt.pipeline.modules.engine_vae import EngineVAE
from sdopt.pipeline.schedulers import make_scheduler
from sdopt.weights.to_torch import TORCH_DTYPES

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")

META = torch.device("meta")
UNET = {"in_channels": 4, "out_channels": 4, "cross_attention_dim": 8, "block_out_channels": [8, 16]}
XL = {
    "addition_embed_type": "text_time", "addition_time_embed_dim": 2, "projection_class_embeddings_input_dim": 17,
}  # fmt: skip
VAE = {"in_channels": 3, "out_channels": 3, "latent_channels": 4, "block_out_channels": [8, 16]}
CLIP = {
    "architectures": ["CLIPTextModel"], "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 16, "vocab_size": 50, "projection_dim": 8,
}  # fmt: skip


class FarSession:
    """A session whose tensors are on `meta`. `inputs` are those of its last run."""

    device = META

    def __init__(self, spec: ComponentSpec, extents: Mapping[str, Extent]) -> None:
        self.spec, self.extents, self.profiles = spec, extents, (extents,)
        self.inputs: dict[str, torch.Tensor] = {}

    def run(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        check_inputs(self.spec, self.extents, inputs)
        for tensor in self.spec.inputs:
            assert inputs[tensor.name].device == META
            assert inputs[tensor.name].dtype is TORCH_DTYPES[tensor.dtype]
        self.inputs = dict(inputs)
        return {
            t.name: torch.empty(t.shape(self.extents), dtype=TORCH_DTYPES[t.dtype], device=META)
            for t in self.spec.outputs
        }


def far(name: ComponentName, config: Mapping[str, Any], family: Family) -> Any:
    extents = ShapeProfile.static(height_px=32, width_px=32).axis_extents(2)
    return FarSession(describe_component(name, config, family, DType.FP16), extents)


def make_far_pipeline(family: Family) -> Any:
    config = UNET | (XL if family.is_xl else {})
    unet = EngineUNet(far(ComponentName.UNET, config, family), config, sample_size=16, pixels_per_latent=2)
    vae = EngineVAE(far(ComponentName.VAE_DECODER, VAE, family), None, VAE)
    parts: dict[str, Any] = {"vae": vae, "unet": unet, "text_encoder": None, "tokenizer": None, "scheduler": None}
    if family.is_xl:
        parts |= {"text_encoder_2": None, "tokenizer_2": None, "add_watermarker": False}
        pipeline = StableDiffusionXLPipeline(**parts)
    else:
        parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        pipeline = StableDiffusionPipeline(**parts)
    pipeline.set_progress_bar_config(disable=True)
    # A tensor on `meta` has no values to look at.
    pipeline.vae.refuses_nonfinite = False
    return pipeline


@pytest.mark.parametrize("family", [Family.SD1, Family.SDXL])
@pytest.mark.parametrize("name", [*SAMPLERS, SchedulerName.EULER_KARRAS, SchedulerName.HEUN_KARRAS])
def test_no_step_reads_a_value_of_the_device(name: SchedulerName, family: Family) -> None:
    pipeline = make_far_pipeline(family)
    pipeline.scheduler = make_scheduler(name, {}, family=family, prediction=Prediction.EPSILON)
    states = torch.zeros(1, 77, 8, device=META)
    prompts = {"prompt_embeds": states, "negative_prompt_embeds": states}
    if family.is_xl:
        pooled = torch.zeros(1, 5, device=META)
        prompts |= {"pooled_prompt_embeds": pooled, "negative_pooled_prompt_embeds": pooled}
    latents = pipeline(
        num_inference_steps=6, generator=torch.Generator().manual_seed(0), output_type="latent", height=32, width=32,
        **prompts,
    ).images  # fmt: skip
    assert pipeline.device == latents.device == META
    assert latents.shape == (1, 4, 16, 16)
    assert latents.dtype is torch.float32
    assert pipeline.unet.session.inputs["timestep"].shape == ()


def test_modules_report_and_keep_the_device_of_their_engine() -> None:
    pipeline = make_far_pipeline(Family.SD1)
    assert pipeline.unet.device == pipeline.vae.device == META
    assert pipeline.unet.to("meta", torch.float16) is pipeline.unet
    assert pipeline.vae.decode(torch.zeros(1, 4, 16, 16)).sample.dtype is torch.float32
    norm = (torch.ones(8), torch.zeros(8))
    extents = ShapeProfile.static(height_px=32, width_px=32).axis_extents(2)
    spec = describe_component(ComponentName.TEXT_ENCODER, CLIP, Family.SD1, DType.FP16)
    encoder = EngineTextEncoder(FarSession(spec, extents), CLIP, norm)  # type: ignore[arg-type]
    output = encoder(torch.zeros(1, 77, dtype=torch.int64), output_hidden_states=True)
    assert output.hidden_states[-1].device == META
    assert encoder.text_model.final_layer_norm(output.hidden_states[-1]).device == META
