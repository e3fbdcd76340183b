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
TextFile = Annotated[
    str | None, typer.Option(help="A .txt, .jsonl or .json file, or a data set: NAME[:CONFIGURATION[:SPLIT]].")
]
Calibration = Annotated[
    str | None,
    typer.Option(
        help="Text to calibrate on: a .txt, .jsonl or .json file, or a data set: NAME[:CONFIGURATION[:SPLIT]].",
        rich_help_panel=CALIBRATION,
    ),
]
Nsamples = Annotated[int, typer.Option(help="Windows of calibration text.", rich_help_panel=CALIBRATION)]
Seqlen = Annotated[
    int | None,
    typer.Option(
        help="Tokens in a window.", show_default="2048, or what the model was built for", rich_help_panel=CALIBRATION
    ),
]
Bos = Annotated[
    str,
    typer.Option(
        help="Where the BOS token goes: window (first of each window), text (once, before the text), none, or auto: "
        "window if the tokenizer adds BOS by itself.",
        rich_help_panel=CALIBRATION,
    ),
]
TextColumn = Annotated[
    str | None,
    typer.Option(
        help="Field that has the text in rows of .jsonl, .json and data sets; by default text, content, messages, "
        "conversations, instruction with output, or input_ids.",
        metavar="NAME",
        rich_help_panel=CALIBRATION,
    ),
]
Seed = Annotated[int, typer.Option(help="For the choice of windows.", rich_help_panel=CALIBRATION)]
BatchSize = Annotated[int, typer.Option(help="Windows in one forward pass.", rich_help_panel=CALIBRATION)]

GroupSize = Annotated[int, typer.Option(help="Weights that share a scale; -1 for one group a row.")]
Method = Annotated[str, typer.Option(help="One of 'quantrature list methods'.")]
Sym = Annotated[bool, typer.Option("--sym", help="Grids symmetric around zero.")]
Ignore = Annotated[list[str] | None, typer.Option(help="Matrix to leave alone, or re:PATTERN; repeatable.")]

Rule = Annotated[
    str, typer.Option(help="gauss, midpoint, trapezoid, left, right or paper.", rich_help_panel=CALIBRATION)
]
Checkpointing = Annotated[
    bool,
    typer.Option(
        "--gradient-checkpointing", help="Trade time for memory in the backward pass.", rich_help_panel=MEMORY
    ),
]
MapFolder = Annotated[
    str | None, typer.Option(help="Keep originals and accumulators in files of this folder.", rich_help_panel=MEMORY)
]

DeviceMap = Annotated[str | None, typer.Option(help="As in transformers, for example auto.", rich_help_panel=MEMORY)]
MaxMemory = Annotated[
    list[str] | None,
    typer.Option(
        help="DEVICE=SIZE: what the weights may take there, 0=20GiB or cpu=64GiB; repeatable.", rich_help_panel=MEMORY
    ),
]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")]

Resume = Annotated[
    str,
    typer.Option(
        help="Go on where an interrupted run of the same work stopped: auto, required or never.",
        rich_help_panel=RESUMING,
    ),
]

MaxShardSize = Annotated[str, typer.Option(help="Of one safetensors file.", rich_help_panel=OUTPUT)]
OverwriteOutput = Annotated[
    bool, typer.Option("--overwrite", help="Replace an output folder that is not empty.", rich_help_panel=OUTPUT)
]
Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else there.", rich_help_panel=OUTPUT)
]
