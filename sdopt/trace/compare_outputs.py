"""How far an engine's outputs are from torch's, and whether that is within the limits of its graph's type.

Nothing here builds a network: the process that runs engines needs no diffusers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sdopt.bundle.records import OutputParity, ParityRecord
from sdopt.model.component import ComponentSpec, Tolerance
from sdopt.model.precision import DType

# fp16 keeps 11 bits of 24 and a deep network adds the roundings up; SD1.5's UNet is about 3e-3 from fp32.
_FP16_FACTOR = 20.0
# bf16 keeps 8; SD1.5's UNet is 1.2e-2 from fp32. The cosine's distance is half the square of the relative error.
_BF16 = Tolerance(relative_l2=5e-2, cosine_distance=1.25e-3)


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
