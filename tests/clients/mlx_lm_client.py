"""Load an exported folder with mlx-lm, and compare it with what prepare.py expects.

python tests/clients/mlx_lm_client.py FOLDER
"""

import sys
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx
import numpy as np
from compare import compare
from mlx_lm.utils import load_model

LAST_BITS = 2.0**-22
"""Largest difference of a weight, relative to the largest bias: MLX may round the product before it adds the bias."""


def dense(module):
    """Return the weight of a module in float32, and the largest difference that rounding explains."""
    if "scales" not in module:
        return np.array(module.weight.astype(mx.float32)), 0.0
    scales, biases = module.scales.astype(mx.float32), module.biases.astype(mx.float32)
    values = mx.dequantize(module.weight, scales, biases, group_size=module.group_size, bits=module.bits)
    return np.array(values), float(mx.abs(biases).max()) * LAST_BITS


def main(folder):
    """Compare weights, logits and greedy tokens."""
    folder = Path(folder)
    expected = np.load(folder / "expected.npz")
    print(f"  mlx-lm {version('mlx-lm')}, mlx {version('mlx')}")
    model, _ = load_model(folder / "model")
    weights = {}
    for name, module in model.named_modules():
        if isinstance(module.get("weight"), mx.array):
            expert = name.replace(".switch_mlp.", ".experts.")
            weights[expert if expert != name else f"{name}.weight"] = dense(module)
    # transformers has gate and up of all experts in one parameter.
    for name in [name for name in weights if name.endswith("experts.gate_proj")]:
        parts = [weights.pop(name), weights.pop(name.replace("gate_proj", "up_proj"))]
        both = np.concatenate([values for values, _ in parts], axis=1), max(allowed for _, allowed in parts)
        weights[name.replace("gate_proj", "gate_up_proj")] = both
    ids = expected["/prompt"].tolist()
    logits = np.array(model(mx.array([ids]))[0].astype(mx.float32))
    written = []
    for _ in expected["/greedy"]:
        written.append(int(mx.argmax(model(mx.array([ids + written]))[0, -1])))
    compare(expected, weights, logits, written)


if __name__ == "__main__":
    main(*sys.argv[1:])
