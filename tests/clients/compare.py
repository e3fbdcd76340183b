"""Compare what a client computed with what prepare.py expects; used by the scripts of all clients."""

import sys

import numpy as np

LOGITS = 1e-4
"""Largest difference of logits: sums of float32 in another order."""


def compare(expected, weights, logits, greedy):
    """Print a line for weights, logits and text each; exit with an error for the first that differs too much.

    Args:
        expected: content of expected.npz.
        weights: name of a tensor to its values in the client, and the largest difference that rounding explains.
        logits: logits of the prompt.
        greedy: tokens of the greedy text.
    """
    same = 0
    for name, (values, allowed) in weights.items():
        difference = float(np.abs(values - expected[name]).max())
        if not difference <= allowed:
            sys.exit(f"  {name} differs by {difference}")
        same += difference == 0
    others = ", the others within the last bits of float32" if same < len(weights) else ""
    print(f"  weights: {same} of {len(weights)} tensors bit for bit{others}")
    difference = float(np.abs(logits - expected["/logits"]).max())
    print(f"  logits:  largest difference {difference:.2g}, of logits up to {np.abs(expected['/logits']).max():.3g}")
    if not difference <= LOGITS:
        sys.exit(f"  logits may differ by {LOGITS}")
    if greedy != expected["/greedy"].tolist():
        sys.exit(f"  greedy tokens differ: {greedy} instead of {expected['/greedy'].tolist()}")
    print(f"  greedy:  the same {len(greedy)} tokens: {expected['/text']}")
