"""A setting for every matrix, within a budget."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from .._C import InvalidArgumentError
from ..plan import KEEP_BITS, Plan, PlanEntry
from .constraints import Constraints
from .groups import fusion_groups
from .knapsack import choose, smallest
from .loss import LossModel
from .options import Option, stored_bytes

if TYPE_CHECKING:
    from ..analysis.sensitivity import Sensitivity

ALLOCATORS = {
    "uniform": "the same setting for every matrix, the largest that fits",
    "pqi": "the least predicted loss change, from the signed PQI of each matrix; needs an analysis",
}
"""Names that ``--method`` of the verb plan takes, and a line about each."""

BITS = (2, 3, 4, 5, 6, 7, 8)
GROUP_SIZES = (32, 64, 128)
SOLVERS = {"rtn": "minmax", "mse": "mse", "hqq": "hqq"}


@dataclass(frozen=True)
class Matrix:
    """What an allocation has to know of a weight matrix."""

    name: str
    rows: int
    columns: int
    dtype: str

    @property
    def numel(self) -> int:
        """How many weights it has."""
        return self.rows * self.columns


@dataclass(frozen=True)
class Host:
    """How the entries of a plan are quantized, apart from what is chosen for each."""

    solver: str
    sym: bool = False
    meta_bits: int | None = None

    def entry(self, option: Option) -> PlanEntry:
        """The plan entry of an option."""
        return option.entry(self.solver, self.sym, self.meta_bits)

    def size(self, matrix: Matrix, option: Option) -> int:
        """Bytes of a matrix stored so."""
        return stored_bytes(matrix.rows, matrix.columns, self.entry(option), matrix.dtype)


def allocate(
    source: Sensitivity,
    *,
    method: str = "pqi",
    avg_bits: float | None = None,
    target_bytes: int | None = None,
    bits: Iterable[int] = BITS,
    group_sizes: Iterable[int] | None = None,
    outliers: Iterable[float] = (0.0,),
    host: str | None = None,
    meta_bits: int | None = None,
    groups: str | None = None,
    pin: Mapping[str, int | str] | None = None,
    minimum: Mapping[str, int] | None = None,
    maximum: Mapping[str, int] | None = None,
    skip: Sequence[str] = (),
) -> Plan:
    """Choose how each matrix of a model is stored, within a budget.

    Sizes are counted as stored: codes, scales, zeros and outliers with their positions. The plan never exceeds its
    budget; ``plan.allocation`` says how much of it is left, what loss change is predicted and how far from the least
    possible one that can be.

    ``uniform`` takes the largest setting that fits for all matrices. ``pqi`` minimises the predicted loss change, the
    sum of what :class:`quantrature.allocation.LossModel` says of each matrix, by an integer program.

    Args:
        source: the result of :func:`quantrature.analyze`.
        method: name out of ``ALLOCATORS``.
        avg_bits: bits of storage for each weight, everything included, on average over the matrices of the plan.
        target_bytes: the same budget in bytes, of all matrices of the plan together; give one of the two.
        bits, group_sizes, outliers: what may be chosen. Groups of 32, 64, 128 and what was analyzed, unless given;
            shares of outliers must have been part of the analysis.
        host: method of quantization, as in :func:`quantrature.quantize`; that of the analysis unless given.
        meta_bits: of quantized scales and zeros, as in :class:`quantrature.plan.PlanEntry`.
        groups: ``fused`` stores alike what serving engines fuse (q, k and v; gate and up), ``none`` does not; the
            former for ``pqi`` unless given.
        pin, minimum, maximum, skip: see :class:`quantrature.allocation.Constraints`.

    Raises:
        InvalidArgumentError: naming the argument, the constraint or the matrix; for a budget below the smallest
            possible plan, naming the least value that would do.
    """
    if method not in ALLOCATORS:
        raise InvalidArgumentError(f"[allocate] method must be one of {', '.join(ALLOCATORS)}: got {method!r}")
    grouping = groups if groups is not None else "fused" if method == "pqi" else "none"
    if grouping not in ("fused", "none"):
        raise InvalidArgumentError(f"[allocate] groups must be fused or none: got {groups!r}")
    host_name = host if host is not None else source.settings["method"]
    if host_name not in SOLVERS:
        raise InvalidArgumentError(f"[allocate] host must be one of {', '.join(SOLVERS)}: got {host_name!r}")
    store = Host(SOLVERS[host_name], bool(source.settings["sym"]), meta_bits)
    constraints = Constraints(pin or {}, minimum or {}, maximum or {}, skip)

    everything = [m.name for m in source.matrices]
    skipped = constraints.skipped(everything)
    found = [m for m in source.matrices if m.name not in skipped]
    if not found:
        raise InvalidArgumentError("[allocate] a plan needs a matrix that is not skipped: got none")
    matrices = [Matrix(m.name, m.out_features, m.in_features, m.dtype) for m in found]
    options = _options(source, bits, group_sizes, outliers, store)
    allowed = constraints.allowed([m.name for m in matrices], options)
    model = None
    if method == "pqi" or all(m.loss_change for m in found):
        model = LossModel(
            [m.name for m in matrices],
            [m.columns for m in matrices],
            [m.numel for m in matrices],
            [m.loss_change for m in found],
            [m.error for m in found],
        )
    budget = Budget.of(matrices, avg_bits, target_bytes)
    started = time.perf_counter()
    if method == "uniform":
        chosen, about = _uniform(matrices, options, allowed, store, budget)
        reasons = [f"uniform {option.key}" if option == about["setting"] else "constraint" for option in chosen]
        about["setting"] = about["setting"].key
    else:
        assert model is not None
        together = (
            fusion_groups([m.name for m in matrices]) if grouping == "fused" else [[i] for i in range(len(matrices))]
        )
        chosen, reasons, about = _least_loss(matrices, together, allowed, store, budget, model)
    predictions = [None if model is None else model.predict(i, option) for i, option in enumerate(chosen)]

    entries = {}
    for matrix, option, reason, predicted in zip(matrices, chosen, reasons, predictions, strict=True):
        entries[matrix.name] = replace(store.entry(option), reason=reason, predicted_loss_change=predicted)
    used = sum(store.size(matrix, option) for matrix, option in zip(matrices, chosen, strict=True))
    for name in skipped:
        entries[name] = PlanEntry(KEEP_BITS, reason="skipped as asked", predicted_loss_change=0.0)
    plan = Plan(
        {name: entries[name] for name in everything},
        {
            "method": method,
            "host": host_name,
            **budget.report(used),
            "groups": grouping,
            **about,
            "seconds": round(time.perf_counter() - started, 3),
            "model": source.model,
            "calibration": source.calibration,
        },
    )
    if model is not None:
        energies = "measured" if model.measured else "analytic"
        prediction = {
            "predicted_loss_change": plan.predicted_loss_change,
            "error_energies": energies,
            "references": {key: {"floored": count} for key, count in model.floored.items()},
        }
        plan = replace(plan, allocation={**plan.allocation, **prediction})
    return plan


@dataclass(frozen=True)
class Budget:
    """How much may be stored.

    Attributes:
        limit: bytes.
        weights: of all matrices that count.
        asked: the argument and its value, for messages.
    """

    limit: int
    weights: int
    asked: tuple[str, float]

    @classmethod
    def of(cls, matrices: Sequence[Matrix], avg_bits: float | None, target_bytes: int | None) -> Budget:
        """The budget that was asked for in one of two ways."""
        weights = sum(matrix.numel for matrix in matrices)
        if (avg_bits is None) == (target_bytes is None):
            both = f"got avg_bits={avg_bits}, target_bytes={target_bytes}"
            raise InvalidArgumentError(f"[allocate] a budget is given as either avg_bits or target_bytes: {both}")
        name, value = ("avg_bits", avg_bits) if avg_bits is not None else ("target_bytes", target_bytes)
        assert value is not None
        if not math.isfinite(value) or value <= 0:
            raise InvalidArgumentError(f"[allocate] {name} must be above 0: got {name}={value}")
        limit = value * weights / 8 if name == "avg_bits" else value
        return cls(math.floor(limit + 1e-6), weights, (name, value))

    def demand(self, least: int) -> None:
        """Refuse when even the smallest plan is larger.

        Raises:
            InvalidArgumentError: naming the smallest value that would do.
        """
        if least > self.limit:
            name, value = self.asked
            enough = f"{math.ceil(8e4 * least / self.weights) / 1e4:.4f}" if name == "avg_bits" else str(least)
            raise InvalidArgumentError(
                f"[allocate] {name} must be at least {enough} for these matrices and settings: got {name}={value}"
            )

    def report(self, used: int) -> dict[str, Any]:
        """What plan.json says of it."""
        return {
            "budget": {self.asked[0]: self.asked[1]},
            "budget_bytes": self.limit,
            "bytes": used,
            "slack_bytes": self.limit - used,
            "weights": self.weights,
            "bits_per_weight": 8 * used / self.weights,
        }


def _options(
    source: Sensitivity,
    bits: Iterable[int],
    group_sizes: Iterable[int] | None,
    outliers: Iterable[float],
    store: Host,
) -> list[Option]:
    """All combinations, each one that can be stored."""
    if group_sizes is None:
        analyzed = source.settings["group_size"]
        group_sizes = [-1] if analyzed == -1 else sorted({*GROUP_SIZES, analyzed})
    options = [Option(b, g, o) for b in bits for g in group_sizes for o in outliers]
    if not options:
        raise InvalidArgumentError("[allocate] bits, group_sizes and outliers must leave a choice: got none")
    for option in options:
        if option.bits > 8:
            raise InvalidArgumentError(f"[allocate] bits must be 1 to 8: got {option.bits}")
        try:
            store.entry(option)
        except InvalidArgumentError as error:
            raise InvalidArgumentError(f"[allocate] {error}") from None
    return options


def _uniform(
    matrices: Sequence[Matrix],
    options: Sequence[Option],
    allowed: Mapping[str, Sequence[Option]],
    store: Host,
    budget: Budget,
) -> tuple[list[Option], dict[str, Any]]:
    """The largest setting that fits; where constraints forbid it to a matrix, the nearest that they allow."""

    def distance(a: Option, b: Option) -> tuple[float, ...]:
        return abs(a.bits - b.bits), abs(math.log2(abs(a.group_size) / abs(b.group_size))), abs(a.outliers - b.outliers)

    ladder = []
    for option in options:
        choice = [
            option if option in allowed[m.name] else min(allowed[m.name], key=lambda o: distance(o, option))
            for m in matrices
        ]
        size = sum(store.size(matrix, taken) for matrix, taken in zip(matrices, choice, strict=True))
        ladder.append((size, option, choice))
    budget.demand(min(size for size, _, _ in ladder))
    _, option, choice = max((step for step in ladder if step[0] <= budget.limit), key=lambda step: step[:2])
    return choice, {"setting": option}


def _least_loss(
    matrices: Sequence[Matrix],
    together: Sequence[Sequence[int]],
    allowed: Mapping[str, Sequence[Option]],
    store: Host,
    budget: Budget,
    model: LossModel,
) -> tuple[list[Option], list[str], dict[str, Any]]:
    """The options of least predicted loss change, why, and how good they are."""
    settings: list[list[Option]] = []
    costs: list[list[float]] = []
    sizes: list[list[int]] = []
    for members in together:
        names = [matrices[i].name for i in members]
        common = [o for o in allowed[names[0]] if all(o in allowed[name] for name in names)]
        if not common:
            raise InvalidArgumentError(
                f"[allocate] the constraints must leave a setting in common to {', '.join(names)}, which are stored "
                "alike; groups=none lifts that"
            )
        settings.append(common)
        costs.append([])
        for option in common:
            predicted = [model.predict(i, option) for i in members]
            if None in predicted:
                raise InvalidArgumentError(
                    f"[allocate] outliers must have been analyzed: got {option.key}, unknown for {names[0]}"
                )
            costs[-1].append(sum(p for p in predicted if p is not None))
        sizes.append([sum(store.size(matrices[i], option) for i in members) for option in common])
    budget.demand(int(smallest(sizes)))
    best = choose(costs, sizes, budget.limit, relative_gap=1e-6)

    chosen: list[Option] = [settings[0][0]] * len(matrices)
    reasons = [""] * len(matrices)
    for k, members in enumerate(together):
        taken = best.chosen[k]
        reason = _reason(settings[k], costs[k], sizes[k], taken)
        for i in members:
            chosen[i] = settings[k][taken]
            reasons[i] = reason if len(members) == 1 else f"{reason} ({len(members)} fused)"
    return chosen, reasons, {"gap": best.gap, "settings": sorted({o.key for options in settings for o in options})}


def _reason(options: Sequence[Option], costs: Sequence[float], sizes: Sequence[int], taken: int) -> str:
    """What the next smaller and the next larger setting worth considering would change."""
    parts = []
    smaller = [k for k in range(len(options)) if sizes[k] < sizes[taken]]
    larger = [k for k in range(len(options)) if sizes[k] > sizes[taken] and costs[k] < costs[taken]]
    neighbours = []
    if smaller:
        neighbours.append(min(smaller, key=lambda k: (costs[k] - costs[taken]) / (sizes[taken] - sizes[k])))
    if larger:
        neighbours.append(min(larger, key=lambda k: (costs[k] - costs[taken]) / (sizes[k] - sizes[taken])))
    for k in neighbours:
        parts.append(f"{options[k].key} {costs[k] - costs[taken]:+.2e} nats for {sizes[k] - sizes[taken]:+d} bytes")
    return "pqi: " + ("; ".join(parts) or "the only setting allowed")
