import os
import subprocess
import sys

import torch


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter that sees the package as this one does."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), **environment}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)


def state_of(model):
    """Copies of a model's tensors."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a, b):
    """Whether two such states are equal to the bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def limited_to(calls, function, error):
    """A function that raises the error when it is called once more than so often."""
    count = 0

    def limited(*args, **named):
        nonlocal count
        count += 1
        if count > calls:
            raise error
        return function(*args, **named)

    return limited
