"""Quadrature rules on [0, 1]: at which points between original and quantized weights the gradient is evaluated."""

from __future__ import annotations

import numpy as np

from .._C import InvalidArgumentError

RULES = ("gauss", "midpoint", "trapezoid", "left", "right", "paper")


def quadrature(rule: str, nodes: int, caller: str = "quadrature") -> list[tuple[float, float]]:
    """Return the nodes of a quadrature rule as pairs (t, weight); the weights add up to 1.

    Args:
        rule: ``gauss`` (Gauss-Legendre: exact for polynomials up to degree 2 * nodes - 1), ``midpoint``,
            ``trapezoid``, ``left`` and ``right`` (Riemann sums over equal intervals), or ``paper`` (equal weights on
            equally spaced nodes that include both ends: the reading of arXiv 2503.01901 that its Table 3 supports).
        nodes: number of nodes, at least 1; at least 2 for ``trapezoid`` and ``paper``. Each node needs one gradient
            evaluation per sample.
        caller: name of the public function that was called, for messages.

    Raises:
        InvalidArgumentError: for an unknown rule or too few nodes.
    """
    least = 2 if rule in ("trapezoid", "paper") else 1
    if rule not in RULES:
        raise InvalidArgumentError(f"[{caller}] rule must be one of {', '.join(RULES)}: got {rule!r}")
    if nodes < least:
        raise InvalidArgumentError(f"[{caller}] nodes must be at least {least} for rule {rule!r}: got {nodes}")
    steps = np.arange(nodes)
    if rule == "gauss":
        x, w = np.polynomial.legendre.leggauss(nodes)
        t, weights = (x + 1) / 2, w / 2
    elif rule == "midpoint":
        t, weights = (steps + 0.5) / nodes, np.full(nodes, 1 / nodes)
    elif rule == "left":
        t, weights = steps / nodes, np.full(nodes, 1 / nodes)
    elif rule == "right":
        t, weights = (steps + 1) / nodes, np.full(nodes, 1 / nodes)
    else:
        t, weights = steps / (nodes - 1), np.full(nodes, 1 / nodes)
        if rule == "trapezoid":
            weights = np.full(nodes, 1 / (nodes - 1))
            weights[[0, -1]] /= 2
    return list(zip(t.tolist(), weights.tolist(), strict=True))
