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

if TYPE_CHECKING:
    import torch

    from ..checkpoint import Contents
    from ..models import Linears
    from ..plan import Plan
    from ..requantization import Requantization
    from ._estimate import Cost


@dataclass(frozen=True)
class TextWhereNeeded(Text):
    """The text of ReQuant and of calibrated methods."""

    calibration: Annotated[
        str | None,
        typer.Option(
            help="Text for --requant and for methods that need it: .txt, .jsonl, .json or a data set, "
            "NAME[:CONFIGURATION[:SPLIT]].",
            rich_help_panel=CALIBRATION,
        ),
    ] = None
    nsamples: Annotated[
        int | None,
        typer.Option(
            help="Windows of calibration text.", show_default="128; 100 for squeezellm", rich_help_panel=CALIBRATION
        ),
    ] = None
    seqlen: Annotated[
        int | None,
        typer.Option(
            help="Tokens in a window.",
            show_default="2048, 512 for awq and squeezellm; or what the model was built for",
            rich_help_panel=CALIBRATION,
        ),
    ] = None
    true_sequential: Annotated[
        bool,
        typer.Option(
            "--true-sequential/--no-true-sequential",
            help="Calibrate on quantized matrices within a block, too.",
            rich_help_panel=CALIBRATION,
        ),
    ] = True


@dataclass(frozen=True)
class Kept:
    """Weights that are kept exactly: for their magnitude, and with ReQuant for their PQI."""

    outlier_fraction: Annotated[
        float | None,
        typer.Option(
            help="Fraction of the weights, 0 to 1, kept exactly for their magnitude.",
            show_default="0; 0.0045 with --requant",
        ),
    ] = None
    requant: Annotated[
        bool,
        typer.Option(
            "--requant",
            help="Share outliers out by PQI, and keep the most significant weights, too.",
            rich_help_panel=REQUANT,
        ),
    ] = False
    significant_fraction: Annotated[
        float | None,
        typer.Option(
            help="Fraction of the weights, 0 to 1, kept exactly for their PQI.",
            show_default="0.0005 with --requant",
            rich_help_panel=REQUANT,
        ),
    ] = None
    steps: Annotated[
        int, typer.Option(help="Integrals over which the significant weights are spread.", rich_help_panel=REQUANT)
    ] = 2
    selection: Annotated[
        str, typer.Option(help="How outliers are shared out: temperature or greedy.", rich_help_panel=REQUANT)
    ] = "temperature"
    compute_dtype: Annotated[
        str,
        typer.Option(help="What --requant runs the model in: float32, bfloat16, float16.", rich_help_panel=MEMORY),
    ] = "float32"

    def check(self) -> None:
        """Refuse what is no fraction, no dtype, or goes with --requant alone.

        Raises:
            InvalidArgumentError: naming the option.
        """
        if self.significant_fraction is not None and not self.requant:
            raise InvalidArgumentError(
                "[quantize] --significant-fraction goes with --requant, which finds the significant weights"
            )
        check_fraction("quantize", "--outlier-fraction", self.outlier_fraction)
        check_fraction("quantize", "--significant-fraction", self.significant_fraction)
        if self.compute_dtype not in ("float32", "bfloat16", "float16"):
            raise InvalidArgumentError(
                f"[quantize] --compute-dtype must be float32, bfloat16 or float16: got {self.compute_dtype}"
            )

    @property
    def by_magnitude(self) -> float:
        """Fraction of the weights; the default depends on ReQuant."""
        return (0.0045 if self.requant else 0.0) if self.outlier_fraction is None else self.outlier_fraction

    @property
    def of_requant(self) -> dict[str, Any]:
        """As :func:`quantrature.requant` takes them."""
        significant = 0.0005 if self.significant_fraction is None else self.significant_fraction
        return {
            "outlier_fraction": self.by_magnitude,
            "significant_fraction": significant,
            "steps": self.steps,
            "selection": self.selection,
        }


@dataclass(frozen=True)
class MethodSettings:
    """Settings of the method's own."""

    damp_percent: Annotated[
        float | None,
        typer.Option(
            help="Of gptq: added to the Hessian's diagonal, a share of its mean.",
            show_default="0.01",
            rich_help_panel=METHOD,
        ),
    ] = None
    desc_act: Annotated[
        bool | None,
        typer.Option(
            "--desc-act/--no-desc-act",
            help="Of gptq: columns by falling activations.",
            show_default="desc-act",
            rich_help_panel=METHOD,
        ),
    ] = None
    static_groups: Annotated[
        bool | None,
        typer.Option(
            "--static-groups/--no-static-groups",
            help="Of gptq: grids of the weights as they are, or found on the way.",
            show_default="static-groups",
            rich_help_panel=METHOD,
        ),
    ] = None
    option: Annotated[
        list[str] | None,
        typer.Option(help="Any other setting of the method, NAME=VALUE; repeatable.", rich_help_panel=METHOD),
    ] = None

    def of(self, method: str) -> dict[str, Any]:
        """Those that were given, and the NAME=VALUE pairs.

        Raises:
            InvalidArgumentError: for a pair that is none, or a value of another type than the default's.
        """
        from ..methods import METHODS, solver_of

        solver_of(method)
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
    """A model in the dtype in which it is written."""

    dtype: Annotated[
        str,
        typer.Option(help="Of all that is not quantized: auto, float32, bfloat16, float16.", rich_help_panel=OUTPUT),
    ] = "auto"


@dataclass(frozen=True)
class Writing:
    """How the folder is written."""

    max_shard_size: MaxShardSize = "5GB"
    auto_map: Annotated[
        bool,
        typer.Option(
            "--auto-map",
            help="Write code, too, that opens the folder with trust_remote_code, not importing.",
            rich_help_panel=OUTPUT,
        ),
    ] = False
    overwrite: Overwrite = False


def run(
    model: ModelArgument,
    *,
    output: Annotated[str | None, typer.Option("-o", "--output", help="Folder to write.", metavar="OUT")] = None,
    plan: Annotated[str | None, typer.Option(help="A plan.json, in place of the grid options.")] = None,
    bits: Annotated[int | None, typer.Option(help="1 to 8, the same everywhere.")] = None,
    grid: Grid,
    meta_bits: Annotated[int | None, typer.Option(help="Bits of quantized scales and zero points.")] = None,
    embedding_bits: Annotated[
        int | None, typer.Option(help="Quantize the token and the output embedding, too; 8 loses next to nothing.")
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

    Processes that torchrun starts (torchrun --no-python quantrature quantize --requant ...) divide the windows of
    calibration text among them.
    """
    if output is None and not dry_run:
        raise InvalidArgumentError("[quantize] -o must name a folder to write")
    if kept.requant and text.calibration is None:
        raise InvalidArgumentError("[quantize] --requant needs --calibration, a text to integrate on")
    kept.check()
    loading.limits("quantize")
    with stdout_kept_clean(as_json), contextlib.ExitStack() as processes:
        from ..files.new_folder import check_new_folder
        from ..models.ranks import joined
        from ..plan import Plan
        from ..quantization.model import plan_for

        rank = processes.enter_context(joined())
        if output is not None:
            check_new_folder(output, writing.overwrite)
        chosen = None if plan is None else Plan.load(plan)
        loading.config(model, "quantize")
        loaded = loading.load(model, "quantize")
        linears, made = plan_for(
            loaded,
            bits=bits,
            **grid.arguments,
            meta_bits=meta_bits,
            embedding_bits=embedding_bits,
            options=of_method.of(grid.method),
            plan=chosen,
            outlier_fraction=0.0 if kept.requant else kept.by_magnitude,
            experts=not kept.requant,
        )
        work = _Work(loaded, linears, made, text, kept)
        work.read_text(model, grid.method, loading, dry_run)
        how = {**resuming.beside(output), "progress": False if as_json or rank else None}
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
    """A loaded model, what is to become of it, and the text for that."""

    def __init__(self, model: torch.nn.Module, linears: Linears, plan: Plan, text: TextWhereNeeded, kept: Kept) -> None:
        from ..methods import SOLVERS

        self.model, self.linears, self.plan, self.text, self.kept = model, linears, plan, text, kept
        self.calibrated = [e.solver for _, e in plan if not e.keeps and SOLVERS[e.solver].needs]
        self.tokenizer: Any = None
        self.windows: Any = None
        self.record: Requantization | None = None

    def read_text(self, name: str, method: str, loading: Loading, dry_run: bool) -> None:
        """Read the windows, if the work needs some, and note in the plan what they are."""
        from ..quantization.model import text_settings
        from ..text import bos_of

        needed = self.kept.requant or bool(self.calibrated)
        if needed and self.text.calibration is None:
            raise InvalidArgumentError(f"[quantize] method {self.calibrated[0]} needs --calibration, a text")
        if self.text.calibration is not None and not needed:
            logging.getLogger(__name__).warning("method %s reads no calibration text", method)
        if needed or not dry_run:
            self.tokenizer = loading.tokenizer(name)
        if not needed:
            return
        wanted = text_settings(self.plan, "auto" if self.text.nsamples is None else self.text.nsamples)
        self.windows = self.text.windows(self.tokenizer, self.model, **wanted)
        about = {
            "nsamples": len(self.windows),
            "seqlen": self.windows.shape[1],
            "bos": bos_of(self.windows, self.tokenizer, self.model),
            "seed": self.text.seed,
        }
        self.plan = replace(self.plan, allocation={**self.plan.allocation, "quantized_on": about})

    def _of_requant(self, gradients: Gradients) -> dict[str, Any]:
        about = {"batch_size": self.text.batch_size, "seed": self.text.seed, "tokenizer": self.tokenizer}
        return {**self.kept.of_requant, **about, **vars(gradients)}

    def cost(self, gradients: Gradients) -> Cost:
        """What it would take."""
        from ._estimate import quantizing, requantizing

        if self.kept.requant:
            return requantizing(self.model, self.windows, self.linears, self.plan, self._of_requant(gradients))
        return quantizing(self.model, self.linears, self.plan, self.windows)

    def run(self, gradients: Gradients, how: dict[str, Any], rank: int) -> None:
        """Quantize the model in place; without ReQuant the first process alone does it."""
        import torch

        from ..models.gradients import computing_in
        from ..quantization.model import quantize
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
            print(f"memory at the peak: about {peak / 2**20:,.0f} MiB and the program's own", file=sys.stderr)
        try:
            quantize(
                self.model,
                plan=self.plan,
                calibration=self.windows,
                nsamples=None,
                batch_size=self.text.batch_size,
                true_sequential=self.text.true_sequential,
                **how,
            )
        except KeyboardInterrupt:
            folder = how["resume_folder"]
            if self.calibrated and Path(str(folder)).is_dir():
                print(f"finished blocks are in {folder}; the same command goes on from there", file=sys.stderr)
            raise

    def save(self, output: str, source: str, writing: Writing) -> Contents:
        """Write the folder; what is in it."""
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
        ("bits per weight", f"{found.bits_per_weight:.3f}, scales, zeros and outliers included"),
        ("bytes", f"{found.bytes:,} and {found.other_bytes:,} of other tensors"),
        *(record_rows(work.record) if work.record is not None else ()),
        ("written to", output),
    ]
    print_table(f"{model}, quantized", rows)
