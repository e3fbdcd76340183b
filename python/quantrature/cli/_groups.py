"""Groups of options. Each group is a dataclass: its fields are command-line options, a command gets the instance."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from .._C import InvalidArgumentError
from ._input import size_in_bytes
from ._options import (
    BOS_HELP,
    CALIBRATION,
    MEMORY,
    RESUMING,
    SEQLEN_DEFAULT,
    TEXT_COLUMN_HELP,
    Dtype,
    Ignore,
    TrustRemoteCode,
)

if TYPE_CHECKING:
    import torch

    from ..text import CalibrationText

CUT = ("nsamples", "seqlen", "seed", "bos", "text_column")
"""Options that say how windows are cut."""


def as_command(verb: Callable[..., None]) -> Callable[..., None]:
    """Wrap a command for Typer: replace each parameter that is a group by the fields of the group."""
    parameters: list[inspect.Parameter] = []
    groups: dict[str, Any] = {}
    hints = get_type_hints(verb, include_extras=True)
    for name, parameter in inspect.signature(verb).parameters.items():
        kind = hints[name]
        if not is_dataclass(kind):
            parameters.append(parameter.replace(kind=parameter.KEYWORD_ONLY, annotation=kind))
            continue
        groups[name] = kind
        of_fields = get_type_hints(kind, include_extras=True)
        for field in fields(kind):
            default = parameter.empty if field.default is MISSING else field.default
            parameters.append(
                inspect.Parameter(field.name, parameter.KEYWORD_ONLY, default=default, annotation=of_fields[field.name])
            )

    @functools.wraps(verb)
    def command(**given: Any) -> None:
        values = {name: kind(**{f.name: given.pop(f.name) for f in fields(kind)}) for name, kind in groups.items()}
        verb(**given, **values)

    del command.__dict__["__wrapped__"]  # whose signature would count
    command.__dict__["__signature__"] = inspect.Signature(parameters)
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


@dataclass(frozen=True)
class Text:
    """Calibration text, and how it is cut into windows."""

    calibration: Annotated[
        str | None,
        typer.Option(
            help="Calibration text: a .txt, .jsonl or .json file, or a dataset: NAME[:CONFIGURATION[:SPLIT]].",
            rich_help_panel=CALIBRATION,
        ),
    ] = None
    nsamples: Annotated[
        int | None,
        typer.Option(help="Number of windows to draw from the calibration text.", rich_help_panel=CALIBRATION),
    ] = 128
    seqlen: Annotated[
        int | None,
        typer.Option(
            help="Tokens per window.",
            show_default=SEQLEN_DEFAULT,
            rich_help_panel=CALIBRATION,
        ),
    ] = None
    seed: Annotated[int, typer.Option(help="Random seed for drawing windows.", rich_help_panel=CALIBRATION)] = 0
    bos: Annotated[
        str,
        typer.Option(help=BOS_HELP, rich_help_panel=CALIBRATION),
    ] = "auto"
    text_column: Annotated[
        str | None,
        typer.Option(help=TEXT_COLUMN_HELP, metavar="NAME", rich_help_panel=CALIBRATION),
    ] = None
    batch_size: Annotated[int, typer.Option(help="Windows per forward pass.", rich_help_panel=CALIBRATION)] = 1

    @property
    def cut(self) -> dict[str, Any]:
        """How to cut windows, as arguments of :func:`quantrature.text.token_windows`."""
        return {name: value for name, value in vars(self).items() if name in CUT}

    def read_with(self, tokenizer: Any) -> CalibrationText:
        """Return the text for a tokenizer; it has not been read yet."""
        from ..text import CalibrationText

        return CalibrationText(self.calibration, tokenizer, **self.cut)


@dataclass(frozen=True)
class Loading:
    """How to load a model: dtype, devices, memory limits, and whether its own code may run."""

    dtype: Dtype = "float32"
    device_map: Annotated[
        str | None,
        typer.Option(
            help="Where to put the weights, as device_map in transformers: auto, cuda:0.",
            show_default="CPU",
            rich_help_panel=MEMORY,
        ),
    ] = None
    max_memory: Annotated[
        list[str] | None,
        typer.Option(
            help="DEVICE=SIZE: most memory for weights on a device, such as 0=20GiB or cpu=64GiB; repeatable. Needs "
            "--device-map.",
            rich_help_panel=MEMORY,
        ),
    ] = None
    trust_remote_code: TrustRemoteCode = False

    def limits(self, verb: str) -> dict[int | str, int | str] | None:
        """Return the memory limit of each device, in bytes; ``None`` for no limits.

        Raises:
            InvalidArgumentError: for a value that is not ``DEVICE=SIZE``, or for limits without a device map.
        """
        if self.max_memory and self.device_map is None:
            raise InvalidArgumentError(f"[{verb}] --max-memory needs --device-map: add --device-map auto")
        limits: dict[int | str, int | str] = {}
        for text in self.max_memory or ():
            device, equals, size = text.partition("=")
            if not (device and equals and size):
                raise InvalidArgumentError(f"[{verb}] --max-memory must be DEVICE=SIZE: got {text!r}")
            limits[int(device) if device.isdigit() else device] = size_in_bytes(verb, size, "--max-memory")
        return limits or None

    def config(self, model: str, verb: str) -> Any:
        """Load the model's configuration; refuse a model that is already quantized."""
        from .. import models

        config = models.load_config(model, self.trust_remote_code)
        models.check_dense(verb, config)
        return config

    def tokenizer(self, model: str) -> Any:
        """Load the model's tokenizer."""
        from .. import models

        return models.load_tokenizer(model, self.trust_remote_code)

    def load(self, model: str, verb: str) -> torch.nn.Module:
        """Load the model."""
        from .. import models

        return models.load_model(model, self.dtype, self.device_map, self.trust_remote_code, self.limits(verb))


@dataclass(frozen=True)
class Gradients:
    """How gradients are computed: their number, and options that save memory."""

    nodes: Annotated[
        int, typer.Option(help="Gradient evaluations per window and integral.", rich_help_panel=CALIBRATION)
    ] = 4
    checkpointing: Annotated[
        bool,
        typer.Option(
            "--gradient-checkpointing",
            help="Recompute activations in the backward pass: slower, less memory.",
            rich_help_panel=MEMORY,
        ),
    ] = False
    map_folder: Annotated[
        str | None,
        typer.Option(
            help="Keep original weights and gradient sums in files of this folder, not in memory.",
            rich_help_panel=MEMORY,
        ),
    ] = None


@dataclass(frozen=True)
class Quadrature(Gradients):
    """Which quadrature rule approximates the integral."""

    rule: Annotated[
        str,
        typer.Option(
            help="Quadrature rule: gauss, midpoint, trapezoid, left, right or paper.", rich_help_panel=CALIBRATION
        ),
    ] = "gauss"


@dataclass(frozen=True)
class Grid:
    """How weights are quantized, besides the number of bits."""

    group_size: Annotated[
        int, typer.Option(help="Consecutive weights that share one scale; -1: one scale per row.")
    ] = 64
    method: Annotated[str, typer.Option(help="Quantization method; 'quantrature list methods' shows all.")] = "rtn"
    sym: Annotated[bool, typer.Option("--sym", help="Quantize symmetrically around zero, without zero points.")] = False
    zero: Annotated[str, typer.Option(help="Zero points: float, or integer, as most inference engines need them.")] = (
        "float"
    )
    scale_dtype: Annotated[
        str,
        typer.Option(
            help="Dtype of scales and zero points: auto, float32, float16, bfloat16, or e8m0 (powers of two)."
        ),
    ] = "auto"
    ignore: Ignore = None

    @property
    def arguments(self) -> dict[str, Any]:
        """The options as arguments of the library's functions."""
        return {**vars(self), "ignore": self.ignore or ()}


@dataclass(frozen=True)
class Resuming:
    """Whether and from where to resume an interrupted run."""

    resume: Annotated[
        str,
        typer.Option(
            help="Resume an interrupted run of the same command: auto (if there is one), required (else fail) or "
            "never (start over).",
            rich_help_panel=RESUMING,
        ),
    ] = "auto"
    resume_folder: Annotated[
        str | None,
        typer.Option(
            help="Folder for the state from which an interrupted run resumes.",
            show_default="OUT.resume",
            rich_help_panel=RESUMING,
        ),
    ] = None

    def beside(self, output: str | None) -> dict[str, Any]:
        """Return ``resume`` and ``resume_folder``; the default folder is ``OUT.resume``, beside the output."""
        folder = self.resume_folder
        if folder is None and output is not None:
            folder = f"{Path(output)}.resume"
        return {"resume": self.resume, "resume_folder": folder}
