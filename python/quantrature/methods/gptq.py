"""GPTQ: each column compensates the rounding errors of those before it (arXiv 2210.17323; LDLQ, arXiv 2307.13304)."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from .. import ops
from .._C import InvalidArgumentError
from ..packed import QuantizedMatrix
from .method import Method, Statistics, grid_settings, kept_beside, of_outputs

if TYPE_CHECKING:
    import torch

    from ..plan import PlanEntry

_log = logging.getLogger(__name__)


def with_feedback(
    weight: torch.Tensor, entry: PlanEntry, kept: torch.Tensor | None, statistics: Statistics
) -> QuantizedMatrix:
    """Quantize column by column; each column compensates the errors of those before it.

    With ``static_groups``, all scales are computed from the original weights. Without it, the scale of a group is
    computed when its first column is reached, from the weights with the compensation so far.

    Unquantized weights do not affect the scales, and count as having no error.
    """
    settings = GPTQ.settings(entry)
    outliers = kept_beside(weight, entry, kept)
    assert statistics.hessian is not None
    solver = "hqq-scale-free" if settings["grid"] == "hqq" else settings["grid"]
    grid = {**grid_settings(entry), "solver": solver}
    how: dict[str, Any] = {
        "damp_percent": settings["damp_percent"],
        "desc_act": settings["desc_act"],
        "exclude": outliers,
    }
    hessian = _factored(statistics.hessian, settings, entry.group_size) if weight.is_cuda else statistics.hessian
    if settings["static_groups"]:
        fixed = ops.quantize(
            weight,
            **grid,
            meta_bits=entry.meta_bits,
            exclude=outliers,
        )
        dense, found = ops.gptq(weight, hessian, fixed, **how)
    else:
        dense, found = ops.gptq(weight, hessian, **grid, **how)
    if found.failed:
        _log.warning(
            "%s: the Hessian is not positive definite with any damping; the weights are rounded to nearest instead",
            statistics.name,
        )
    elif found.damp_percent > settings["damp_percent"]:
        _log.warning("%s: damp_percent had to be raised to %g", statistics.name, found.damp_percent)
    if found.dead:
        _log.info("%s: %d of its inputs are always 0", statistics.name, found.dead)
    return QuantizedMatrix(dense, outliers)


def _factored(hessian: torch.Tensor, settings: dict[str, Any], group_size: int) -> ops.GptqFactor | torch.Tensor:
    """Factor a Hessian on its device. If memory is not sufficient, return the Hessian, to be factored on the CPU."""
    import torch

    try:
        return ops.gptq_factor(
            hessian,
            damp_percent=settings["damp_percent"],
            desc_act=settings["desc_act"],
            group_size=None if settings["static_groups"] else group_size,
        )
    except torch.cuda.OutOfMemoryError:
        return hessian


def _check(entry: PlanEntry) -> None:
    grid, damp = entry.options.get("grid", "minmax"), entry.options.get("damp_percent", 0.0)
    if grid not in ("minmax", "mse", "hqq") or (entry.sym and grid == "hqq"):
        raise InvalidArgumentError(f"option grid of gptq must be minmax, mse or, without sym, hqq: got {grid!r}")
    if not 0 <= damp <= 1:
        raise InvalidArgumentError(f"option damp_percent of gptq must be a fraction between 0 and 1: got {damp!r}")
    if not entry.options.get("static_groups", True):
        if grid == "hqq":
            raise InvalidArgumentError("option grid of gptq must be minmax or mse without static_groups: got 'hqq'")
        if entry.meta_bits is not None:
            raise InvalidArgumentError(
                f"meta_bits of gptq must be null without static_groups, because scales are then computed one by one: "
                f"got {entry.meta_bits}"
            )


GPTQ = Method(
    "quantizes column by column; each column compensates the errors of those before it",
    with_feedback,
    needs=("hessian",),
    options={"damp_percent": 0.01, "desc_act": True, "static_groups": True, "grid": "minmax"},
    check=_check,
    objective=of_outputs,
    on_devices=True,
)
