"""Is the graph still the network? Seeded inputs, torch fp32's outputs, and how far an engine is from them.

The reference runs on the checkpoint's own tensors, not on the bundle's copy, so a damaged copy is found too. The
engine's side is not here: exports know no runtime.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from accelerate import init_empty_weights
from safetensors.torch import save_file
from torch import Tensor, nn

from sdopt.bundle.records import OutputParity, ParityRecord
from sdopt.model.component import ComponentName, ComponentSpec, Config, TensorSpec, Tolerance
from sdopt.model.precision import DType
from sdopt.model.shape import Extent
from sdopt.networks.modules import build_network, default_dtype
from sdopt.weights.safetensors_header import TensorRef
from sdopt.weights.to_torch import TORCH_DTYPES, load_weights

# fp16 keeps 11 bits of 24 and a deep network adds the roundings up; SD1.5's UNet is about 3e-3 from fp32.
_FP16_FACTOR = 20.0
# bf16 keeps 8; SD1.5's UNet is 1.2e-2 from fp32. The cosine's distance is half the square of the relative error.
_BF16 = Tolerance(relative_l2=5e-2, cosine_distance=1.25e-3)
_TIMESTEP = 601.0


def make_inputs(spec: ComponentSpec, config: Config, extents: Mapping[str, Extent]) -> dict[str, Tensor]:
    """Seeded inputs of the magnitudes that a network sees in use, in the graph's dtypes and usual shapes."""
    generator = torch.Generator().manual_seed(zlib.crc32(spec.name.encode()))
    return {tensor.name: _make_input(spec, tensor, config, extents, generator) for tensor in spec.inputs}


def _make_input(
    spec: ComponentSpec, tensor: TensorSpec, config: Config, extents: Mapping[str, Extent], generator: torch.Generator
) -> Tensor:
    shape, dtype = tensor.shape(extents), TORCH_DTYPES[tensor.dtype]
    match tensor.name:
        case "input_ids":
            ids = torch.randint(0, int(config["vocab_size"]) - 2, shape, generator=generator)
            # CLIP pools at the end token: each row has one, at a place of its own.
            ends = torch.randint(2, shape[1], (shape[0],), generator=generator)
            end = int(config["vocab_size"]) - 1
            return torch.where(torch.arange(shape[1]) >= ends[:, None], end, ids)
        case "timestep":
            return torch.full(shape, _TIMESTEP, dtype=dtype)
        case "time_ids":
            height, width = float(extents["height"].opt), float(extents["width"].opt)
            row = torch.tensor([height, width, 0.0, 0.0, height, width])[: shape[1]]
            return row.expand(shape).to(dtype).contiguous()
        case "latent_sample":
            return (torch.randn(shape, generator=generator) / float(config.get("scaling_factor") or 1.0)).to(dtype)
        case "sample" if spec.name is ComponentName.VAE_ENCODER:
            return (torch.rand(shape, generator=generator) * 2 - 1).to(dtype)
        case _:
            return torch.randn(shape, generator=generator).to(dtype)


def load_reference(spec: ComponentSpec, config: Config, tensors: Mapping[str, TensorRef]) -> nn.Module:
    """The network in torch, in fp32, with the checkpoint's weights."""
    with default_dtype(torch.float32), init_empty_weights(include_buffers=False):
        network = build_network(spec.name, config)
    load_weights(network, tensors, torch.float32)
    return network


def run_reference(network: nn.Module, spec: ComponentSpec, inputs: Mapping[str, Tensor], outputs: Path) -> None:
    """Run a network of `load_reference` and save what it gives, by output name, as a safetensors file."""
    arguments = [value.float() if value.is_floating_point() else value for value in inputs.values()]
    with torch.inference_mode():
        results = network(*arguments)
    named = zip(spec.outputs, results if isinstance(results, tuple) else (results,), strict=True)
    save_file({tensor.name: result.contiguous().clone() for tensor, result in named}, outputs)


def compare_outputs(
    spec: ComponentSpec,
    reference: Mapping[str, Tensor],
    engine: Mapping[str, Tensor],
    *,
    runtime: str,
    graph_dtype: DType,
) -> ParityRecord:
    """Compare every output. NaN or infinity in the engine's fails, whatever the reference has there."""
    limit = _find_limit(spec, graph_dtype)
    outputs = tuple(_compare(tensor.name, reference[tensor.name], engine[tensor.name]) for tensor in spec.outputs)
    return ParityRecord(
        passed=all(_within(output, limit) for output in outputs),
        runtime=runtime,
        outputs=outputs,
        relative_l2_limit=limit.relative_l2,
        cosine_distance_limit=limit.cosine_distance,
    )


def _find_limit(spec: ComponentSpec, graph_dtype: DType) -> Tolerance:
    match graph_dtype:
        case DType.FP16:
            return spec.tolerance.scaled(_FP16_FACTOR)
        case DType.BF16:
            return _BF16
    return spec.tolerance


def worst_of(records: Sequence[ParityRecord]) -> ParityRecord:
    """One record of comparisons of the same component at several sizes: each output where it differs most."""
    by_output = zip(*(record.outputs for record in records), strict=True)
    return records[0].model_copy(
        update={
            "passed": all(record.passed for record in records),
            "outputs": tuple(max(outputs, key=lambda output: output.relative_l2) for outputs in by_output),
            "points": len(records),
        }
    )


def _within(output: OutputParity, limit: Tolerance) -> bool:
    # A NaN compares false with everything, so it is never within.
    return output.relative_l2 <= limit.relative_l2 and output.cosine_distance <= limit.cosine_distance


_WORST = 1e30


def _compare(name: str, reference: Tensor, engine: Tensor) -> OutputParity:
    if reference.shape != engine.shape or not bool(torch.isfinite(engine).all()):
        # JSON knows no infinity; this is larger than any limit.
        return OutputParity(name=name, max_abs=_WORST, relative_l2=_WORST, cosine_distance=_WORST)
    expected, actual = reference.double().flatten(), engine.double().flatten()
    norm = expected.norm().item()
    distance = (expected - actual).norm().item()
    cosine = torch.nn.functional.cosine_similarity(expected, actual, dim=0, eps=1e-30).item()
    return OutputParity(
        name=name,
        max_abs=(expected - actual).abs().max().item(),
        relative_l2=distance / norm if norm else (0.0 if not distance else _WORST),
        cosine_distance=max(0.0, 1.0 - cosine) if norm else 0.0,
    )
