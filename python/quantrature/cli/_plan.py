"""``quantrature plan``: how each matrix of a model is to be stored, within a budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .._C import InvalidArgumentError
from ._input import check_fraction, size_in_bytes
from ._options import (
    CALIBRATION,
    CONSTRAINTS,
    MEMORY,
    METHOD,
    OUTPUT,
    Bos,
    Calibration,
    Json,
    Nsamples,
    Seed,
    Seqlen,
    TextColumn,
    TrustRemoteCode,
)
from ._output import print_json, print_table, stdout_kept_clean

if TYPE_CHECKING:
    from ..plan import Plan

REFERENCE_BITS = (2, 3, 4)
"""Where the loss changes are integrated when a plan by pqi starts from a model."""


def run(
    model: Annotated[
        str | None,
        typer.Argument(
            help="Folder of a model or of an analysis, or id on the Hugging Face Hub.", metavar="MODEL|SENS"
        ),
    ] = None,
    strategy: Annotated[
        str, typer.Option(help="How the budget is shared out: uniform, mxq, sensiboost, kurtboost or pqi.")
    ] = "pqi",
    avg_bits: Annotated[
        float | None, typer.Option(help="Bits of storage for each weight of the plan, everything included.")
    ] = None,
    target_size: Annotated[
        str | None, typer.Option(help="The same budget as a size of all quantized matrices: 4.2GiB, 900MB, 123456.")
    ] = None,
    output: Annotated[str | None, typer.Option("-o", "--output", help="File to write.", metavar="PLAN")] = None,
    table: Annotated[
        str | None,
        typer.Option(
            help="A published cost table (CSV) in place of a model; for the published strategies.",
            rich_help_panel=METHOD,
        ),
    ] = None,
    bits: Annotated[
        str | None,
        typer.Option(
            help="Bits to choose from, with commas: 2,3,4,8.",
            show_default="2 to 8; 2,3,4,8 for mxq, sensiboost and kurtboost",
        ),
    ] = None,
    group_sizes: Annotated[
        str | None,
        typer.Option(
            help="Group sizes to choose from, with commas: 32,64,128.", show_default="32,64,128, and as analyzed"
        ),
    ] = None,
    outlier_fractions: Annotated[
        str, typer.Option(help="Fractions of weights kept exactly, 0 to 1, to choose from: 0,0.005.")
    ] = "0",
    method: Annotated[
        str | None,
        typer.Option(
            help="How codes are found: one of 'quantrature list methods'.",
            show_default="as analyzed; else rtn for pqi and uniform, hqq for the others",
        ),
    ] = None,
    meta_bits: Annotated[
        int | None,
        typer.Option(
            help="Bits of quantized scales and zero points; 0 stores them as float16.",
            show_default="8 for mxq, sensiboost and kurtboost; else 0",
            rich_help_panel=METHOD,
        ),
    ] = None,
    groups: Annotated[
        str | None,
        typer.Option(
            help="fused stores alike what serving engines fuse; none does not.",
            show_default="fused for pqi, else none",
            rich_help_panel=CONSTRAINTS,
        ),
    ] = None,
    pin: Annotated[
        list[str] | None,
        typer.Option(
            help="MATRIX=4 or MATRIX=b4g64; MATRIX may be re:PATTERN; repeatable.", rich_help_panel=CONSTRAINTS
        ),
    ] = None,
    min_bits: Annotated[
        list[str] | None, typer.Option(help="MATRIX=4: no fewer bits; repeatable.", rich_help_panel=CONSTRAINTS)
    ] = None,
    max_bits: Annotated[
        list[str] | None, typer.Option(help="MATRIX=4: no more bits; repeatable.", rich_help_panel=CONSTRAINTS)
    ] = None,
    skip: Annotated[
        list[str] | None, typer.Option(help="Matrix to leave as it is; repeatable.", rich_help_panel=CONSTRAINTS)
    ] = None,
    boost_stops: Annotated[
        int, typer.Option(help="How far up the ladder of settings a boost goes.", rich_help_panel=METHOD)
    ] = 2,
    top_m: Annotated[
        int,
        typer.Option(
            help="Number of layers to boost in each module; 0 for all conspicuous ones.", rich_help_panel=METHOD
        ),
    ] = 0,
    weights: Annotated[
        str | None, typer.Option(help="The model that SENS is of, to measure settings that it does not have.")
    ] = None,
    calibration: Calibration = None,
    nsamples: Nsamples = 128,
    seqlen: Seqlen = None,
    seed: Seed = 0,
    bos: Bos = "auto",
    text_column: TextColumn = None,
    nodes: Annotated[
        int,
        typer.Option(help="Gradient evaluations for each window, of an analysis for pqi.", rich_help_panel=CALIBRATION),
    ] = 4,
    validate: Annotated[
        int,
        typer.Option(
            help="Number of random plans to measure, to tell how well they are predicted.", rich_help_panel=OUTPUT
        ),
    ] = 0,
    dtype: Annotated[
        str, typer.Option(help="What to analyze in: auto, float32, bfloat16.", rich_help_panel=MEMORY)
    ] = "float32",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what it would take.", rich_help_panel=OUTPUT)
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Choose how each matrix is stored, within a budget."""
    if (model is None) == (table is None):
        raise InvalidArgumentError("[plan] takes either a model, an analysis of one, or --table")
    with stdout_kept_clean(as_json):
        from ..allocation import STRATEGIES, allocate

        if strategy not in STRATEGIES:
            raise InvalidArgumentError(f"[plan] --strategy must be one of {', '.join(STRATEGIES)}: got {strategy}")
        if method in STRATEGIES:
            raise InvalidArgumentError(
                f"[plan] --method says how codes are found; for {method}, give --strategy {method}"
            )
        if (avg_bits is None) == (target_size is None):
            raise InvalidArgumentError("[plan] a budget is given as either --avg-bits or --target-size")
        target = None if target_size is None else size_in_bytes("plan", target_size)
        wishes: dict[str, Any] = {
            "bits": None if bits is None else _numbers("--bits", bits, int),
            "group_sizes": None if group_sizes is None else _numbers("--group-sizes", group_sizes, int),
            "outlier_fractions": _numbers("--outlier-fractions", outlier_fractions, float),
            "method": method,
            "groups": groups,
            "pin": _pairs("--pin", pin),
            "minimum": {name: _whole("--min-bits", value) for name, value in _pairs("--min-bits", min_bits).items()},
            "maximum": {name: _whole("--max-bits", value) for name, value in _pairs("--max-bits", max_bits).items()},
            "skip": skip or (),
            "stops": boost_stops,
            "top_m": top_m,
            "progress": False if as_json else None,
        }
        for fraction in wishes["outlier_fractions"]:
            check_fraction("plan", "--outlier-fractions", fraction)
        if meta_bits is not None:
            wishes["meta_bits"] = meta_bits or None
        if table is not None:
            found = _of_table(table, strategy, avg_bits, boost_stops, top_m)
        else:
            assert model is not None
            text = {"nsamples": nsamples, "seqlen": seqlen, "seed": seed, "bos": bos, "text_column": text_column}
            made = _Model(model, dtype, trust_remote_code, calibration, text, nodes, wishes["progress"])
            if validate and (strategy != "pqi" or made.analyzed):
                raise InvalidArgumentError("[plan] --validate is for plans by pqi from a model")
            if dry_run:
                cost = made.cost(strategy, wishes)
            else:
                source, more = made.source(strategy, method)
                if weights is not None:
                    more["weights"] = weights
                plan = allocate(
                    source,
                    strategy=strategy,
                    avg_bits=avg_bits,
                    target_bytes=target,
                    trust_remote_code=trust_remote_code,
                    **wishes,
                    **more,
                )
                if validate:
                    plan = made.validated(plan, source, validate)
                if output is not None:
                    _write(plan, output)
    if table is not None:
        if as_json:
            print_json(found)
        else:
            print_table(f"{table}: {strategy}", [(name, str(found[name])) for name in found if name != "allocation"])
    elif dry_run:
        if as_json:
            print_json(cost)
        else:
            print_table(f"plan of {model}", [(name.replace("_", " "), f"{value:,}") for name, value in cost.items()])
    elif as_json:
        print_json(plan.to_json())
    else:
        print_table(f"{model}: {len(plan)} matrices", _rows(plan, output))


class _Model:
    """What the verb's argument turns out to be, and what a strategy makes of it."""

    def __init__(
        self,
        path: str,
        dtype: str,
        trust_remote_code: bool,
        calibration: str | None,
        text: Mapping[str, Any],
        nodes: int,
        progress: bool | None,
    ) -> None:
        from ..analysis.sensitivity import SUMMARY

        self.path, self.dtype, self.trust_remote_code = path, dtype, trust_remote_code
        self.calibration, self.text, self.nodes, self.progress = calibration, text, nodes, progress
        self.loaded: Any = None
        self.tokens: Any = None
        self.tokenizer: Any = None
        self.analyzed = (Path(path) / SUMMARY).is_file()

    def source(self, strategy: str, method: str | None) -> tuple[Any, dict[str, Any]]:
        """What to allocate from, and further arguments."""
        if strategy == "sensiboost":
            if self.analyzed:
                raise InvalidArgumentError("[plan] sensiboost measures outputs: give it the model, not an analysis")
            from ..allocation.activation import activation_sensitivity

            model, tokens = self._loaded(strategy)
            return model, {"sensitivity": activation_sensitivity(model, tokens, progress=self.progress)}
        if strategy != "pqi" or self.analyzed:
            return self.path, {}
        from ..analysis import analyze

        model, tokens = self._loaded(strategy)
        self.loaded, self.tokens = model, tokens
        found = analyze(
            model,
            tokens,
            metrics=["pqi", "kurtosis"],
            bits=REFERENCE_BITS,
            method=method or "rtn",
            nodes=self.nodes,
            tokenizer=self.tokenizer,
            seed=self.text["seed"],
            progress=self.progress,
        )
        return found, {"weights": self.path}

    def validated(self, plan: Plan, sensitivity: Any, count: int) -> Plan:
        """The plan with the validation of its predictions, on the text of the analysis."""
        from dataclasses import replace

        from ..allocation import validate

        found = validate(self.loaded, self.tokens, sensitivity, count=count, progress=self.progress)
        return replace(plan, allocation={**plan.allocation, "validation": found.to_json()})

    def cost(self, strategy: str, wishes: Mapping[str, Any]) -> dict[str, Any]:
        """What it would take."""
        from ..allocation import estimate

        passed = {
            name: wishes[name]
            for name in ("bits", "group_sizes", "outlier_fractions", "method", "meta_bits")
            if name in wishes
        }
        cost = estimate(self.path, strategy=strategy, trust_remote_code=self.trust_remote_code, **passed)
        if strategy in ("pqi", "sensiboost") and not self.analyzed:
            from ..models import find_linears
            from ._estimate import analyzing

            model, tokens = self._loaded(strategy)
            passes = self.nodes * len(REFERENCE_BITS) if strategy == "pqi" else 1
            more = analyzing(model, tokens, find_linears(model, experts=False), passes, 1)
            cost["memory_bytes"] += more.memory_bytes
            cost["seconds"] = round(cost["seconds"] + more.seconds, 1)
        return cost

    def _loaded(self, strategy: str) -> tuple[Any, Any]:
        from .. import models
        from ..text import token_windows

        if self.calibration is None:
            raise InvalidArgumentError(f"[plan] --calibration must name the text that {strategy} needs")
        config = models.load_config(self.path, self.trust_remote_code)
        models.check_dense("plan", config)
        self.tokenizer = models.load_tokenizer(self.path, self.trust_remote_code)
        tokens = token_windows(self.calibration, self.tokenizer, model=config, **self.text)
        return models.load_model(self.path, self.dtype, trust_remote_code=self.trust_remote_code), tokens


def _of_table(path: str, strategy: str, avg_bits: float | None, stops: int, top_m: int) -> dict[str, Any]:
    from ..allocation import boost, mxq, read_table

    if strategy not in ("mxq", "sensiboost", "kurtboost"):
        raise InvalidArgumentError(f"[plan] --table is for mxq, sensiboost and kurtboost: got {strategy}")
    if avg_bits is None:
        raise InvalidArgumentError("[plan] with --table a budget is given as --avg-bits")
    costs = read_table(path)
    found = mxq(costs, avg_bits) if strategy == "mxq" else boost(costs, strategy, avg_bits, stops, top_m)
    return found.to_json(costs)


def _rows(plan: Plan, output: str | None) -> list[tuple[str, str]]:
    about = plan.allocation
    rows = [
        ("strategy", f"{about['strategy']}, quantized by {about['method']}"),
        ("bits per weight", f"{about['bits_per_weight']:.4f}"),
        ("bytes", f"{about['bytes']:,} of {about['budget_bytes']:,}"),
    ]
    if about.get("predicted_loss_change") is not None:
        rows.append(("predicted loss change", f"{about['predicted_loss_change']:+.6f} nats a token"))
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


def _write(plan: Plan, output: str) -> None:
    try:
        plan.save(output)
    except OSError as error:
        raise InvalidArgumentError(f"[plan] cannot write {output}: {error.strerror}") from None


def _numbers(option: str, text: str, kind: Any) -> list[Any]:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise InvalidArgumentError(f"[plan] {option} must be numbers with commas between: got {text!r}") from None


def _whole(option: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise InvalidArgumentError(f"[plan] {option} must be MATRIX=BITS: got {text!r} for the bits") from None


def _pairs(option: str, given: Sequence[str] | None) -> dict[str, str]:
    pairs = {}
    for text in given or ():
        name, equals, value = text.rpartition("=")
        if not (name and equals and value):
            raise InvalidArgumentError(f"[plan] {option} must be MATRIX=VALUE: got {text!r}")
        pairs[name] = value
    return pairs
