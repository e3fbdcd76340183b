"""Communicate between the processes of torchrun, each of which computes a part of the calibration samples."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

T = TypeVar("T")


def rank_of() -> tuple[int, int]:
    """Return the rank of this process and the number of processes; (0, 1) without ``torch.distributed``."""
    import torch.distributed as distributed

    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def add_over_ranks(tensors: Iterable[torch.Tensor]) -> None:
    """Replace tensors, in place, by their sums over all processes."""
    if rank_of()[1] == 1:
        return
    import torch.distributed as distributed

    on_gpu = distributed.get_backend() == "nccl"
    for tensor in tensors:
        shared = tensor.cuda() if on_gpu else tensor.cpu()
        distributed.all_reduce(shared)
        if shared is not tensor:
            tensor.copy_(shared)


def of_first_rank(value: T) -> T:
    """Return the value of the first process, in all processes."""
    if rank_of()[1] == 1:
        return value
    import torch.distributed as distributed

    shared = [value]
    distributed.broadcast_object_list(shared)
    return shared[0]


@contextmanager
def joined() -> Iterator[int]:
    """Connect to the other processes of torchrun, with NCCL if each has a GPU, else gloo, and yield the rank."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield 0
        return
    import torch.distributed as distributed

    local = int(os.environ.get("LOCAL_RANK", "0"))
    if torch.cuda.device_count() > local:
        torch.cuda.set_device(local)
        distributed.init_process_group("nccl")
    else:
        distributed.init_process_group("gloo")
    try:
        yield distributed.get_rank()
    finally:
        distributed.destroy_process_group()
