"""Load an exported folder with mlx-lm, and compare it with what prepare.py expects.

python tests/clients/mlx_lm_client.py FOLDER
"""

import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx_lm.utils import load

LOGITS = 1e-4
"""Largest difference of logits: sums of float32 in another order."""

BIAS_SCALE_BITS = 2.0**-22
"""Largest difference of a weight, relative to the terms of its sum: MLX may round the product before it adds."""


def dense(module):
    """Return the weight of a module in float32, and the largest term of the sum of each weight."""
    weight = module.weight
    if not hasattr(module, "scales"):
        return np.array(weight.astype(mx.float32)), 0.0
    scales, biases = module.scales.astype(mx.float32), module.biases.astype(mx.float32)
    values = mx.dequantize(weight, scales, biases, group_size=module.group_size, bits=module.bits)
    return np.array(values), float(mx.abs(biases).max())


def main(folder):
    """Compare weights, logits and greedy tokens."""
    folder = Path(folder)
    expected = np.load(folder / "expected.npz")
    model, tokenizer = load(str(folder / "model"))
    same, near = 0, 0
    for name, module in model.named_modules():
        if not hasattr(module, "weight") or isinstance(module.weight, dict):
            continue
        found, largest = dense(module)
        wanted = expected[f"{name}.weight"]
        difference = float(np.abs(found - wanted).max())
        if difference > largest * BIAS_SCALE_BITS:
            sys.exit(f"  weights of {name} differ by {difference}")
        same, near = same + (difference == 0), near + (difference > 0)
    print(f"  weights: {same} tensors bit for bit, {near} within the last bits of float32")
    ids = expected["/prompt"].tolist()
    logits = np.array(model(mx.array([ids]))[0].astype(mx.float32))
    difference = float(np.abs(logits - expected["/logits"]).max())
    print(f"  logits: largest difference {difference:.2g} of {np.abs(expected['/logits']).max():.3g}")
    if difference > LOGITS:
        sys.exit(f"  logits may differ by {LOGITS}")
    written = []
    for _ in expected["/greedy"]:
        written.append(int(mx.argmax(model(mx.array([ids + written]))[0, -1])))
    if written != expected["/greedy"].tolist():
        sys.exit(f"  greedy text differs: {tokenizer.decode(written)!r}")
    print(f"  greedy text: the same {len(written)} tokens, {tokenizer.decode(written)!r}")


if __name__ == "__main__":
    main(*sys.argv[1:])
