"""Options that several verbs have, each with one name, one type and one text of ``--help``."""

from __future__ import annotations

from typing import Annotated

import typer

CALIBRATION = "Calibration text and integrals"
METHOD = "Settings of methods"
REQUANT = "ReQuant"
CONSTRAINTS = "Constraints"
MEMORY = "Memory"
RESUMING = "Resuming"
OUTPUT = "Output"
"""Panels of ``--help``, after the one of the options that most need."""

ModelArgument = Annotated[str, typer.Argument(help="Folder, or id on the Hugging Face Hub.", metavar="MODEL")]
Dtype = Annotated[str, typer.Option(help="What to run in: auto, float32, bfloat16, float16.", rich_help_panel=MEMORY)]
Objective = Annotated[
    str,
    typer.Option(
        help="What is integrated: nll, the loss, or kl, the divergence from the original's predictions.",
        rich_help_panel=CALIBRATION,
    ),
]
Ignore = Annotated[list[str] | None, typer.Option(help="Matrix to leave alone, or re:PATTERN; repeatable.")]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace an output folder that is not empty.", rich_help_panel=OUTPUT)
]
MaxShardSize = Annotated[str, typer.Option(help="Of one safetensors file.", rich_help_panel=OUTPUT)]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only say what it would take.", rich_help_panel=OUTPUT)]
Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else there.", rich_help_panel=OUTPUT)
]
