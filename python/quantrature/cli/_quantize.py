"""``quantrature quantize``: write a quantized copy of a model."""

from __future__ import annotations

import contextlib
import logging
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .._C import InvalidArgumentError
from ._groups import Gradients, Grid, Loading, Resuming, Text
from ._input import check_fraction
from ._options import CALIBRATION, MEMORY, METHOD, OUTPUT, REQUANT, DryRun, Json, MaxShardSize, ModelArgument, Overwrite
from ._output import print_cost, print_json, print_table, stdout_kept_clean
from ._requant import record_rows, summary
from ._to_budget import WithinBudget, quantize_within

if TYPE_CHECKING:
    import torch

    from ..checkpoint import Contents
    from ..models import Linears
    from ..plan import Plan
    from ..requantization import Requantization
    from ._estimate import Cost


@dataclass(frozen=True)
class TextWhereNeeded(Text):
    """Calibration text for ReQuant and for methods that need it."""

    calibration: Annotated[
        str | None,
        typer.Option(
            help="Calibration text, for --requant and methods that need it: a .txt, .jsonl or .json file, or a "
            "dataset: NAME[:CONFIGURATION[:SPLIT]].",
            rich_help_panel=CALIBRATION,
        ),
    ] = None
    nsamples: Annotated[
        int | None,
        typer.Option(
            help="Number of windows to draw from the calibration text; with a budget, --effort says how many.",
            show_default="128; 100 for squeezellm",
            rich_help_panel=CALIBRATION,
        ),
    ] = None
    seqlen: Annotated[
        int | None,
        typer.Option(
            help="Tokens per window; with a budget 512.",
            show_default="2048, 512 for awq and squeezellm; or the model's context length if shorter",
            rich_help_panel=CALIBRATION,
        ),
    ] = None
    true_sequential: Annotated[
        bool,
        typer.Option(
            "--true-sequential/--no-true-sequential",
            help="Within a block, calibrate each matrix on the outputs of the quantized matrices before it.",
            rich_help_panel=CALIBRATION,
        ),
    ] = True


@dataclass(frozen=True)
class GridOrBudget(Grid):
    """How weights are quantized. With a budget, the options have other defaults."""

    group_size: Annotated[
        int | None,
        typer.Option(
            help="Consecutive weights that share one scale; -1: one scale per row. With a budget, also half and twice "
            "as many are tried.",
            show_default="64; 128 with a budget",
        ),
    ] = None  # type: ignore[assignment]  # within() fills it in
    method: Annotated[
        str | None,
        typer.Option(
            help="Quantization method; 'quantrature list methods' shows all.", show_default="rtn; gptq with a budget"
        ),
    ] = None  # type: ignore[assignment]  # within() fills it in

    def within(self, budget: bool) -> Grid:
        """Return the options with their defaults, which depend on whether there is a budget."""
        size, method = (128, "gptq") if budget else (64, "rtn")
        given = vars(self)
        return Grid(**{**given, "group_size": given["group_size"] or size, "method": given["method"] or method})


@dataclass(frozen=True)
class Kept:
    """Weights that are kept unquantized: outliers by magnitude, and with ReQuant significant weights by PQI."""

    outlier_fraction: Annotated[
        float | None,
        typer.Option(
            help="Fraction of weights to keep unquantized because of their magnitude, 0 to 1.",
            show_default="0; 0.0045 with --requant",
        ),
    ] = None
    requant: Annotated[
        bool,
        typer.Option(
            "--requant",
            help="Distribute outliers over matrices by PQI, and also keep the weights of the largest PQI.",
            rich_help_panel=REQUANT,
        ),
    ] = False
    significant_fraction: Annotated[
        float | None,
        typer.Option(
            help="Fraction of weights to keep unquantized because of their PQI, 0 to 1.",
            show_default="0.0005 with --requant",
            rich_help_panel=REQUANT,
        ),
    ] = None
    steps: Annotated[
        int,
        typer.Option(
            help="Number of rounds; each recomputes PQI and keeps an equal share of the significant weights.",
            rich_help_panel=REQUANT,
        ),
    ] = 2
    selection: Annotated[
        str,
        typer.Option(help="How to distribute outliers over matrices: temperature or greedy.", rich_help_panel=REQUANT),
    ] = "temperature"
    objective: Annotated[
        str,
        typer.Option(
            help="What --requant integrates: nll, the loss, or kl, the KL divergence from the original model's "
            "predictions.",
            rich_help_panel=REQUANT,
        ),
    ] = "nll"
    compute_dtype: Annotated[
        str,
        typer.Option(
            help="dtype in which --requant runs the model: float32, bfloat16, float16.", rich_help_panel=MEMORY
        ),
    ] = "float32"

    def check(self) -> None:
        """Check the fractions and the dtype, and that --requant is given if an option needs it.

        Raises:
            InvalidArgumentError: for the first option that is wrong; the message names it.
        """
        if self.significant_fraction is not None and not self.requant:
            raise InvalidArgumentError(
                "[quantize] --significant-fraction needs --requant, which finds the significant weights"
            )
        if self.objective != "nll" and not self.requant:
            raise InvalidArgumentError("[quantize] --objective needs --requant, which integrates it")
        check_fraction("quantize", "--outlier-fraction", self.outlier_fraction)
        check_fraction("quantize", "--significant-fraction", self.significant_fraction)
        if self.compute_dtype not in ("float32", "bfloat16", "float16"):
            raise InvalidArgumentError(
                f"[quantize] --compute-dtype must be float32, bfloat16 or float16: got {self.compute_dtype}"
            )

    @property
    def given(self) -> dict[str, Any]:
        """The options that do not go with a budget, by name; ``None`` for one that is not given."""
        return {"--requant": self.requant or None, "--outlier-fraction": self.outlier_fraction}

    @property
    def by_magnitude(self) -> float:
        """Fraction of outliers; the default depends on --requant."""
        return (0.0045 if self.requant else 0.0) if self.outlier_fraction is None else self.outlier_fraction

    @property
    def of_requant(self) -> dict[str, Any]:
        """The options as arguments of :func:`quantrature.requant`."""
        significant = 0.0005 if self.significant_fraction is None else self.significant_fraction
        return {
            "outlier_fraction": self.by_magnitude,
            "significant_fraction": significant,
            "steps": self.steps,
            "selection": self.selection,
            "objective": self.objective,
        }


@dataclass(frozen=True)
class MethodSettings:
    """Settings that only one method has."""

    damp_percent: Annotated[
        float | None,
        typer.Option(
            help="For gptq: damping added to the Hessian's diagonal, as a fraction of the diagonal's mean.",
            show_default="0.01",
            rich_help_panel=METHOD,
        ),
    ] = None
    desc_act: Annotated[
        bool | None,
        typer.Option(
            "--desc-act/--no-desc-act",
            help="For gptq: quantize columns in the order of decreasing activation size.",
            show_default="desc-act",
            rich_help_panel=METHOD,
        ),
    ] = None
    static_groups: Annotated[
        bool | None,
        typer.Option(
            "--static-groups/--no-static-groups",
            help="For gptq: find all scales from the original weights, or each when its group is reached.",
            show_default="static-groups",
            rich_help_panel=METHOD,
        ),
    ] = None
    option: Annotated[
        list[str] | None,
        typer.Option(help="Set another option of the method, NAME=VALUE; repeatable.", rich_help_panel=METHOD),
    ] = None

    @property
    def given(self) -> dict[str, Any]:
        """The options by name; ``None`` for one that is not given."""
        return {f"--{name.replace('_', '-')}": value for name, value in vars(self).items()}

    def of(self, method: str) -> dict[str, Any]:
        """Return the settings that were given, with the NAME=VALUE pairs.

        Raises:
            InvalidArgumentError: for a pair that is not NAME=VALUE, or a value whose type is not the default's.
        """
        from ..methods import METHODS, check_method

        check_method(method)
        found = {name: value for name, value in vars(self).items() if value is not None and name != "option"}
        for pair in self.option or ():
            name, equals, text = pair.partition("=")
            default = METHODS[method].options.get(name)
            try:
                if not equals:
                    raise ValueError
                if isinstance(default, bool):
                    found[name] = {"true": True, "false": False}[text.lower()]
                else:
                    found[name] = text if default is None else type(default)(text)
            except (KeyError, ValueError):
                raise InvalidArgumentError(f"[quantize] --option must be NAME=VALUE: got {pair!r}") from None
        return found


@dataclass(frozen=True)
class LoadingAsStored(Loading):
    """How to load a model whose dtype is also the dtype of the saved tensors."""

    dtype: Annotated[
        str,
        typer.Option(
            help="dtype of tensors that are not quantized: auto (as in the checkpoint), float32, bfloat16, float16.",
            rich_help_panel=OUTPUT,
        ),
    ] = "auto"


@dataclass(frozen=True)
class Writing:
    """How to write the folder."""

    max_shard_size: MaxShardSize = "5GB"
    auto_map: Annotated[
        bool,
        typer.Option(
            "--auto-map",
            help="Also save Python code: trust_remote_code=True then loads the folder without importing quantrature.",
            rich_help_panel=OUTPUT,
        ),
    ] = False
    overwrite: Overwrite = False


def run(
    model: ModelArgument,
    *,
    output: Annotated[str | None, typer.Option("-o", "--output", help="Folder to write.", metavar="OUT")] = None,
    plan: Annotated[
        str | None, typer.Option(help="A plan.json to follow, instead of --bits, --group-size and the like.")
    ] = None,
    bits: Annotated[int | None, typer.Option(help="Bits per weight of every matrix, 1 to 8.")] = None,
    budget: WithinBudget,
    grid: GridOrBudget,
    meta_bits: Annotated[int | None, typer.Option(help="Quantize scales and zero points to this many bits.")] = None,
    embedding_bits: Annotated[
        int | None,
        typer.Option(help="Also quantize token and output embeddings, to this many bits; 8 is nearly exact."),
    ] = None,
    kept: Kept,
    text: TextWhereNeeded,
    of_method: MethodSettings,
    gradients: Gradients,
    loading: LoadingAsStored,
    resuming: Resuming,
    writing: Writing,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Quantize a model and write it to a folder.

    On several processes (torchrun --no-python quantrature quantize --requant ...), each takes a share of the
    calibration windows.
    """
    if output is None and not dry_run:
        raise InvalidArgumentError("[quantize] -o must name a folder to write")
    if kept.requant and text.calibration is None:
        raise InvalidArgumentError("[quantize] --requant needs a calibration text: give --calibration")
    kept.check()
    loading.limits("quantize")
    settings = grid.within(budget.given)
    if budget.given:
        alone = {"--bits": bits, "--plan": plan, "--meta-bits": meta_bits, "--embedding-bits": embedding_bits}
        alone |= {"--dry-run": dry_run or None, "--nsamples": text.nsamples}
        budget.check({**alone, **kept.given, **of_method.given})
        assert output is not None
        quantize_within(budget, model, output, settings, text, loading, resuming, vars(writing), as_json)
        return
    with stdout_kept_clean(as_json), contextlib.ExitStack() as processes:
        from ..files.new_folder import check_new_folder
        from ..files.resume import check_resume
        from ..models.ranks import joined
        from ..plan import Plan
        from ..quantization import Request, plan_for

        rank = processes.enter_context(joined())
        resumption = resuming.beside(output)
        check_resume("quantize", resumption["resume"], resumption["resume_folder"])
        if output is not None:
            check_new_folder(output, writing.overwrite)
        chosen = None if plan is None else Plan.load(plan)
        loading.config(model, "quantize")
        loaded = loading.load(model, "quantize")
        request = Request(
            bits=bits,
            **settings.arguments,
            meta_bits=meta_bits,
            embedding_bits=embedding_bits,
            options=of_method.of(settings.method),
            plan=chosen,
            outlier_fraction=0.0 if kept.requant else kept.by_magnitude,
        )
        linears, made = plan_for(loaded, request, experts=not kept.requant)
        work = _Work(loaded, linears, made, text, kept)
        work.read_text(model, settings.method, loading, dry_run)
        how = {**resumption, "progress": False if as_json or rank else None}
        if dry_run:
            cost = work.cost(gradients)
        else:
            work.run(gradients, how, rank)
    if dry_run:
        print_cost(f"quantizing {model}", cost, as_json)
    elif not rank:  # the others have the same
        assert output is not None
        with stdout_kept_clean(as_json):
            found = work.save(output, model, writing)
        _print(found, work, model, output, as_json)


class _Work:
    """A loaded model, the plan to quantize it, and the calibration windows."""

    def __init__(self, model: torch.nn.Module, linears: Linears, plan: Plan, text: TextWhereNeeded, kept: Kept) -> None:
        from ..methods import METHODS

        self.model, self.linears, self.plan, self.text, self.kept = model, linears, plan, text, kept
        self.calibrated = [e.method for _, e in plan if not e.keeps and METHODS[e.method].needs]
        self.tokenizer: Any = None
        self.windows: Any = None
        self.record: Requantization | None = None

    def read_text(self, name: str, method: str, loading: Loading, dry_run: bool) -> None:
        """Read the calibration windows, if any are needed, and record their origin in the plan."""
        from ..quantization import text_settings

        needed = self.kept.requant or bool(self.calibrated)
        if needed and self.text.calibration is None:
            raise InvalidArgumentError(
                f"[quantize] method {self.calibrated[0]} needs a calibration text: give --calibration"
            )
        if self.text.calibration is not None and not needed:
            logging.getLogger(__name__).warning("method %s does not use the calibration text", method)
        if needed or not dry_run:
            self.tokenizer = loading.tokenizer(name)
        if not needed:
            return
        wanted = text_settings(self.plan, "auto" if self.text.nsamples is None else self.text.nsamples)
        text = replace(self.text.read_with(self.tokenizer), nsamples=wanted["nsamples"])
        self.windows = text.windows(self.model, wanted["longest"])
        about = text.settings(self.windows, self.model)
        self.plan = replace(self.plan, allocation={**self.plan.allocation, "quantized_on": about})

    def _of_requant(self, gradients: Gradients) -> dict[str, Any]:
        about = {"batch_size": self.text.batch_size, "seed": self.text.seed, "tokenizer": self.tokenizer}
        return {**self.kept.of_requant, **about, **vars(gradients)}

    def cost(self, gradients: Gradients) -> Cost:
        """Return the estimate for --dry-run."""
        from ._estimate import quantizing, requantizing

        if self.kept.requant:
            return requantizing(self.model, self.windows, self.linears, self.plan, self._of_requant(gradients))
        return quantizing(self.model, self.linears, self.plan, self.windows)

    def run(self, gradients: Gradients, how: dict[str, Any], rank: int) -> None:
        """Quantize the model in place. Without ReQuant, only the first process does so."""
        import torch

        from ..models.gradients import computing_in
        from ..quantization import BlockState, quantize_by_plan
        from ..requantization import requant
        from ._estimate import quantizing

        if self.kept.requant:
            with computing_in(self.model, getattr(torch, self.kept.compute_dtype)):
                _, self.record = requant(self.model, self.windows, plan=self.plan, **self._of_requant(gradients), **how)
            return
        if rank:
            return
        if self.calibrated:
            peak = quantizing(self.model, self.linears, self.plan, self.windows).memory_bytes
            print(f"peak memory: about {peak / 2**20:,.0f} MiB, without Python and its libraries", file=sys.stderr)
        folder = how["resume_folder"]
        try:
            quantize_by_plan(
                self.model,
                self.linears,
                self.plan,
                self.windows,
                batch_size=self.text.batch_size,
                true_sequential=self.text.true_sequential,
                state=None if folder is None else BlockState(Path(folder), how["resume"]),
                progress=how["progress"],
            )
        except KeyboardInterrupt:
            if self.calibrated and Path(str(folder)).is_dir():
                print(f"finished blocks are in {folder}; run the same command to resume", file=sys.stderr)
            raise

    def save(self, output: str, source: str, writing: Writing) -> Contents:
        """Write the folder and return a description of its contents."""
        from .. import checkpoint, models

        checkpoint.save(
            self.model,
            output,
            tokenizer=self.tokenizer,
            processor=models.processor_files(source),
            plan=None if self.kept.requant else self.plan,
            requant=self.record,
            source=source,
            **vars(writing),
        )
        return checkpoint.inspect(output)


def _print(found: Contents, work: _Work, model: str, output: str, as_json: bool) -> None:
    if as_json:
        said = {
            "output": output,
            "bits_per_weight": found.bits_per_weight,
            "bytes": found.bytes,
            "other_bytes": found.other_bytes,
            "modules": len(found.modules),
            "predicted_loss_change": work.plan.predicted_loss_change,
        }
        print_json(said if work.record is None else {**said, **summary(work.record)})
        return
    rows = [
        ("matrices", str(len(found.modules))),
        ("bits per weight", f"{found.bits_per_weight:.3f}, scales, zero points and outliers included"),
        ("bytes", f"{found.bytes:,}, and {found.other_bytes:,} for other tensors"),
        *(record_rows(work.record) if work.record is not None else ()),
        ("written to", output),
    ]
    print_table(f"{model}, quantized", rows)
