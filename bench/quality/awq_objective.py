"""Compare two errors to choose AWQ's scales by: of the outputs of the matrices, and of the module around them.

    python -m bench.quality.awq_objective MODEL --calibration TEXT --text TEXT [--bits 3,2] [--work FOLDER]
        [--output FOLDER]

This package uses the first error (equation 4 of arXiv 2306.00978, summed over all matrices that read the same inputs).
The authors' program uses the second: the output of attention for q, k and v, and of the MLP for gate and up. If only
one matrix reads its inputs, both are the same. Candidates, order of the work, clipping and text are equal.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from bench.quality.methods import Bench, arguments
from quantrature import ops
from quantrature.methods import METHODS
from quantrature.methods.awq import AWQ, candidates, shared_scale
from quantrature.models import LinearWeight
from quantrature.models.blocks import Blocks
from quantrature.models.folding import restored
from quantrature.quantization import sequential
from quantrature.quantization.folds import Folder

GROUP_SIZE = 128


class ByModule(Folder):
    """Chooses scales by the output error of the innermost module that contains all matrices with the same input."""

    def folds(self, blocks: Blocks, number: int, groups: Any, statistics: Any) -> Any:
        """Return the folds as the base class does, with another search for scales."""

        def search(matrices: Sequence[Any], x: torch.Tensor, repeats: tuple[int, int]) -> torch.Tensor:
            group = next(g for g in groups if g[0].weight.data_ptr() == matrices[0][0].data_ptr())
            if len(group) == 1:
                return shared_scale(matrices, x, repeats)
            return self._by_output(blocks, number, group, x)

        METHODS["awq"] = replace(AWQ, input_scale=search)
        return super().folds(blocks, number, groups, statistics)

    def _by_output(self, blocks: Blocks, number: int, group: Sequence[LinearWeight], x: torch.Tensor) -> torch.Tensor:
        shared = zip(*(linear.name.split(".") for linear in group), strict=False)
        path = itertools.takewhile(lambda parts: len(set(parts)) == 1, shared)
        around = self._model.get_submodule(".".join(parts[0] for parts in path))
        calls: list[tuple[Any, Any, torch.Tensor]] = []
        handle = around.register_forward_hook(
            lambda _, args, kwargs, out: calls.append((args, kwargs, first(out))), with_kwargs=True
        )
        for _ in blocks.outputs(number):
            pass
        handle.remove()
        exact = [linear.weight.clone() for linear in group]
        entry = self._entries[group[0].name]
        best, least = torch.ones(group[0].in_features), float("inf")
        with restored([linear.weight for linear in group]), torch.no_grad():
            for scale in candidates(x):
                for linear, weight in zip(group, exact, strict=True):
                    grid = ops.quantize((weight * scale).contiguous(), entry.bits, entry.group_size)
                    linear.weight.copy_(grid.dequantize("float32") / scale)
                error = sum(float((first(around(*a, **k)) - out).square().sum()) for a, k, out in calls)
                if error < least:
                    best, least = scale, error
        return best


def first(out: Any) -> torch.Tensor:
    found: torch.Tensor = out[0] if isinstance(out, tuple) else out
    return found


@contextmanager
def by_module() -> Any:
    """Choose scales by the output error of modules in a ``with`` block."""
    sequential.Folder = ByModule  # type: ignore[misc]
    try:
        yield
    finally:
        sequential.Folder = Folder  # type: ignore[misc]
        METHODS["awq"] = AWQ


def main() -> None:
    options = arguments(__doc__.splitlines()[0], "3,2").parse_args()
    bench = Bench("bench.quality.awq_objective", options)
    for bits in map(int, options.bits.split(",")):
        make = bench.method("awq", bits, bench.windows)
        bench.row(f"{bits} bits, by the outputs of the matrices", bits, make)
        with by_module():
            bench.row(f"{bits} bits, by the output of the module around them", bits, make)
    about = f"groups of {GROUP_SIZE}; {len(bench.windows)} calibration windows."
    bench.write("Two objectives for AWQ's scales", "awq-objective", "scales", about, bench.rows.values())


if __name__ == "__main__":
    main()
