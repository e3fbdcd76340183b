"""What ReQuant did to a model: what it kept, why, and what each step of it brought."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from ..files.json_files import read_format
from ..files.schema import Integer, Natural, Number, Text, read

FORMAT = "quantrature-requant"
FORMAT_VERSION = 1

PAPER_BITS = 48
"""What the paper counts for a kept weight: 16 bits of value and 32 of index."""

Temperature = Annotated[Number, BeforeValidator(lambda value: math.inf if value == "infinite" else value)]


@dataclass(frozen=True)
class KeptWeights:
    """What of one matrix is kept exactly beside its grid.

    Attributes:
        name: of the matrix.
        weights: how many it has.
        outliers: kept for their magnitude, and left out of the fit of the grid.
        significant: kept for their PQI.
        mean_pqi: over the matrix as its method alone quantized it; ``None`` where that was not integrated.
        predicted_loss_change: of the matrix in the end, nats per token; ``None`` where that was not integrated.
    """

    name: Text
    weights: Natural
    outliers: Integer
    significant: Integer
    mean_pqi: Number | None = None
    predicted_loss_change: Number | None = None

    @property
    def outlier_fraction(self) -> float:
        """Outliers over weights."""
        return self.outliers / self.weights


@dataclass(frozen=True)
class Trial:
    """One temperature that was tried.

    Attributes:
        temperature: infinite for the same ratio everywhere.
        measured_loss_change: on the calibration text, after quantizing anew; nats per token.
    """

    temperature: Temperature
    measured_loss_change: Number


@dataclass(frozen=True)
class Stage:
    """The model after one step.

    Attributes:
        name: ``quantized``, ``outliers``, ``detach 1``, ``detach 2``, ...
        kept: weights kept exactly so far.
        measured_loss_change: F(w~) - F(w) on the calibration text, nats per token.
        predicted_loss_change: the same as a sum of signed PQI; ``None`` where it was not integrated.
        gradient_evaluations: per calibration sample, for that prediction.
    """

    name: Text
    kept: Integer
    measured_loss_change: Number
    predicted_loss_change: Number | None = None
    gradient_evaluations: Integer = 0


@dataclass(frozen=True)
class Requantization:
    """The record of :func:`quantrature.requant`.

    Attributes:
        matrices: in model order.
        stages: in the order they were reached; the last one is the result.
        trials: of temperatures.
        temperature: the one that was chosen; infinite for the same ratio everywhere, ``None`` where none was sought.
        nbytes: of the quantized matrices as stored: codes, scales, zeros, kept values, columns, row offsets.
        grid_nbytes: the part of it that is codes, scales and zeros.
        settings: arguments.
        model, calibration: fingerprints.
    """

    matrices: Annotated[tuple[KeptWeights, ...], Field(alias="modules")]
    stages: Annotated[tuple[Stage, ...], Field(min_length=1)]
    trials: tuple[Trial, ...]
    temperature: Temperature | None
    nbytes: Annotated[Integer, Field(alias="bytes")]
    grid_nbytes: Annotated[Integer, Field(alias="grid_bytes")]
    settings: Mapping[Text, Any]
    model: Text
    calibration: Text

    @property
    def weights(self) -> int:
        """How many weights the matrices have."""
        return sum(matrix.weights for matrix in self.matrices)

    @property
    def outliers(self) -> int:
        """How many outliers are kept."""
        return sum(matrix.outliers for matrix in self.matrices)

    @property
    def significant(self) -> int:
        """How many significant weights are kept."""
        return sum(matrix.significant for matrix in self.matrices)

    @property
    def bits_per_weight(self) -> float:
        """As stored, everything included."""
        return 8 * self.nbytes / self.weights

    @property
    def paper_bits_per_weight(self) -> float:
        """By the rule that gives the paper's figures: the grid, and 48 bits for each kept weight."""
        return (8 * self.grid_nbytes + PAPER_BITS * (self.outliers + self.significant)) / self.weights

    @property
    def measured_loss_change(self) -> float:
        """Of the result on the calibration text, nats per token."""
        return self.stages[-1].measured_loss_change

    @property
    def predicted_loss_change(self) -> float | None:
        """The same as predicted; ``None`` where it was not integrated."""
        return self.stages[-1].predicted_loss_change

    @property
    def gradient_evaluations(self) -> int:
        """Per calibration sample, of all stages."""
        return sum(stage.gradient_evaluations for stage in self.stages)

    def to_json(self) -> dict[str, Any]:
        """The content of requant.json; an infinite temperature is the text "infinite"."""

        def plain(temperature: float | None) -> float | str | None:
            return "infinite" if temperature == math.inf else temperature

        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "bits_per_weight": self.bits_per_weight,
            "paper_bits_per_weight": self.paper_bits_per_weight,
            "bytes": self.nbytes,
            "grid_bytes": self.grid_nbytes,
            "outliers": self.outliers,
            "significant": self.significant,
            "temperature": plain(self.temperature),
            "trials": [asdict(trial) | {"temperature": plain(trial.temperature)} for trial in self.trials],
            "predicted_loss_change": self.predicted_loss_change,
            "measured_loss_change": self.measured_loss_change,
            "gradient_evaluations": self.gradient_evaluations,
            "stages": [asdict(stage) for stage in self.stages],
            "model": self.model,
            "calibration": self.calibration,
            "settings": dict(self.settings),
            "modules": [asdict(matrix) for matrix in self.matrices],
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write requant.json."""
        Path(path).write_text(json.dumps(self.to_json(), indent=1, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Requantization:
        """Read what :meth:`save` wrote.

        Raises:
            InvalidArgumentError: if the file cannot be read, or a field is invalid; the message names file and field.
        """
        data = read_format(path, "requant", FORMAT, FORMAT_VERSION)
        items = {"modules": "module", "stages": "stage", "trials": "trial"}
        return read(cls, data, op="requant", origin=str(path), items=items)
