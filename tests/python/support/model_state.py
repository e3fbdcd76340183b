"""The tensors of a model, to compare them later."""

import torch


def state_of(model):
    """Copies of a model's tensors."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a, b):
    """Whether two such states are equal to the bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
