"""The settings that a strategy chooses from."""

from __future__ import annotations

from collections.abc import Iterable

from .._C import InvalidArgumentError
from ..methods import METHODS, check_method
from ..ops._grid import NumberFormat
from ..plan.option import Option
from .sources import Grid, Source

PAPERS = ("mxq", "sensiboost", "kurtboost")
"""Strategies with published defaults."""


def grid_of(
    origin: Source,
    strategy: str,
    method: str | None,
    sym: bool | None,
    meta_bits: int | str | None,
    zero: str | None = None,
    scale_dtype: str | None = None,
) -> tuple[str, Grid]:
    """Return the quantization method and the settings that are the same for all matrices."""
    name = method or origin.method or ("hqq" if strategy in PAPERS else "rtn")
    check_method(name)
    symmetric = sym if sym is not None else origin.grid is not None and origin.grid.sym
    if meta_bits == "default":
        meta_bits = 8 if strategy in PAPERS else None
    if isinstance(meta_bits, str):
        raise InvalidArgumentError(f"[allocate] meta_bits must be None or 1 to 8: got {meta_bits!r}")
    analyzed = origin.grid or Grid(name)
    grid = Grid(name, symmetric, meta_bits, zero or analyzed.zero, scale_dtype or analyzed.scale_dtype)
    NumberFormat(grid.zero, grid.scale_dtype).check("allocate", grid.sym, grid.meta_bits)
    return name, grid


def options_of(
    origin: Source,
    strategy: str,
    bits: Iterable[int] | None,
    group_sizes: Iterable[int] | None,
    outlier_fractions: Iterable[float],
    grid: Grid,
) -> list[Option]:
    """Return all combinations of bits, group sizes and fractions of outliers; each is valid."""
    method = METHODS[grid.method]
    if bits is None:
        bits = (2, 3, 4, 8) if strategy in PAPERS else method.bits or (2, 3, 4, 5, 6, 7, 8)
    if group_sizes is None and method.group_size is not None:
        group_sizes = [method.group_size]
    if group_sizes is None:
        analyzed = origin.group_size
        also = set() if strategy in PAPERS else {analyzed}
        group_sizes = [-1] if analyzed == -1 else sorted({32, 64, 128} | also)
    shares, sizes = list(outlier_fractions), list(group_sizes)
    options = [Option(b, g, o) for b in bits for g in sizes for o in shares]
    if not options:
        raise InvalidArgumentError(
            "[allocate] bits, group_sizes and outlier_fractions must not be empty: got an empty list"
        )
    for option in options:
        if option.bits > 8:
            raise InvalidArgumentError(f"[allocate] bits must be 1 to 8: got {option.bits}")
        try:
            grid.entry(option)
        except InvalidArgumentError as error:
            raise InvalidArgumentError(f"[allocate] {error}") from None
    return options
