"""``quantrature plan``: choose bits and group size for each matrix of a model, within a size budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .._C import InvalidArgumentError
from ._groups import Loading, Text
from ._input import check_fraction, size_in_bytes
from ._options import CALIBRATION, CONSTRAINTS, METHOD, OUTPUT, DryRun, Json, Objective
from ._output import print_json, print_table, stdout_kept_clean

if TYPE_CHECKING:
    from ..plan import Plan

REFERENCE_BITS = (2, 3, 4)
"""Bits at which the loss change is predicted, if a pqi plan is made from a model that was not analyzed before."""


@dataclass(frozen=True)
class Budget:
    """The size budget of all matrices: as bits per weight or as bytes."""

    avg_bits: Annotated[
        float | None, typer.Option(help="Budget in bits per weight, with scales, zero points and outliers.")
    ] = None
    target_size: Annotated[
        str | None, typer.Option(help="Budget as the size of all quantized matrices: 4.2GiB, 900MB, 123456 (bytes).")
    ] = None

    @property
    def arguments(self) -> dict[str, Any]:
        """The options as arguments of :func:`quantrature.allocation.allocate`.

        Raises:
            InvalidArgumentError: for neither or both options, and for a size that cannot be parsed.
        """
        if (self.avg_bits is None) == (self.target_size is None):
            raise InvalidArgumentError("[plan] a budget is needed: give either --avg-bits or --target-size, not both")
        target = None if self.target_size is None else size_in_bytes("plan", self.target_size)
        return {"avg_bits": self.avg_bits, "target_bytes": target}


@dataclass(frozen=True)
class Settings:
    """The settings to choose from for each matrix."""

    bits: Annotated[
        str | None,
        typer.Option(
            help="Bits to choose from, separated by commas: 2,3,4,8.",
            show_default="2 to 8; 2,3,4,8 for mxq, sensiboost and kurtboost",
        ),
    ] = None
    group_sizes: Annotated[
        str | None,
        typer.Option(
            help="Group sizes to choose from, separated by commas: 32,64,128.",
            show_default="32,64,128 and the group size of the analysis",
        ),
    ] = None
    outlier_fractions: Annotated[
        str,
        typer.Option(help="Fractions of outliers (weights kept unquantized) to choose from, 0 to 1: 0,0.005."),
    ] = "0"
    method: Annotated[
        str | None,
        typer.Option(
            help="Quantization method; 'quantrature list methods' shows all.",
            show_default="the method of the analysis; else rtn for pqi and uniform, hqq for other strategies",
        ),
    ] = None
    meta_bits: Annotated[
        int | None,
        typer.Option(
            help="Quantize scales and zero points to this many bits; 0 stores them as float16.",
            show_default="8 for mxq, sensiboost and kurtboost; else 0",
            rich_help_panel=METHOD,
        ),
    ] = None

    @property
    def arguments(self) -> dict[str, Any]:
        """The options as arguments of :func:`quantrature.allocation.allocate` and ``estimate``.

        Raises:
            InvalidArgumentError: for a value that is not a list of numbers, or a fraction outside 0 to 1.
        """
        found: dict[str, Any] = {
            "bits": None if self.bits is None else _numbers("--bits", self.bits, int),
            "group_sizes": None if self.group_sizes is None else _numbers("--group-sizes", self.group_sizes, int),
            "outlier_fractions": _numbers("--outlier-fractions", self.outlier_fractions, float),
            "method": self.method,
        }
        for fraction in found["outlier_fractions"]:
            check_fraction("plan", "--outlier-fractions", fraction)
        return found if self.meta_bits is None else {**found, "meta_bits": self.meta_bits or None}


@dataclass(frozen=True)
class Constraints:
    """Limits for single matrices, and which matrices must get the same setting."""

    groups: Annotated[
        str | None,
        typer.Option(
            help="fused: give the same setting to matrices that serving engines fuse, such as q, k and v; none: choose "
            "each by itself.",
            show_default="fused for pqi, else none",
            rich_help_panel=CONSTRAINTS,
        ),
    ] = None
    pin: Annotated[
        list[str] | None,
        typer.Option(
            help="Fix the setting of a matrix: MATRIX=4 (bits) or MATRIX=b4g64 (bits and group size). MATRIX is a name "
            "or re:REGEX; repeatable.",
            rich_help_panel=CONSTRAINTS,
        ),
    ] = None
    min_bits: Annotated[
        list[str] | None, typer.Option(help="MATRIX=4: at least 4 bits; repeatable.", rich_help_panel=CONSTRAINTS)
    ] = None
    max_bits: Annotated[
        list[str] | None, typer.Option(help="MATRIX=4: at most 4 bits; repeatable.", rich_help_panel=CONSTRAINTS)
    ] = None
    skip: Annotated[
        list[str] | None, typer.Option(help="Do not quantize this matrix; repeatable.", rich_help_panel=CONSTRAINTS)
    ] = None

    @property
    def arguments(self) -> dict[str, Any]:
        """The options as arguments of :func:`quantrature.allocation.allocate`.

        Raises:
            InvalidArgumentError: for a value that is not ``MATRIX=VALUE``, or bits that are not an integer.
        """
        return {
            "groups": self.groups,
            "pin": _pairs("--pin", self.pin),
            "minimum": _bits_of("--min-bits", self.min_bits),
            "maximum": _bits_of("--max-bits", self.max_bits),
            "skip": self.skip or (),
        }


@dataclass(frozen=True)
class Boost:
    """How many layers the strategies sensiboost and kurtboost boost, and by how many settings."""

    boost_stops: Annotated[
        int,
        typer.Option(
            help="For sensiboost and kurtboost: a boosted layer gets a setting this many steps larger.",
            rich_help_panel=METHOD,
        ),
    ] = 2
    top_m: Annotated[
        int,
        typer.Option(
            help="For sensiboost and kurtboost: most layers to boost per kind of matrix; 0: all outlier layers.",
            rich_help_panel=METHOD,
        ),
    ] = 0

    @property
    def arguments(self) -> dict[str, Any]:
        """The options as arguments of :func:`quantrature.allocation.allocate`."""
        return {"stops": self.boost_stops, "top_m": self.top_m}


def run(
    model: Annotated[
        str | None,
        typer.Argument(
            help="Model (folder, or id on the Hugging Face Hub), or folder that quantrature analyze wrote.",
            metavar="MODEL|SENS",
        ),
    ] = None,
    *,
    strategy: Annotated[
        str, typer.Option(help="How to distribute the budget: uniform, mxq, sensiboost, kurtboost or pqi.")
    ] = "pqi",
    budget: Budget,
    output: Annotated[str | None, typer.Option("-o", "--output", help="File to write.", metavar="PLAN")] = None,
    table: Annotated[
        str | None,
        typer.Option(
            help="Published cost table (CSV) to use instead of a model; for mxq, sensiboost and kurtboost.",
            rich_help_panel=METHOD,
        ),
    ] = None,
    settings: Settings,
    constraints: Constraints,
    boosting: Boost,
    weights: Annotated[
        str | None, typer.Option(help="The model that was analyzed, to measure settings that SENS does not contain.")
    ] = None,
    text: Text,
    objective: Objective = "kl",
    nodes: Annotated[
        int,
        typer.Option(
            help="Gradient evaluations per window and integral; for pqi from a model.", rich_help_panel=CALIBRATION
        ),
    ] = 4,
    validate: Annotated[
        int,
        typer.Option(
            help="Measure this many random plans and report how well their loss changes were predicted.",
            rich_help_panel=OUTPUT,
        ),
    ] = 0,
    loading: Loading,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Choose bits and group size for each matrix, within a size budget."""
    if (model is None) == (table is None):
        raise InvalidArgumentError("[plan] give either MODEL (a model, or an analysis of a model) or --table, not both")
    loading.limits("plan")
    _check_strategy(strategy, settings.method)
    if table is not None:
        found = _of_table(table, strategy, budget, boosting)
        rows = {name: str(found[name]) for name in found if name != "allocation"}
        _print(found, f"{table}: {strategy}", rows, as_json)
        return
    assert model is not None
    with stdout_kept_clean(as_json):
        amount, wishes = budget.arguments, {**settings.arguments, **constraints.arguments, **boosting.arguments}
        made = _Model(model, text, objective, nodes, loading, False if as_json else None)
        if validate and (strategy != "pqi" or made.analyzed):
            raise InvalidArgumentError("[plan] --validate needs --strategy pqi and a model, not an analysis")
        if dry_run:
            cost = made.cost(strategy, settings)
        else:
            plan = made.plan(strategy, settings.method, {**amount, **wishes}, weights, validate)
            if output is not None:
                write_plan(plan, output)
    if dry_run:
        _print(cost, f"plan of {model}", {name.replace("_", " "): f"{cost[name]:,}" for name in cost}, as_json)
    else:
        _print(plan.to_json(), f"{model}: {len(plan)} matrices", dict(_rows(plan, output)), as_json)


def _check_strategy(strategy: str, method: str | None) -> None:
    """Raise an InvalidArgumentError for an unknown strategy, or a strategy that is given as the method."""
    from ..allocation import STRATEGIES

    if strategy not in STRATEGIES:
        raise InvalidArgumentError(f"[plan] --strategy must be one of {', '.join(STRATEGIES)}: got {strategy}")
    if method in STRATEGIES:
        raise InvalidArgumentError(
            f"[plan] --method must be a quantization method: got {method}, which is a strategy; use --strategy {method}"
        )


def _print(values: Mapping[str, Any], title: str, rows: Mapping[str, str], as_json: bool) -> None:
    if as_json:
        print_json(values)
    else:
        print_table(title, rows.items())


class _Model:
    """The model or analysis that the argument names, and what each strategy needs from it."""

    def __init__(
        self, path: str, text: Text, objective: str, nodes: int, loading: Loading, progress: bool | None
    ) -> None:
        from ..analysis.sensitivity import SUMMARY

        self.path, self.text, self.objective, self.nodes = path, text, objective, nodes
        self.loading, self.progress = loading, progress
        self.loaded: Any = None
        self.tokens: Any = None
        self.tokenizer: Any = None
        self.analyzed = (Path(path) / SUMMARY).is_file()

    def plan(
        self, strategy: str, method: str | None, arguments: Mapping[str, Any], weights: str | None, validate: int
    ) -> Plan:
        """Make the plan.

        Args:
            strategy: name of the strategy.
            method: quantization method; ``None`` for the default.
            arguments: budget, settings and constraints, as in :func:`quantrature.allocation.allocate`.
            weights: the model that was analyzed, if the argument names an analysis.
            validate: number of random plans to measure.
        """
        from ..allocation import allocate

        source, of_source = self.source(strategy, method)
        if weights is not None:
            of_source["weights"] = weights
        plan = allocate(
            source,
            strategy=strategy,
            trust_remote_code=self.loading.trust_remote_code,
            progress=self.progress,
            **arguments,
            **of_source,
        )
        return self.validated(plan, source, validate) if validate else plan

    def source(self, strategy: str, method: str | None) -> tuple[Any, dict[str, Any]]:
        """Return the source for :func:`quantrature.allocation.allocate`, and further arguments."""
        if strategy == "sensiboost":
            if self.analyzed:
                raise InvalidArgumentError("[plan] sensiboost runs the model: give the model, not an analysis")
            from ..allocation.activation import activation_sensitivity

            self._load(strategy)
            return self.loaded, {
                "sensitivity": activation_sensitivity(self.loaded, self.tokens, progress=self.progress)
            }
        if strategy != "pqi" or self.analyzed:
            return self.path, {}
        from ..analysis import analyze

        self._load(strategy)
        found = analyze(
            self.loaded,
            self.tokens,
            objective=self.objective,
            metrics=["pqi", "kurtosis"],
            bits=REFERENCE_BITS,
            method=method or "rtn",
            nodes=self.nodes,
            batch_size=self.text.batch_size,
            tokenizer=self.tokenizer,
            seed=self.text.seed,
            progress=self.progress,
        )
        return found, {"weights": self.path}

    def validated(self, plan: Plan, sensitivity: Any, count: int) -> Plan:
        """Return the plan with the validation of its predictions, measured on the calibration text."""
        from ..allocation import validate

        found = validate(self.loaded, self.tokens, sensitivity, count=count, progress=self.progress)
        return replace(plan, allocation={**plan.allocation, "validation": found.to_json()})

    def cost(self, strategy: str, settings: Settings) -> dict[str, Any]:
        """Return the estimate for --dry-run."""
        from ..allocation import estimate

        trust = self.loading.trust_remote_code
        cost = estimate(self.path, strategy=strategy, trust_remote_code=trust, **settings.arguments)
        if strategy in ("pqi", "sensiboost") and not self.analyzed:
            from ..models import find_linears
            from ._estimate import analyzing

            self._load(strategy)
            passes = self.nodes * len(REFERENCE_BITS) if strategy == "pqi" else 1
            linears = find_linears(self.loaded, experts=False)
            more = analyzing(self.loaded, self.tokens, linears, passes, self.text.batch_size)
            cost["memory_bytes"] += more.memory_bytes
            cost["seconds"] = round(cost["seconds"] + more.seconds, 1)
        return cost

    def _load(self, strategy: str) -> None:
        if self.text.calibration is None:
            raise InvalidArgumentError(f"[plan] --calibration must name the text that {strategy} needs")
        config = self.loading.config(self.path, "plan")
        self.tokenizer = self.loading.tokenizer(self.path)
        self.tokens = self.text.read_with(self.tokenizer).windows(config)
        self.loaded = self.loading.load(self.path, "plan")


def _of_table(path: str, strategy: str, budget: Budget, boosting: Boost) -> dict[str, Any]:
    from ..allocation import boost, mxq, read_table

    if strategy not in ("mxq", "sensiboost", "kurtboost"):
        raise InvalidArgumentError(
            f"[plan] with --table, --strategy must be mxq, sensiboost or kurtboost: got {strategy}"
        )
    avg_bits = budget.arguments["avg_bits"]
    if avg_bits is None:
        raise InvalidArgumentError("[plan] with --table, the budget must be given as --avg-bits")
    costs = read_table(path)
    found = mxq(costs, avg_bits) if strategy == "mxq" else boost(costs, strategy, avg_bits, **boosting.arguments)
    return found.to_json(costs)


def _rows(plan: Plan, output: str | None) -> list[tuple[str, str]]:
    about = plan.allocation
    rows = [
        ("strategy", f"{about['strategy']}, quantized by {about['method']}"),
        ("bits per weight", f"{about['bits_per_weight']:.4f}"),
        ("bytes", f"{about['bytes']:,} of {about['budget_bytes']:,}"),
    ]
    if about.get("predicted_loss_change") is not None:
        what = "divergence" if about.get("predicts") == "kl" else "loss change"
        rows.append((f"predicted {what}", f"{about['predicted_loss_change']:+.6f} nats per token"))
    if "validation" in about:
        found = about["validation"]
        error = f"median relative error {found['median_relative_error']:.1%}"
        rows.append(("validation", f"{found['plans']} random plans: Spearman {found['spearman']:.3f}, {error}"))
    settings: dict[str, int] = {}
    for _, entry in plan:
        key = (
            "kept"
            if entry.keeps
            else entry.setting + (f" and {100 * entry.outlier_fraction:g} % outliers" if entry.outlier_fraction else "")
        )
        settings[key] = settings.get(key, 0) + 1
    rows += [(key, f"{count} matrices") for key, count in sorted(settings.items())]
    if output is not None:
        rows.append(("written to", output))
    return rows


def write_plan(plan: Plan, output: str) -> None:
    """Save a plan to the file ``output``.

    Raises:
        InvalidArgumentError: if the file cannot be written; the message says why.
    """
    try:
        plan.save(output)
    except OSError as error:
        raise InvalidArgumentError(f"[plan] cannot write {output}: {error.strerror}") from None


def _numbers(option: str, text: str, kind: Any) -> list[Any]:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise InvalidArgumentError(f"[plan] {option} must be numbers separated by commas: got {text!r}") from None


def _bits_of(option: str, given: Sequence[str] | None) -> dict[str, int]:
    found = {}
    for name, text in _pairs(option, given).items():
        try:
            found[name] = int(text)
        except ValueError:
            raise InvalidArgumentError(f"[plan] {option} must be MATRIX=BITS: got {text!r} for the bits") from None
    return found


def _pairs(option: str, given: Sequence[str] | None) -> dict[str, str]:
    pairs = {}
    for text in given or ():
        name, equals, value = text.rpartition("=")
        if not (name and equals and value):
            raise InvalidArgumentError(f"[plan] {option} must be MATRIX=VALUE: got {text!r}")
        pairs[name] = value
    return pairs
