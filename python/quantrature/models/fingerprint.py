"""Short hashes that tell whether saved work belongs to the same model and text."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch

from .linears import LinearWeight

SAMPLES = 1024
"""Number of weights per matrix that are hashed: few enough to hash a 70B model in a second."""


def of_matrices(linears: Iterable[LinearWeight]) -> str:
    """Hash the names, shapes and dtypes of matrices, and evenly spaced weights of each."""
    digest = hashlib.blake2b(digest_size=16)
    for linear in linears:
        weight = linear.weight
        digest.update(f"{linear.name} {tuple(weight.shape)} {weight.dtype};".encode())
        step = max(1, linear.numel // SAMPLES)
        places = torch.arange(0, linear.numel, step, device=weight.device)
        chosen = weight[places // linear.in_features, places % linear.in_features]
        digest.update(chosen.float().cpu().numpy().tobytes())
    return digest.hexdigest()


def of_tokens(windows: torch.Tensor) -> str:
    """Hash the shape of the windows and all token ids."""
    digest = hashlib.blake2b(f"{tuple(windows.shape)};".encode(), digest_size=16)
    digest.update(windows.cpu().to(torch.int64).contiguous().numpy().tobytes())
    return digest.hexdigest()
