"""How much a GPU could do at most, by NVIDIA's word. What it does, `sdopt bench` measures."""

from __future__ import annotations

# FLOP/s of the tensor cores in fp16 on dense matrices, summed in fp32. GeForce cards are twice as fast where they sum
# in fp16, and a kernel that does may pass this peak there; an A100 is as fast either way. Each row names NVIDIA's
# document with its figure; "sparse" marks one that is given for sparse matrices, of which this is half, and * one that
# does not say in what is summed. The first row whose words are all in the GPU's name is taken.
_PEAKS: tuple[tuple[tuple[str, ...], float], ...] = (
    (("B200",), 2250e12),  # Blackwell Architecture Technical Brief, HGX B200*
    (("H200", "NVL"), 835.5e12),  # H200 data sheet, 1,671 sparse*
    (("H200",), 989.5e12),  # H200 data sheet, 1,979 sparse*
    (("H100", "NVL"), 835.5e12),  # H100 data sheet, 1,671 sparse*
    (("H100", "PCIe"), 756e12),  # H100 Tensor Core GPU Architecture, table 3
    (("H100",), 989.4e12),  # the same, H100 SXM5
    (("A100",), 312e12),  # A100 Tensor Core GPU Architecture, comparison with V100
    (("L40S",), 362.05e12),  # L40S data sheet*
    (("L4",), 121e12),  # L4 data sheet, 242 sparse*
    (("A10",), 125e12),  # A10 data sheet*
    (("T4",), 65e12),  # T4 data sheet, "mixed precision (FP16/FP32)"
    (("RTX 5090",), 209.5e12),  # RTX Blackwell GPU Architecture, table 3
    (("RTX 4090",), 165.2e12),  # Ada GPU Architecture, appendix A, table 2; 330.3 summed in fp16
    (("RTX 3090",), 71e12),  # Ampere GA102 GPU Architecture, appendix A, table 9
)
# Other chips of the same number, and slices of one.
_OTHERS = frozenset({"Laptop", "Ti", "D", "MIG"})


def find_peak_flops(gpu: str) -> float | None:
    """Peak FLOP/s in fp16 by the GPU's name, or None for one that the table does not have."""
    parts = gpu.replace("-", " ").split()

    def names(word: str) -> bool:
        return word in gpu if " " in word else word in parts

    if _OTHERS.intersection(parts):
        return None
    return next((peak for words, peak in _PEAKS if all(map(names, words))), None)
