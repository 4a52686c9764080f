"""Every form in which LoRAs are written gives the differences that diffusers and PEFT make of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from sdopt.adapters.adapter import Adapter
from sdopt.adapters.adapter_file import AdapterKind, read_adapter_file
from sdopt.adapters.metadata import PeftSettings
from sdopt.adapters.resolve import resolve_adapter
from sdopt.errors import AdapterError
from sdopt.model.component import ComponentName
from sdopt.model.family import Family
from tests.adapters import (
    TEXT,
    TEXT_2,
    UNET,
    Deltas,
    Networks,
    Pairs,
    deltas_of,
    dotted_name,
    is_attention,
    is_transformer,
    kohya_name,
    make_networks,
    make_pairs,
    read_with_diffusers,
    require_same,
    write_pairs,
    write_state,
)  # fmt: skip


@pytest.fixture(scope="module")
def sd1() -> Networks:
    return make_networks(Family.SD1)


@pytest.fixture(scope="module")
def xl() -> Networks:
    return make_networks(Family.SDXL)


def resolve(path: Path, networks: Networks) -> Adapter:
    return resolve_adapter(read_adapter_file(path), networks.layers, slots=networks.layers, rank_limit=64)


def wanted_of(pairs: Pairs, scale: float | None = None) -> Deltas:
    return {
        component: {name: pair.delta(scale) for name, pair in layers.items()} for component, layers in pairs.items()
    }


def only(pairs: Pairs, *components: ComponentName) -> Pairs:
    return {component: layers for component, layers in pairs.items() if component in components}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_kohya_with_a_text_encoder(sd1: Networks, tmp_path: Path, dtype: torch.dtype) -> None:
    pairs = make_pairs(sd1, is_transformer)
    path = write_pairs(tmp_path / "a.safetensors", pairs, kohya_name, dtype=dtype)
    file = read_adapter_file(path)
    assert (file.kind, file.ranks) == (AdapterKind.LORA, (4, 5))
    assert file.layer_counts == {name: len(pairs[name]) for name in (TEXT, UNET)}
    adapter = resolve(path, sd1)
    require_same(deltas_of(adapter), read_with_diffusers(sd1, path))
    if dtype is torch.float32:
        require_same(deltas_of(adapter), wanted_of(pairs))
    shapes = {(pair.down.dtype.name, pair.up.ndim) for layers in adapter.layers.values() for pair in layers.values()}
    assert shapes == {("float32", 2)}
    assert not adapter.fit_errors


def test_without_alpha_the_scale_is_one(sd1: Networks, tmp_path: Path) -> None:
    pairs = make_pairs(sd1, is_attention)
    path = write_pairs(tmp_path / "a.safetensors", pairs, kohya_name, alpha=False)
    require_same(deltas_of(resolve(path, sd1)), wanted_of(pairs, 1.0))
    require_same(deltas_of(resolve(path, sd1)), read_with_diffusers(sd1, path))


def test_locon_with_convolutions_of_every_kind(sd1: Networks, tmp_path: Path) -> None:
    pairs = only(make_pairs(sd1, lambda layer: True), UNET)
    pairs[UNET] = {layer: pair for layer, pair in pairs[UNET].items() if "time_embedding" not in layer}
    path = write_pairs(tmp_path / "a.safetensors", pairs, kohya_name)
    assert read_adapter_file(path).kind is AdapterKind.LOCON
    adapter = resolve(path, sd1)
    require_same(deltas_of(adapter), read_with_diffusers(sd1, path))
    kernels = {pair.down.shape[2:] for pair in adapter.layers[UNET].values()}
    assert kernels == {(), (1, 1), (3, 3)}


def test_a_convolution_in_the_file_may_be_a_matrix_in_the_model(sd1: Networks, xl: Networks, tmp_path: Path) -> None:
    """Trainers of SD 1.5 wrote proj_in both ways; what counts is the matrix."""
    for networks, other in ((sd1, 2), (xl, 4)):
        pairs = only(make_pairs(networks, lambda layer: layer.endswith("proj_in")), UNET)
        state = {}
        for layer, pair in pairs[UNET].items():
            stem = kohya_name(UNET, layer)
            down, up = pair.down.flatten(1), pair.up.flatten(1)
            state[f"{stem}.lora_down.weight"] = down if other == 2 else down[:, :, None, None]
            state[f"{stem}.lora_up.weight"] = up if other == 2 else up[:, :, None, None]
        path = write_state(tmp_path / f"{other}.safetensors", state)
        require_same(deltas_of(resolve(path, networks)), wanted_of(pairs, 1.0))


@pytest.mark.parametrize("blocks", ["original", "diffusers"])
def test_kohya_for_sdxl(xl: Networks, tmp_path: Path, blocks: str) -> None:
    def name(component: ComponentName, layer: str) -> str:
        renamed = xl.original_name(layer) if component is UNET and blocks == "original" else layer
        return kohya_name(component, renamed, xl=True)

    pairs = make_pairs(xl, lambda layer: is_transformer(layer) or ".resnets." in layer or "samplers" in layer)
    path = write_pairs(tmp_path / "a.safetensors", pairs, name)
    file = read_adapter_file(path)
    assert set(file.layer_counts) == {UNET, TEXT, TEXT_2}
    assert file.family is Family.SDXL
    adapter = resolve(path, xl)
    require_same(deltas_of(adapter), wanted_of(pairs))
    require_same(deltas_of(adapter), read_with_diffusers(xl, path))


def test_every_layer_by_the_original_names(sd1: Networks, xl: Networks, tmp_path: Path) -> None:
    for networks in (sd1, xl):
        pairs = only(make_pairs(networks, lambda layer: True), UNET)
        embedding = [layer for layer in networks.layers[UNET] if "embedding.linear" in layer or "conv_in" in layer]
        assert len(embedding) >= 3
        path = write_pairs(
            tmp_path / "a.safetensors", pairs,
            lambda component, layer, networks=networks: f"lora_unet_{networks.original_name(layer).replace('.', '_')}",
        )  # fmt: skip
        require_same(deltas_of(resolve(path, networks)), wanted_of(pairs))


def test_comfyui_names_its_own_model(sd1: Networks, tmp_path: Path) -> None:
    def name(component: ComponentName, layer: str) -> str:
        return (
            f"diffusion_model.{sd1.original_name(layer)}" if component is UNET
            else f"text_encoders.clip_l.transformer.text_model.{layer}"
        )  # fmt: skip

    pairs = make_pairs(sd1, is_attention)
    path = write_pairs(tmp_path / "a.safetensors", pairs, name)
    assert read_adapter_file(path).writer == "ComfyUI"
    require_same(deltas_of(resolve(path, sd1)), wanted_of(pairs))


def test_peft_in_diffusers(sd1: Networks, xl: Networks, tmp_path: Path) -> None:
    for networks in (sd1, xl):
        pairs = make_pairs(networks, is_attention)
        path = write_pairs(
            tmp_path / "a.safetensors", pairs, dotted_name, down="lora_A.weight", up="lora_B.weight", alpha=False
        )
        adapter = resolve(path, networks)
        require_same(deltas_of(adapter), wanted_of(pairs, 1.0))
        require_same(deltas_of(adapter), read_with_diffusers(networks, path))


def peft_metadata(**settings: object) -> dict[str, str]:
    """As diffusers writes it. PEFT warns of a pattern that matches no layer, so it is the UNet's alone."""
    own = {"r": 4, "peft_type": "LORA", "target_modules": ["to_q", "to_v", "q_proj"], **settings}
    table = {f"{prefix}.{key}": value for prefix in ("unet", "text_encoder") for key, value in own.items()}
    table["text_encoder.alpha_pattern"] = {}
    return {"format": "pt", "lora_adapter_metadata": json.dumps(table)}


def test_planted_faults_in_the_scale_of_peft_are_seen(
    sd1: Networks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = only(make_pairs(sd1, lambda layer: layer.endswith("to_q")), UNET)
    for settings, fault in (
        ({"lora_alpha": 8, "use_rslora": True}, PeftSettings(8.0)),
        ({"lora_alpha": 8, "alpha_pattern": {"attn1.to_q": 3}}, PeftSettings(8.0)),
        ({"lora_alpha": 8}, PeftSettings(4.0)),
    ):
        path = write_pairs(
            tmp_path / "a.safetensors", pairs, dotted_name, down="lora_A.weight", up="lora_B.weight", alpha=False,
            metadata=peft_metadata(**settings),
        )  # fmt: skip
        right = deltas_of(resolve(path, sd1))
        with monkeypatch.context() as patch:
            patch.setattr("sdopt.adapters.adapter_file.read_peft_settings", lambda *rest, fault=fault: {"unet": fault})
            with pytest.raises(AssertionError):
                require_same(deltas_of(resolve(path, sd1)), right)


@pytest.mark.parametrize(
    "settings",
    [{"lora_alpha": 8}, {"lora_alpha": 8, "use_rslora": True}, {"lora_alpha": 8, "alpha_pattern": {"attn1.to_q": 3}}],
)
def test_peft_with_metadata(sd1: Networks, tmp_path: Path, settings: dict[str, object]) -> None:
    pairs = make_pairs(sd1, lambda layer: layer.endswith(("to_q", "to_v", "q_proj")))
    pairs = {
        component: {
            layer: type(pair)(pair.down[:4], pair.up[:, :4], pair.alpha) for layer, pair in layers.items()
        } for component, layers in pairs.items()
    }  # fmt: skip
    path = write_pairs(
        tmp_path / "a.safetensors", pairs, dotted_name, down="lora_A.weight", up="lora_B.weight", alpha=False,
        metadata=peft_metadata(**settings),
    )  # fmt: skip
    require_same(deltas_of(resolve(path, sd1)), read_with_diffusers(sd1, path))


def test_bare_peft_takes_its_alpha_from_the_file_beside_it(sd1: Networks, tmp_path: Path) -> None:
    pairs = only(make_pairs(sd1, is_attention), UNET)
    write_pairs(
        tmp_path / "adapter_model.safetensors", pairs, lambda component, layer: f"base_model.model.{layer}",
        down="lora_A.weight", up="lora_B.weight", alpha=False,
    )  # fmt: skip
    require_same(deltas_of(resolve(tmp_path, sd1)), wanted_of(pairs, 1.0))
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 2, "peft_type": "LORA"}))
    require_same(deltas_of(resolve(tmp_path, sd1)), wanted_of(pairs))
    assert read_adapter_file(tmp_path).writer == "PEFT"


def test_bare_peft_of_a_text_encoder(sd1: Networks, tmp_path: Path) -> None:
    pairs = only(make_pairs(sd1, is_attention), TEXT)
    path = write_pairs(
        tmp_path / "a.safetensors", pairs, lambda component, layer: f"base_model.model.text_model.{layer}",
        down="lora_A.default.weight", up="lora_B.default.weight", alpha=False,
    )  # fmt: skip
    require_same(deltas_of(resolve(path, sd1)), wanted_of(pairs, 1.0))


def test_diffusers_of_2023(sd1: Networks, tmp_path: Path) -> None:
    """Attention processors with names of their own, with and without `unet.`; and text encoders named alike."""

    def unet_name(component: ComponentName, layer: str) -> str:
        block, _, last = layer.removesuffix(".0").rpartition(".")
        return f"unet.{block}.processor.{last}_lora"

    pairs = make_pairs(sd1, is_attention)
    path = write_pairs(
        tmp_path / "a.safetensors", only(pairs, UNET), unet_name, down="down.weight", up="up.weight", alpha=False
    )
    assert read_adapter_file(path).writer == "diffusers of 2023"
    require_same(deltas_of(resolve(path, sd1)), wanted_of(only(pairs, UNET), 1.0))
    require_same(deltas_of(resolve(path, sd1)), read_with_diffusers(sd1, path))

    def text_name(component: ComponentName, layer: str) -> str:
        block, _, last = layer.rpartition(".")
        old = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}[last]
        return f"text_encoder.text_model.{block}.{old}_lora"

    path = write_pairs(
        tmp_path / "t.safetensors", only(pairs, TEXT), text_name, down="down.weight", up="up.weight", alpha=False
    )
    require_same(deltas_of(resolve(path, sd1)), wanted_of(only(pairs, TEXT), 1.0))


def test_diffusers_before_peft(sd1: Networks, tmp_path: Path) -> None:
    pairs = make_pairs(sd1, is_attention)
    for component, (down, up) in {
        UNET: ("lora.down.weight", "lora.up.weight"),
        TEXT: ("lora_linear_layer.down.weight", "lora_linear_layer.up.weight"),
    }.items():
        path = write_pairs(
            tmp_path / "a.safetensors", only(pairs, component), dotted_name, down=down, up=up, alpha=False
        )
        require_same(deltas_of(resolve(path, sd1)), wanted_of(only(pairs, component), 1.0))
        require_same(deltas_of(resolve(path, sd1)), read_with_diffusers(sd1, path))


@pytest.mark.parametrize("dot", ["_", "."])
def test_onetrainer_with_an_embedding_in_the_file(xl: Networks, tmp_path: Path, dot: str) -> None:
    def name(component: ComponentName, layer: str) -> str:
        plain = kohya_name(component, layer, xl=True)
        start = plain.split("_")[0] + "_" + plain.split("_")[1]
        return f"{start}{dot}{plain.removeprefix(start)[1:]}"

    pairs = make_pairs(xl, is_attention)
    path = write_pairs(tmp_path / "a.safetensors", pairs, name, metadata={"ot_branch": "master"})
    state = {f"bundle_emb.glowfish.clip_{which}": torch.zeros(2, 64) for which in "lg"}
    from safetensors.torch import load_file

    path = write_state(path, load_file(path) | state, {"ot_branch": "master"})
    file = read_adapter_file(path)
    assert (file.writer, file.embeddings) == ("OneTrainer", ("glowfish",))
    require_same(deltas_of(resolve(path, xl)), wanted_of(pairs))


def test_planted_faults_are_seen(sd1: Networks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison itself: an alpha that is ignored, a rank taken for its root, a layer taken for another."""
    pairs = make_pairs(sd1, is_attention)
    path = write_pairs(tmp_path / "a.safetensors", pairs, kohya_name)
    right = read_with_diffusers(sd1, path)
    with monkeypatch.context() as patch:
        patch.setattr("sdopt.adapters.changes.find_scale", lambda *rest: 1.0)
        with pytest.raises(AssertionError):
            require_same(deltas_of(resolve(path, sd1)), right)
    found = deltas_of(resolve(path, sd1))
    first, second, *_ = (layer for layer in found[UNET] if layer.endswith(("attn1.to_k", "attn1.to_v")))
    found[UNET][first], found[UNET][second] = found[UNET][second], found[UNET][first]
    with pytest.raises(AssertionError):
        require_same(found, right)
    found = deltas_of(resolve(path, sd1))
    found[UNET][first] = found[UNET][first] * 1.00001
    with pytest.raises(AssertionError, match="e-05"):
        require_same(found, right)
    with pytest.raises(AdapterError):
        resolve(write_pairs(tmp_path / "b.safetensors", pairs, lambda c, layer: f"lora_unet_x_{layer}"), sd1)
