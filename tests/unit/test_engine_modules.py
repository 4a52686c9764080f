from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CLIPTextConfig, CLIPTextModel

from sdopt.errors import ShapeError, UsageError
from sdopt.model.component import ComponentName, describe_component
from sdopt.model.family import Family
from sdopt.model.precision import DType
from sdopt.model.shape import Extent, ShapeProfile
from sdopt.networks.modules import build_network
from sdopt.pipeline.batches import run_rows
from sdopt.pipeline.modules.engine_text_encoder import EngineTextEncoder
from sdopt.pipeline.modules.engine_unet import EngineUNet
from sdopt.pipeline.modules.engine_vae import EngineVAE
from tests.reference_session import ReferenceSession

UNET = {"in_channels": 4, "out_channels": 4, "cross_attention_dim": 8, "block_out_channels": [8, 16]}
VAE = {"in_channels": 3, "out_channels": 3, "latent_channels": 4, "block_out_channels": [8, 16]}
ONE = Extent.static(1)
CLIP = {
    "architectures": ["CLIPTextModel"], "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2,
    "intermediate_size": 32, "vocab_size": 50, "max_position_embeddings": 7, "projection_dim": 16,
    "bos_token_id": 48, "eos_token_id": 49, "hidden_act": "quick_gelu",
}  # fmt: skip


class RowByRow(torch.nn.Module):
    """Stands for a UNet: each row's result depends on that row of every input, and on the timestep."""

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, *conditions: torch.Tensor) -> torch.Tensor:
        assert timestep.shape == ()
        sums = [condition.flatten(1).sum(1).view(-1, 1, 1, 1) for condition in conditions]
        return sample * 2 + timestep + sum(sums)


class Rescale(torch.nn.Module):
    """Stands for half of a VAE of factor 2."""

    def __init__(self, factor: float, channels: int) -> None:
        super().__init__()
        self.factor, self.channels = factor, channels

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        scaled = torch.nn.functional.interpolate(value, scale_factor=self.factor)
        return scaled.mean(1, keepdim=True).expand(-1, self.channels, -1, -1)


def make_unet(*, batch: Extent = ONE, dtype: DType = DType.FP32, **config: Any) -> tuple[EngineUNet, ReferenceSession]:
    merged = UNET | config
    spec = describe_component(ComponentName.UNET, merged, Family.SDXL, dtype)
    profile = ShapeProfile(batch, Extent.static(16), Extent.static(16))
    session = ReferenceSession(spec, profile.axis_extents(2), RowByRow())
    return EngineUNet(session, merged, sample_size=8, pixels_per_latent=2), session


def make_vae(*, encoder: bool = True) -> EngineVAE:
    extents = ShapeProfile.static(height_px=16, width_px=32).axis_extents(2)
    spec = describe_component(ComponentName.VAE_DECODER, VAE, Family.SD1, DType.FP32)
    decoder = ReferenceSession(spec, extents, Rescale(2, 3))
    spec = describe_component(ComponentName.VAE_ENCODER, VAE, Family.SD1, DType.FP32)
    return EngineVAE(decoder, ReferenceSession(spec, extents, Rescale(0.5, 8)) if encoder else None, VAE)


@pytest.fixture(scope="module")
def clip() -> tuple[CLIPTextModel, EngineTextEncoder]:
    torch.manual_seed(0)
    network = build_network(ComponentName.TEXT_ENCODER, CLIP).requires_grad_(False)
    norm = network.network.final_layer_norm
    norm.weight.data.uniform_(0.5, 2.0)
    norm.bias.data.normal_()
    spec = describe_component(ComponentName.TEXT_ENCODER, CLIP, Family.SD1, DType.FP32)
    extents = {"batch": Extent(1, 1, 2), "tokens": Extent.static(7)}
    session = ReferenceSession(spec, extents, network)
    return network.network, EngineTextEncoder(session, CLIP, (norm.weight.data, norm.bias.data))


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 11), least=st.integers(1, 3), more=st.integers(0, 4), seed=st.integers(0, 2**31))
def test_any_number_of_rows_equals_each_row_alone(rows: int, least: int, more: int, seed: int) -> None:
    unet, session = make_unet(batch=Extent(least, least, least + more))
    generator = torch.Generator().manual_seed(seed)
    sample = torch.randn(rows, 4, 8, 8, generator=generator)
    states = torch.randn(rows, 77, 8, generator=generator)
    drawn = unet(sample, 7, encoder_hidden_states=states, return_dict=False)[0]
    alone = [RowByRow()(sample[i : i + 1], torch.tensor(7.0), states[i : i + 1]) for i in range(rows)]
    torch.testing.assert_close(drawn, torch.cat(alone))
    assert all(2 * least <= shape[0] <= 2 * (least + more) for shape in session.runs)
    assert len(session.runs) == -(-rows // (2 * (least + more)))


def test_rows_that_do_not_match_are_refused() -> None:
    unet, session = make_unet()
    with pytest.raises(ShapeError, match="encoder_hidden_states has 1 rows, and sample has 2"):
        unet(torch.zeros(2, 4, 8, 8), 1, encoder_hidden_states=torch.zeros(1, 77, 8))
    with pytest.raises(ShapeError, match="0 rows"):
        run_rows(session, {"sample": torch.zeros(0, 4, 8, 8)})


def test_fp16_engine_takes_and_gives_fp32() -> None:
    unet, _ = make_unet(dtype=DType.FP16)
    assert unet.dtype is torch.float32
    drawn = unet(torch.ones(2, 4, 8, 8), torch.tensor(3), encoder_hidden_states=torch.zeros(2, 77, 8)).sample
    assert drawn.dtype is torch.float32
    assert drawn.unique().tolist() == [5.0]


def test_unet_refuses_what_a_graph_cannot_do() -> None:
    unet, _ = make_unet()
    inputs = (torch.zeros(2, 4, 8, 8), 1, torch.zeros(2, 77, 8))
    refused: dict[str, Any] = {
        "class_labels": torch.zeros(2),
        "cross_attention_kwargs": {"scale": 0.5},
        "attention_mask": torch.ones(2, 77),
        "encoder_attention_mask": torch.ones(2, 77),
        "down_block_additional_residuals": (torch.zeros(1),),
        "mid_block_additional_residual": torch.zeros(1),
        "down_intrablock_additional_residuals": (torch.zeros(1),),
        "timestep_cond": torch.zeros(2, 4),
        "added_cond_kwargs": {"image_embeds": torch.zeros(2, 4)},
    }
    for name, value in refused.items():
        with pytest.raises(UsageError, match="no input for"):
            unet(*inputs, **{name: value})
    unet(*inputs, cross_attention_kwargs={}, added_cond_kwargs={})
    with pytest.raises(UsageError, match="one timestep for all rows"):
        unet(inputs[0], torch.tensor([1, 2]), inputs[2])


def test_unet_of_another_size_names_the_size_built_in_pixels() -> None:
    unet, _ = make_unet()
    with pytest.raises(ShapeError, match="a picture of 16x32 px: unet was built for 16x16") as caught:
        unet(torch.zeros(2, 4, 16, 8), 1, torch.zeros(2, 77, 8))
    assert "--size 16x32" in caught.value.hint


def test_the_hint_names_a_size_that_convert_accepts() -> None:
    unet, _ = make_unet()
    for asked, possible in (((17, 30), "16x32"), ((1, 1), "4x4"), ((64, 32), "64x32")):
        with pytest.raises(ShapeError) as caught:
            unet.check_size(*asked)
        assert f"--again FOLDER --size {possible} -o OTHER" in caught.value.hint


def test_a_size_between_profiles_is_refused_and_the_nearest_named() -> None:
    spec = describe_component(ComponentName.UNET, UNET, Family.SD1, DType.FP32)
    profiles = [ShapeProfile.static(width_px=512, height_px=512), ShapeProfile.static(width_px=768, height_px=768)]
    tables = tuple(profile.axis_extents(8) for profile in profiles)
    session = ReferenceSession(spec, ShapeProfile.covering(profiles).axis_extents(8), RowByRow(), tables)
    unet = EngineUNet(session, UNET, sample_size=64, pixels_per_latent=8)
    for side in (64, 96):
        assert unet(torch.zeros(2, 4, side, side), 1, torch.zeros(2, 77, 8)).sample.shape[2:] == (side, side)
    built = r"a picture of 640x512 px: unet was built for 512x512 and 768x768; the nearest is 512x512"
    with pytest.raises(ShapeError, match=built) as caught:
        unet(torch.zeros(2, 4, 64, 80), 1, torch.zeros(2, 77, 8))
    assert "--size 640x512" in caught.value.hint
    inputs = {"sample": torch.zeros(2, 4, 64, 96), "timestep": torch.tensor(1.0),
              "encoder_hidden_states": torch.zeros(2, 77, 8)}  # fmt: skip
    with pytest.raises(ShapeError, match="has latent_width 96; the nearest has latent_width 64"):
        session.run(inputs)


def test_a_size_in_a_range_at_which_skip_connections_do_not_meet_is_refused() -> None:
    spec = describe_component(ComponentName.UNET, UNET, Family.SD1, DType.FP32)
    extents = ShapeProfile(ONE, Extent(16, 16, 64), Extent(16, 16, 64)).axis_extents(2)
    unet = EngineUNet(ReferenceSession(spec, extents, RowByRow()), UNET, sample_size=8, pixels_per_latent=2)
    unet.check_size(20, 64)
    with pytest.raises(ShapeError, match="width of 22 px is not a multiple of 4"):
        unet.check_size(22, 64)
    with pytest.raises(ShapeError, match=r"built for 16x16\.\.64x64"):
        unet.check_size(68, 64)


def test_a_prompt_of_part_of_a_chunk_is_refused() -> None:
    spec = describe_component(ComponentName.UNET, UNET, Family.SD1, DType.FP32)
    profile = ShapeProfile(ONE, Extent.static(16), Extent.static(16), Extent(77, 77, 231))
    session = ReferenceSession(spec, profile.axis_extents(2), RowByRow())
    unet = EngineUNet(session, UNET, sample_size=8, pixels_per_latent=2)
    for tokens in (77, 154, 231):
        unet(torch.zeros(2, 4, 8, 8), 1, torch.zeros(2, tokens, 8))
    with pytest.raises(ShapeError, match="152 tokens, and the engine takes multiples of 77"):
        unet(torch.zeros(2, 4, 8, 8), 1, torch.zeros(2, 152, 8))
    with pytest.raises(ShapeError, match="axis 'prompt_tokens' of encoder_hidden_states is 308"):
        unet(torch.zeros(2, 4, 8, 8), 1, torch.zeros(2, 308, 8))


def test_xl_unet_has_what_the_pipeline_checks_and_needs_its_conditions() -> None:
    config = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 2,
        "projection_class_embeddings_input_dim": 17,
    }
    unet, _ = make_unet(**config)
    assert unet.add_embedding.linear_1.in_features == 17
    conditions = {"text_embeds": torch.ones(2, 5), "time_ids": torch.ones(2, 6)}
    inputs = (torch.zeros(2, 4, 8, 8), 1, torch.zeros(2, 77, 8))
    assert unet(*inputs, added_cond_kwargs=conditions).sample.unique().tolist() == [12.0]
    with pytest.raises(UsageError, match="text_embeds and time_ids"):
        unet(*inputs)


def test_absent_timestep_condition_of_a_distilled_unet_is_zeros() -> None:
    unet, _ = make_unet(time_cond_proj_dim=4)
    inputs = (torch.zeros(1, 4, 8, 8), 1, torch.zeros(1, 77, 8))
    assert unet(*inputs).sample.unique().tolist() == [1.0]
    assert unet(*inputs, timestep_cond=torch.ones(1, 4)).sample.unique().tolist() == [5.0]


def test_config_is_complete_and_reads_both_ways() -> None:
    unet, _ = make_unet(_diffusers_version="0.6.0")
    assert unet.config.sample_size == unet.config["sample_size"] == 8
    assert unet.config.time_cond_proj_dim is None
    assert unet.config._diffusers_version != "0.6.0"
    assert make_vae().config.scaling_factor == 0.18215


def test_modules_stay_where_and_what_they_are(clip: tuple[CLIPTextModel, EngineTextEncoder]) -> None:
    encoder = clip[1]
    assert encoder.to(torch.float16).half().to("cpu", torch.bfloat16) is encoder
    assert next(encoder.parameters()).dtype is torch.float32
    with pytest.raises(UsageError, match="cannot move to cuda"):
        encoder.to("cuda", torch.float16)
    with pytest.raises(UsageError, match="cannot move to meta"):
        encoder.to(device=torch.device("meta"))


def test_parts_of_torch_networks_are_missed_with_a_reason() -> None:
    unet, _ = make_unet()
    assert not hasattr(unet, "enable_freeu")
    with pytest.raises(UsageError, match="EngineUNet has no 'load_lora_adapter'"):
        unet.load_lora_adapter({})


def test_vae_decodes_and_encodes_at_its_size() -> None:
    vae = make_vae()
    latents = torch.randn(3, 4, 8, 16)
    assert vae.decode(latents, return_dict=False)[0].shape == (3, 3, 16, 32)
    assert vae.decode(latents).sample.shape == (3, 3, 16, 32)
    moments = vae.encode(torch.full((2, 3, 16, 32), -60.0)).latent_dist
    assert moments.sample(torch.Generator().manual_seed(0)).shape == (2, 4, 8, 16)
    torch.testing.assert_close(moments.mode(), torch.full((2, 4, 8, 16), -60.0))
    with pytest.raises(ShapeError, match="a picture of 32x32 px: vae_decoder was built for 32x16"):
        vae.decode(torch.zeros(1, 4, 16, 16))
    with pytest.raises(ShapeError, match="a picture of 64x16 px: vae_encoder was built for 32x16"):
        vae.encode(torch.zeros(1, 3, 16, 64))


def test_vae_slices_by_itself_and_does_not_tile() -> None:
    vae = make_vae(encoder=False)
    vae.enable_slicing()
    vae.disable_slicing()
    vae.disable_tiling()
    with pytest.raises(UsageError, match="tiles"):
        vae.enable_tiling()
    with pytest.raises(UsageError, match="no VAE encoder"):
        vae.encode(torch.zeros(1, 3, 16, 32))


def test_text_encoder_gives_what_transformers_gives(clip: tuple[CLIPTextModel, EngineTextEncoder]) -> None:
    torch_model, encoder = clip
    ids = torch.tensor([[48, 3, 4, 49, 0, 0, 0], [48, 5, 49, 0, 0, 0, 0], [48, 7, 8, 9, 9, 1, 49]])
    expected, given = torch_model(ids, output_hidden_states=True), encoder(ids, output_hidden_states=True)
    torch.testing.assert_close(given[0], expected.last_hidden_state)
    torch.testing.assert_close(given.pooler_output, expected.pooler_output)
    assert len(given[-1]) == len(expected.hidden_states) == 4
    for ours, theirs in zip(given.hidden_states[:-1], expected.hidden_states[:-1], strict=True):
        torch.testing.assert_close(ours, theirs)
    final_norm = encoder.text_model.final_layer_norm
    # The last state is known only up to scale and shift, which the final norm takes away.
    torch.testing.assert_close(final_norm(given[-1][-1]), expected.last_hidden_state, atol=1e-4, rtol=1e-4)
    assert encoder(ids).hidden_states is None
    assert isinstance(encoder(ids, return_dict=False), tuple)
    assert isinstance(encoder.config, CLIPTextConfig)


@pytest.mark.parametrize(
    "arguments",
    [{"attention_mask": torch.ones(1, 7)}, {"position_ids": torch.ones(1, 7)}, {"output_attentions": True}],
)
def test_text_encoder_refuses(clip: tuple[CLIPTextModel, EngineTextEncoder], arguments: Mapping[str, Any]) -> None:
    with pytest.raises(UsageError, match="no input for"):
        clip[1](torch.zeros(1, 7, dtype=torch.int64), **arguments)


def test_long_prompt_embeddings_are_refused_by_name(clip: tuple[CLIPTextModel, EngineTextEncoder]) -> None:
    with pytest.raises(ShapeError, match="axis 'tokens' of input_ids is 10"):
        clip[1](torch.zeros(1, 10, dtype=torch.int64))


def test_chunks_are_encoded_each_by_itself(clip: tuple[CLIPTextModel, EngineTextEncoder]) -> None:
    encoder = clip[1]
    ids = torch.tensor([[48, 3, 4, 49, 0, 0, 0, 48, 5, 49, 0, 0, 0, 0], [48, 7, 8, 9, 9, 1, 49, 48, 49, 0, 0, 0, 0, 0]])
    given = encoder(ids, output_hidden_states=True)
    chunks = [encoder(part, output_hidden_states=True) for part in ids.split(7, dim=1)]
    torch.testing.assert_close(given.last_hidden_state, torch.cat([part.last_hidden_state for part in chunks], dim=1))
    torch.testing.assert_close(given.pooler_output, chunks[0].pooler_output)
    for layer, state in enumerate(given.hidden_states):
        torch.testing.assert_close(state, torch.cat([part.hidden_states[layer] for part in chunks], dim=1))
