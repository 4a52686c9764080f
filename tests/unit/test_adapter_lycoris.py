"""LoHa, LoKr, LoCon with a middle, full differences and DoRA, against the modules of LyCORIS and PEFT themselves."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from sdopt.adapters.adapter import Adapter, LowRank
from sdopt.adapters.adapter_file import AdapterKind, read_adapter_file
from sdopt.adapters.differences import _low_rank as low_rank
from sdopt.adapters.low_rank import reduce_rank
from sdopt.adapters.merge import weight_changes
from sdopt.adapters.resolve import resolve_adapter
from sdopt.errors import AdapterError
from sdopt.model.family import Family
from tests.adapters import (
    TEXT,
    UNET,
    Deltas,
    Networks,
    deltas_of,
    dotted_name,
    kohya_name,
    make_networks,
    make_pairs,
    read_with_diffusers,
    require_same,
    write_pairs,
    write_state,
)  # fmt: skip

BLOCK = "down_blocks.0.attentions.0"
# A linear layer, a wide one, a convolution of one tap and two of nine.
LAYERS = (
    f"{BLOCK}.transformer_blocks.0.attn1.to_q", f"{BLOCK}.transformer_blocks.0.ff.net.0.proj", f"{BLOCK}.proj_in",
    "down_blocks.0.resnets.0.conv1", "down_blocks.1.resnets.0.conv1",
)  # fmt: skip


@pytest.fixture(scope="module")
def sd1() -> Networks:
    return make_networks(Family.SD1)


def make_modules(networks: Networks, algorithm: str, **options: Any) -> Iterator[tuple[str, Any, nn.Module]]:
    """(layer, LyCORIS' module with random numbers, the layer itself)."""
    from lycoris.modules.full import FullModule
    from lycoris.modules.locon import LoConModule
    from lycoris.modules.loha import LohaModule
    from lycoris.modules.lokr import LokrModule

    kinds = {"locon": LoConModule, "loha": LohaModule, "lokr": LokrModule, "full": FullModule}
    torch.manual_seed(3)
    for layer in LAYERS:
        original = networks.modules[UNET].get_submodule(layer)
        module: Any = kinds[algorithm](layer, original, **options)
        for name, parameter in module.named_parameters():
            if name != "dora_scale":
                parameter.data = torch.randn_like(parameter) * 0.2
            else:
                parameter.data = parameter.data * (1 + 0.3 * torch.rand_like(parameter))
        yield layer, module, original


@torch.no_grad()
def write_modules(path: Path, networks: Networks, algorithm: str, **options: Any) -> tuple[Path, Deltas]:
    """A file as LyCORIS saves it, and the differences that its modules give their layers."""
    state: dict[str, Tensor] = {}
    deltas: dict[str, Tensor] = {}
    for layer, module, original in make_modules(networks, algorithm, **options):
        stem = kohya_name(UNET, layer)
        state |= {f"{stem}.{key}": value for key, value in module.state_dict().items() if key != "scalar"}
        weight = original.weight.detach()
        if algorithm == "full":  # a module that was never applied saves its weight less the layer's
            saved = module.custom_state_dict()
            module = type(module).make_module_from_state_dict(layer, original, saved["diff"], saved.get("diff_b"))
        # get_diff_weight of LoHa and LoKr multiplies by the scale twice; get_weight is what forward adds.
        delta = (
            module.get_weight(weight.shape) if algorithm in ("loha", "lokr") else module.get_diff_weight(1)[0]
        ).detach().reshape(weight.shape)  # fmt: skip
        if options.get("weight_decompose"):
            delta = module.apply_weight_decompose(weight + delta, 1).detach() - weight
        deltas[layer] = delta
    return write_state(path, state, {"ss_network_module": "lycoris.kohya"}), {UNET: deltas}


def changes_of(path: Path, networks: Networks, folder: Path) -> Deltas:
    found: Deltas = {}
    base = networks.write_base(folder)
    for component, tensor, difference in weight_changes(read_adapter_file(path), networks.layers, base):
        assert difference.dtype == np.float32
        found.setdefault(component, {})[tensor.removesuffix(".weight")] = torch.from_numpy(difference)
    return found


def resolve(path: Path, networks: Networks, folder: Path, rank: int | None = None, **options: Any) -> Adapter:
    base = networks.write_base(folder)
    return resolve_adapter(
        read_adapter_file(path), networks.layers, slots=None, rank_limit=rank, base=base, **options
    )  # fmt: skip


CASES: list[tuple[str, dict[str, Any], AdapterKind]] = [
    ("locon", {}, AdapterKind.LOCON),
    ("locon", {"use_tucker": True}, AdapterKind.LOCON),
    ("locon", {"rs_lora": True}, AdapterKind.LOCON),
    ("loha", {}, AdapterKind.LOHA),
    ("loha", {"use_tucker": True}, AdapterKind.LOHA),
    ("lokr", {}, AdapterKind.LOKR),
    ("lokr", {"decompose_both": True, "factor": 16, "lora_dim": 2}, AdapterKind.LOKR),
    ("lokr", {"use_tucker": True, "factor": 4, "lora_dim": 2}, AdapterKind.LOKR),
    ("lokr", {"full_matrix": True}, AdapterKind.LOKR),
    ("full", {}, AdapterKind.FULL),
    ("locon", {"weight_decompose": True}, AdapterKind.DORA),
    ("locon", {"weight_decompose": True, "wd_on_out": False}, AdapterKind.DORA),
    ("loha", {"weight_decompose": True}, AdapterKind.DORA),
    ("lokr", {"weight_decompose": True, "wd_on_out": False}, AdapterKind.DORA),
]


@pytest.mark.parametrize(("algorithm", "options", "kind"), CASES)
def test_lycoris(sd1: Networks, tmp_path: Path, algorithm: str, options: dict[str, Any], kind: AdapterKind) -> None:
    rank = {"lora_dim": 4, "alpha": 3.0} | options
    path, wanted = write_modules(tmp_path / "a.safetensors", sd1, algorithm, **rank)
    file = read_adapter_file(path)
    assert (file.kind, file.writer, file.layer_counts) == (kind, "LyCORIS", {UNET: len(LAYERS)})
    weights = changes_of(path, sd1, tmp_path)[UNET]
    biases = {layer for layer in weights if layer.endswith(".bias")}
    assert bool(biases) == (algorithm == "full")
    require_same({UNET: {layer: weights[layer] for layer in weights.keys() - biases}}, wanted)
    if not biases:
        adapter = resolve(path, sd1, tmp_path)
        require_same(deltas_of(adapter), wanted)
        exact = algorithm == "locon" and kind is not AdapterKind.DORA
        assert (not adapter.fit_errors) == exact


def hadamard_without_scale(arrays: Any, scale: float) -> Any:
    return arrays["hada_w1_a"] @ arrays["hada_w1_b"] * (arrays["hada_w2_a"] @ arrays["hada_w2_b"])


def blocks_the_wrong_way_round(first: Any, second: Any) -> Any:
    return np.einsum("ij,kl->kilj", first, second).reshape(len(first) * len(second), -1)


def middle_the_wrong_way_round(arrays: Any, scale: float) -> Any:
    if "mid" in arrays:
        arrays = arrays | {"mid": arrays["mid"].transpose(1, 0, 2, 3)}
    return low_rank(arrays, scale)


DORA = {"weight_decompose": True}
FAULTS: list[tuple[str, dict[str, Any], str, Any]] = [
    ("locon", {}, "changes.find_scale", lambda *rest: 1.0),
    ("locon", {"use_tucker": True}, "differences._low_rank", middle_the_wrong_way_round),
    ("loha", {}, "differences._hadamard", hadamard_without_scale),
    ("lokr", {}, "differences.np.kron", blocks_the_wrong_way_round),
    ("full", {}, "changes.find_scale", lambda *rest: 1.001),
    ("locon", DORA, "changes.is_by_output", lambda *rest: False),
    ("locon", DORA | {"wd_on_out": False}, "changes.is_by_output", lambda *rest: True),
    ("locon", DORA, "changes.decompose", lambda weight, difference, magnitude, by_output: difference),
]


@pytest.mark.parametrize(("algorithm", "options", "place", "fault"), FAULTS)
def test_a_planted_fault_is_seen(
    sd1: Networks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, algorithm: str, options: dict[str, Any], place: str,
    fault: Any,
) -> None:  # fmt: skip
    path, wanted = write_modules(tmp_path / "a.safetensors", sd1, algorithm, lora_dim=4, alpha=3.0, **options)
    monkeypatch.setattr(f"sdopt.adapters.{place}", fault)

    def compare() -> None:
        found = changes_of(path, sd1, tmp_path)[UNET]
        require_same({UNET: {layer: delta for layer, delta in found.items() if layer in wanted[UNET]}}, wanted)

    # Where shapes do not fit any more, numpy says so first.
    with pytest.raises((AssertionError, ValueError)):
        compare()


def test_norms_and_biases_are_baked_and_have_no_slot(sd1: Networks, tmp_path: Path) -> None:
    from lycoris.modules.norms import NormModule

    layer = "down_blocks.0.resnets.0.norm1"
    module: Any = NormModule(layer, sd1.modules[UNET].get_submodule(layer))
    torch.nn.init.normal_(module.w_norm)
    torch.nn.init.normal_(module.b_norm)
    path, _ = write_modules(tmp_path / "a.safetensors", sd1, "loha", lora_dim=2, alpha=1.0)
    state = load_file(path) | {f"{kohya_name(UNET, layer)}.{key}": value for key, value in module.state_dict().items()}
    path = write_state(path, state)
    assert read_adapter_file(path).kind is AdapterKind.LOHA
    found = changes_of(path, sd1, tmp_path)[UNET]
    assert torch.equal(found[layer], module.w_norm.detach())
    assert torch.equal(found[f"{layer}.bias"], module.b_norm.detach())
    with pytest.raises(AdapterError, match="changes 1 bias or norm, which no slot can hold") as caught:
        resolve(path, sd1, tmp_path)
    assert caught.value.hint == f"merge it into the weights: sdopt convert MODEL --lora {path}"


def test_a_full_difference_beside_a_pair_is_mixed(sd1: Networks, tmp_path: Path) -> None:
    pairs, difference = {}, torch.randn(64, 3) @ torch.randn(3, 64)
    for layer, module, _ in make_modules(sd1, "loha", lora_dim=2, alpha=1.0):
        pairs |= {f"{kohya_name(UNET, layer)}.{key}": value for key, value in module.state_dict().items()}
    layer = "encoder.layers.0.self_attn.q_proj"
    path = write_state(tmp_path / "a.safetensors", pairs | {f"{kohya_name(TEXT, layer)}.diff": difference})
    assert read_adapter_file(path).kind is AdapterKind.MIXED
    adapter = resolve(path, sd1, tmp_path, rank=8)
    assert adapter.layers[TEXT][layer].rank == 3
    require_same({TEXT: deltas_of(adapter)[TEXT]}, {TEXT: {layer: difference}})


def test_dora_of_peft(sd1: Networks, tmp_path: Path) -> None:
    """diffusers reads it for UNets only."""
    pairs = make_pairs(sd1, lambda layer: layer.endswith(("to_q", "to_v", "conv1")))
    path = write_pairs(
        tmp_path / "a.safetensors", pairs, dotted_name, down="lora_A.weight", up="lora_B.weight", alpha=False
    )
    state = load_file(path)
    for component, layers in pairs.items():
        for layer in layers:
            weight = sd1.weight(component, layer)
            magnitude = weight.flatten(1).norm(dim=1)
            magnitude = magnitude if weight.ndim == 2 else magnitude[None, :, None, None]
            state[f"{dotted_name(component, layer)}.lora_magnitude_vector"] = magnitude * 1.5
    path = write_state(path, state)
    assert read_adapter_file(path).kind is AdapterKind.DORA
    wanted = read_with_diffusers(sd1, path)
    require_same(changes_of(path, sd1, tmp_path), wanted)
    require_same(deltas_of(resolve(path, sd1, tmp_path)), wanted)
    with pytest.raises(AdapterError, match="is a DoRA, which depends on the model's weights"):
        resolve_adapter(read_adapter_file(path), sd1.layers, slots=None, rank_limit=None)


@pytest.mark.parametrize(
    ("algorithm", "options"),
    [("loha", {}), ("lokr", {"full_matrix": True}), ("lokr", {"factor": 4}), ("locon", {"weight_decompose": True})],
)
def test_a_change_of_high_rank_is_fitted_with_its_error_or_refused(
    sd1: Networks, tmp_path: Path, algorithm: str, options: dict[str, Any]
) -> None:
    path, wanted = write_modules(tmp_path / "a.safetensors", sd1, algorithm, lora_dim=4, alpha=3.0, **options)
    adapter = resolve(path, sd1, tmp_path, rank=8, error_limit=1.0)
    for layer, delta in wanted[UNET].items():
        pair, error = adapter.layers[UNET][layer], adapter.fit_errors[UNET][layer]
        matrix = delta.flatten(1).double()
        spectrum = torch.linalg.svdvals(matrix)
        best = float(spectrum[8:].square().sum().sqrt() / torch.linalg.norm(matrix))
        made = torch.from_numpy(pair.up.astype(float) @ pair.down.reshape(pair.rank, -1).astype(float))
        assert pair.rank == 8
        assert error == pytest.approx(float(torch.linalg.norm(made - matrix) / torch.linalg.norm(matrix)), rel=1e-3)
        assert error == pytest.approx(best, rel=1e-3)
    with pytest.raises(AdapterError, match=r"at rank 8 its change of unet's .* is off by \d+.\d%") as caught:
        resolve(path, sd1, tmp_path, rank=8)
    assert "sdopt convert MODEL --lora" in caught.value.hint


def test_a_sketch_of_a_large_matrix_is_as_good_as_its_singular_values() -> None:
    generator = np.random.default_rng(0)
    u, _ = np.linalg.qr(generator.standard_normal((700, 600)))
    v, _ = np.linalg.qr(generator.standard_normal((640, 600)))
    spectrum = 1.0 / np.arange(1, 601)
    whole = ((u * spectrum) @ v.T).astype(np.float32)
    up, down, error = reduce_rank(whole, 16)
    best = np.sqrt(np.square(spectrum[16:]).sum() / np.square(spectrum).sum())
    assert (up.shape, down.shape) == ((700, 16), (16, 640))
    assert error == pytest.approx(best, rel=1e-3)
    assert float(np.linalg.norm(whole - up @ down) / np.linalg.norm(whole)) == pytest.approx(error, rel=1e-3)


def test_a_pair_that_changes_nothing_stays_nothing() -> None:
    zeros = np.zeros((6, 2), np.float32)
    up, down, error = reduce_rank(LowRank(zeros.T.copy(), zeros), 4)
    assert (error, float(np.abs(up @ down).max())) == (0.0, 0.0)
