"""Load an exported folder with transformers and compressed-tensors, and compare it with what prepare.py expects.

python tests/clients/compressed_tensors_client.py FOLDER
"""

import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import transformers
from compare import compare


def main(folder):
    """Compare weights, logits and greedy tokens."""
    folder = Path(folder)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    print(f"  compressed-tensors {version('compressed-tensors')}, transformers {transformers.__version__}")
    expected = np.load(folder / "expected.npz")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    ids = expected["/prompt"].tolist()
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].numpy()  # the first product decompresses the weights
        written = []
        for _ in expected["/greedy"]:
            written.append(int(model(torch.tensor([ids + written])).logits[0, -1].argmax()))
    modules = {name: module for name, module in model.named_modules() if f"{name}.weight" in expected}
    weights = {f"{name}.weight": (module.weight.detach().numpy(), 0.0) for name, module in modules.items()}
    compare(expected, weights, logits, written)


if __name__ == "__main__":
    main(*sys.argv[1:])
