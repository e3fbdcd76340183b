"""Load an exported folder with transformers, and compare it with what prepare.py expects.

    python tests/clients/transformers_client.py FOLDER
"""

import sys
from pathlib import Path

import numpy as np
import torch
import transformers

LOGITS = 1e-4
"""Largest difference of logits: sums of float32 in another order."""


def main(folder):
    """Compare weights, logits and greedy tokens."""
    folder = Path(folder)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    expected = np.load(folder / "expected.npz")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "model")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    ids = torch.tensor([expected["/prompt"].tolist()])
    with torch.no_grad():
        logits = model(ids).logits[0].numpy()  # the first product decompresses the weights
        written = []
        for _ in expected["/greedy"]:
            written.append(int(model(torch.tensor([ids[0].tolist() + written])).logits[0, -1].argmax()))
    found = {name: module.weight.detach().numpy() for name, module in model.named_modules() if hasattr(module, "weight")}
    for name, weight in found.items():
        if f"{name}.weight" in expected and not np.array_equal(weight, expected[f"{name}.weight"]):
            sys.exit(f"  weights of {name} differ by {np.abs(weight - expected[f'{name}.weight']).max()}")
    print(f"  weights: {len(found)} tensors bit for bit")
    difference = float(np.abs(logits - expected["/logits"]).max())
    print(f"  logits: largest difference {difference:.2g} of {np.abs(expected['/logits']).max():.3g}")
    if difference > LOGITS:
        sys.exit(f"  logits may differ by {LOGITS}")
    if written != expected["/greedy"].tolist():
        sys.exit(f"  greedy text differs: {tokenizer.decode(written)!r}")
    print(f"  greedy text: the same {len(written)} tokens, {tokenizer.decode(written)!r}")


if __name__ == "__main__":
    main(*sys.argv[1:])
