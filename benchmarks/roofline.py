"""How much arithmetic a network is, and how much a GPU could do at most.

FLOPs are 2 x multiply-accumulates of convolutions, matrix products and attention, counted by torch on shapes alone.
"""

from __future__ import annotations

from sdopt.backends.protocol import ComponentFiles

# Dense tensor-core fp16 with fp32 accumulation, in FLOP/s, from NVIDIA's data sheets and architecture white papers;
# where a sheet gives the figure with sparsity, half of it. The first whose words are all in the GPU's name is taken.
_PEAKS: tuple[tuple[tuple[str, ...], float], ...] = (
    (("B200",), 2250e12),
    (("H200", "NVL"), 835.5e12),
    (("H200",), 989.5e12),
    (("H100", "NVL"), 835.5e12),
    (("H100", "PCIe"), 756e12),
    (("H100",), 989.5e12),
    (("A100",), 312e12),
    (("L40S",), 362e12),
    (("L4",), 121e12),
    (("A10",), 125e12),
    (("T4",), 65e12),
    (("RTX 5090",), 209.5e12),
    (("RTX 4090",), 165.2e12),
    (("RTX 3090",), 71e12),
)


def find_peak_flops(gpu: str) -> float | None:
    """Peak FLOP/s in fp16 by the GPU's name, or None for one that the table does not have."""
    parts = gpu.replace("-", " ").split()

    def names(word: str) -> bool:
        return word in gpu if " " in word else word in parts

    return next((peak for words, peak in _PEAKS if all(map(names, words))), None)


def count_flops(files: ComponentFiles) -> int:
    """FLOPs of one run of a component at its usual shapes. Nothing is computed and no weight is read."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from sdopt.networks.modules import build_network
    from sdopt.networks.tensors import TORCH_DTYPES

    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        network = build_network(files.name, files.config)
        # fp32 throughout: the network is built in it, and the count does not depend on the type.
        dtypes = [torch.float32 if t.dtype.is_float else TORCH_DTYPES[t.dtype] for t in files.spec.inputs]
        shapes = [tensor.shape(files.extents) for tensor in files.spec.inputs]
        network(*(torch.empty(shape, dtype=dtype) for shape, dtype in zip(shapes, dtypes, strict=True)))
    return int(counter.get_total_flops())
