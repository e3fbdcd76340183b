"""Options that several commands share, each with one name, one type and one help text."""

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
"""Panels of ``--help``. They follow the panel "Options", which holds the most common options."""

BOS_HELP = (
    "Where to add the BOS token: window (at the start of each window), text (once, before the text), none, or auto "
    "(window if the tokenizer adds BOS by default, else none)."
)
TEXT_COLUMN_HELP = (
    "Field of each .jsonl, .json or dataset row that holds the text; by default text, content, messages, "
    "conversations, instruction with output, or input_ids."
)
SEQLEN_DEFAULT = "2048, or the model's context length if shorter"

ModelArgument = Annotated[
    str, typer.Argument(help="Model folder, or model id on the Hugging Face Hub.", metavar="MODEL")
]
Dtype = Annotated[
    str,
    typer.Option(
        help="Load and run the model in this dtype: auto, float32, bfloat16 or float16.", rich_help_panel=MEMORY
    ),
]
Objective = Annotated[
    str,
    typer.Option(
        help="What to integrate: nll, the loss, or kl, the KL divergence from the original model's predictions.",
        rich_help_panel=CALIBRATION,
    ),
]
Ignore = Annotated[list[str] | None, typer.Option(help="Do not quantize this matrix: a name, or re:REGEX; repeatable.")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code from the model's folder, as in transformers.")
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace an output folder that is not empty.", rich_help_panel=OUTPUT)
]
MaxShardSize = Annotated[
    str, typer.Option(help="Largest size of one safetensors file, such as 5GB.", rich_help_panel=OUTPUT)
]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Only estimate size, memory and time; write nothing.", rich_help_panel=OUTPUT),
]
Json = Annotated[
    bool, typer.Option("--json", help="Print the result as one JSON object on stdout.", rich_help_panel=OUTPUT)
]
