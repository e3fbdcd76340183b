"""Options that go together, each group one value: a verb takes the value, the command line has its fields."""

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
from ._options import CALIBRATION, MEMORY, RESUMING, Dtype, Ignore, TrustRemoteCode

if TYPE_CHECKING:
    import torch


def as_command(verb: Callable[..., None]) -> Callable[..., None]:
    """The verb as Typer takes it: in the place of each parameter that is a group, the fields of the group."""
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
    """The text that a model is run on, and how it is cut."""

    calibration: Annotated[
        str | None,
        typer.Option(
            help="Text to calibrate on: a .txt, .jsonl or .json file, or a data set: NAME[:CONFIGURATION[:SPLIT]].",
            rich_help_panel=CALIBRATION,
        ),
    ] = None
    nsamples: Annotated[int | None, typer.Option(help="Windows of calibration text.", rich_help_panel=CALIBRATION)] = (
        128
    )
    seqlen: Annotated[
        int | None,
        typer.Option(
            help="Tokens in a window.",
            show_default="2048, or what the model was built for",
            rich_help_panel=CALIBRATION,
        ),
    ] = None
    seed: Annotated[int, typer.Option(help="For the choice of windows.", rich_help_panel=CALIBRATION)] = 0
    bos: Annotated[
        str,
        typer.Option(
            help="Where the BOS token goes: window (first of each window), text (once, before the text), none, or "
            "auto: window if the tokenizer adds BOS by itself.",
            rich_help_panel=CALIBRATION,
        ),
    ] = "auto"
    text_column: Annotated[
        str | None,
        typer.Option(
            help="Field that has the text in rows of .jsonl, .json and data sets; by default text, content, messages, "
            "conversations, instruction with output, or input_ids.",
            metavar="NAME",
            rich_help_panel=CALIBRATION,
        ),
    ] = None
    batch_size: Annotated[int, typer.Option(help="Windows in one forward pass.", rich_help_panel=CALIBRATION)] = 1

    @property
    def cut(self) -> dict[str, Any]:
        """How windows are cut, as :func:`quantrature.text.token_windows` takes it."""
        return {
            "nsamples": self.nsamples,
            "seqlen": self.seqlen,
            "seed": self.seed,
            "bos": self.bos,
            "text_column": self.text_column,
        }

    def windows(self, tokenizer: Any, model: Any, **other: Any) -> torch.Tensor:
        """The windows, for a model or its configuration; ``other`` comes in the place of what was asked for."""
        from ..text import token_windows

        return token_windows(self.calibration, tokenizer, model=model, **{**self.cut, **other})


@dataclass(frozen=True)
class Loading:
    """A model that is loaded, where to, and what of it may run."""

    dtype: Dtype = "float32"
    device_map: Annotated[
        str | None, typer.Option(help="As in transformers, for example auto.", rich_help_panel=MEMORY)
    ] = None
    max_memory: Annotated[
        list[str] | None,
        typer.Option(
            help="DEVICE=SIZE: what the weights may take there, 0=20GiB or cpu=64GiB; repeatable.",
            rich_help_panel=MEMORY,
        ),
    ] = None
    trust_remote_code: TrustRemoteCode = False

    def limits(self, verb: str) -> dict[int | str, int | str] | None:
        """What the weights may take of each device; ``None`` for no limits.

        Raises:
            InvalidArgumentError: for anything but ``DEVICE=SIZE``, or limits without a device map.
        """
        if self.max_memory and self.device_map is None:
            raise InvalidArgumentError(f"[{verb}] --max-memory goes with --device-map")
        limits: dict[int | str, int | str] = {}
        for text in self.max_memory or ():
            device, equals, size = text.partition("=")
            if not (device and equals and size):
                raise InvalidArgumentError(f"[{verb}] --max-memory must be DEVICE=SIZE: got {text!r}")
            limits[int(device) if device.isdigit() else device] = size_in_bytes(verb, size, "--max-memory")
        return limits or None

    def config(self, model: str, verb: str) -> Any:
        """The configuration of a model that is not quantized."""
        from .. import models

        config = models.load_config(model, self.trust_remote_code)
        models.check_dense(verb, config)
        return config

    def tokenizer(self, model: str) -> Any:
        """Its tokenizer."""
        from .. import models

        return models.load_tokenizer(model, self.trust_remote_code)

    def load(self, model: str, verb: str) -> torch.nn.Module:
        """The model."""
        from .. import models

        return models.load_model(model, self.dtype, self.device_map, self.trust_remote_code, self.limits(verb))


@dataclass(frozen=True)
class Gradients:
    """How gradients are taken: how many, and how much memory they may have."""

    nodes: Annotated[
        int, typer.Option(help="Gradient evaluations for each window and integral.", rich_help_panel=CALIBRATION)
    ] = 4
    checkpointing: Annotated[
        bool,
        typer.Option(
            "--gradient-checkpointing", help="Trade time for memory in the backward pass.", rich_help_panel=MEMORY
        ),
    ] = False
    map_folder: Annotated[
        str | None,
        typer.Option(help="Keep originals and accumulators in files of this folder.", rich_help_panel=MEMORY),
    ] = None


@dataclass(frozen=True)
class Quadrature(Gradients):
    """How an integral is taken."""

    rule: Annotated[
        str, typer.Option(help="gauss, midpoint, trapezoid, left, right or paper.", rich_help_panel=CALIBRATION)
    ] = "gauss"


@dataclass(frozen=True)
class Grid:
    """What quantized weights are beside their bits."""

    group_size: Annotated[int, typer.Option(help="Weights that share a scale; -1 for one group a row.")] = 64
    method: Annotated[str, typer.Option(help="One of 'quantrature list methods'.")] = "rtn"
    sym: Annotated[bool, typer.Option("--sym", help="Grids symmetric around zero.")] = False
    ignore: Ignore = None

    @property
    def arguments(self) -> dict[str, Any]:
        """As functions take them."""
        return {**vars(self), "ignore": self.ignore or ()}


@dataclass(frozen=True)
class Resuming:
    """Where an interrupted run goes on."""

    resume: Annotated[
        str,
        typer.Option(
            help="Go on where an interrupted run of the same work stopped: auto, required or never.",
            rich_help_panel=RESUMING,
        ),
    ] = "auto"
    resume_folder: Annotated[
        str | None,
        typer.Option(
            help="Where to keep what an interrupted run goes on from.",
            show_default="OUT.resume",
            rich_help_panel=RESUMING,
        ),
    ] = None

    def beside(self, output: str | None) -> dict[str, Any]:
        """Arguments of what can be resumed: the folder is the one that was given, or one beside the output."""
        folder = self.resume_folder
        if folder is None and output is not None:
            folder = f"{Path(output)}.resume"
        return {"resume": self.resume, "resume_folder": folder}
