"""FID: how far two sets of pictures are apart as distributions of features, taken for Gaussians.

Heusel et al., "GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium", 2017. The features
here are CLIP's, not those of Inception-v3: Kynkäänniemi et al., "The Role of ImageNet Classes in Fréchet Inception
Distance", 2023, who show that they are less easily fooled. The figures are not those of an FID on Inception, and with
few pictures they are large: compare candidates of one run, nothing else.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

# A covariance of fewer pictures says nothing; of these few, it still depends on how many there are.
LEAST_PICTURES = 10


def compute_frechet_distance(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """|m_a - m_b|² + tr(C_a + C_b - 2 (C_a C_b)^½) of two sets of features, (pictures, width). 0 for equal sets."""
    mean_square = float(((a.mean(axis=0) - b.mean(axis=0)) ** 2).sum())
    centred_a, centred_b = ((x - x.mean(axis=0)) / np.sqrt(len(x) - 1) for x in (a, b))
    # tr((C_a C_b)^½) is the sum of the singular values of X_a X_bᵀ: as many as there are pictures, and no square root
    # of a matrix that has none.
    shared = np.linalg.svd(centred_a @ centred_b.T, compute_uv=False).sum()
    spread = float((centred_a**2).sum() + (centred_b**2).sum() - 2 * shared)
    return max(0.0, mean_square + spread)
