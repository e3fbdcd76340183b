"""Quantize the demo model with every setting that a target admits, export it, and write what a client must compute.

    python tests/clients/prepare.py TARGET FOLDER

FOLDER gets ``model``, the exported folder, and ``expected.npz``: the weights, the logits of a prompt and 32 greedy
tokens, all computed by transformers in float32 from the weights that
``quantrature.exports.load`` reads.
"""

import itertools
import sys
from pathlib import Path

import numpy as np
import torch

import quantrature
import quantrature.demo
from quantrature.exports import TARGETS, load
from quantrature.models import find_linears, load_model, load_tokenizer

DEMO = Path(quantrature.demo.__file__).parent / "model"
PROMPT = "def close(self):\n    if self.fp is not None:\n"
TOKENS = 32

PLANS = {
    # bits, group sizes, and symmetric or not
    "mlx": ((1, 2, 3, 4, 5, 6, 7, 8), (32, 64, 128, -1), (False, True)),
    "compressed-tensors": ((2, 4, 8), (32, 64, 128, -1), (False, True)),
    "compressed-tensors-sym": ((2, 3, 4, 5, 6, 7, 8), (32, 64, 128, -1), (True,)),
}


def plan_of(variant, linears):
    """Give the matrices all combinations of the variant in turn, many bits in the first blocks, few in the last."""
    bits, groups, symmetries = PLANS[variant]
    settings = list(itertools.product(sorted(bits, reverse=True), groups, symmetries))
    names = [linear.name for linear in linears if linear.in_block]
    entries = {
        name: quantrature.PlanEntry(b, g, sym=s)
        for i, name in enumerate(names)
        for b, g, s in [settings[i * len(settings) // len(names)]]
    }
    if variant == "mlx":
        entries["model.embed_tokens"] = quantrature.PlanEntry(8, 64)
    return quantrature.Plan(entries)


def main(variant, folder):
    """Write the folder."""
    folder = Path(folder)
    target = variant.removesuffix("-sym")
    model, tokenizer = load_model(DEMO), load_tokenizer(DEMO)
    quantrature.quantize(model, plan=plan_of(variant, find_linears(model, embeddings=True)))
    quantrature.checkpoint.save(model, folder / "quantized", tokenizer=tokenizer, overwrite=True)
    found = quantrature.export(folder / "quantized", target, folder / "model", allow_refit=True)
    print(f"  {target}: {TARGETS[target]}")
    print(f"  {len(found.matrices)} matrices: {found.count('exact')} exact, {found.count('rounded')} rounded, {found.count('refit')} refit")
    dense = load(folder / "model")
    ids = torch.tensor([tokenizer.encode(PROMPT)])
    with torch.no_grad():
        logits = dense(ids).logits[0]
        greedy = ids[0].tolist()
        for _ in range(TOKENS):
            greedy.append(int(dense(torch.tensor([greedy])).logits[0, -1].argmax()))
    tied = set(dense.all_tied_weights_keys)
    weights = {name: tensor.numpy() for name, tensor in dense.state_dict().items() if name not in tied}
    arrays = {"/prompt": ids[0].numpy(), "/logits": logits.numpy(), "/greedy": np.array(greedy[-TOKENS:])}
    np.savez(folder / "expected.npz", **arrays, **weights)


if __name__ == "__main__":
    main(*sys.argv[1:])
