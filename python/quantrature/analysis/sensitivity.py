"""The result of an analysis, in memory and as a folder."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field

from ..files.json_files import read_format
from ..files.new_folder import new_folder
from ..files.schema import Boolean, Integer, Natural, Number, OneOf, Text, read

FORMAT = "quantrature-sensitivity"
FORMAT_VERSION = 1
SUMMARY = "sensitivity.json"
MAPS = "maps-{metric}.safetensors"


@dataclass(frozen=True)
class Proof:
    """Predicted and measured loss change for one setting of all matrices.

    Attributes:
        setting: bits and group size, such as ``b3g64``.
        method: quantization method.
        rule, nodes: quadrature rule and number of nodes of the last attempt.
        predicted_loss_change: sum of the signed PQI values S_i, in nats per token.
        measured_loss_change: F(w~) - F(w) on the same text, in nats per token.
        gradient_evaluations: number per calibration sample, in all attempts.
        within_tolerance: whether prediction and measurement agree within ``tol``; ``None`` without ``tol``.
    """

    setting: Text
    method: Text
    rule: Text
    nodes: Integer
    predicted_loss_change: Number
    measured_loss_change: Number
    gradient_evaluations: Integer
    within_tolerance: Boolean | None = None

    @property
    def relative_error(self) -> float:
        """Difference between prediction and measurement, relative to the measurement."""
        apart = abs(self.predicted_loss_change - self.measured_loss_change)
        return apart / abs(self.measured_loss_change) if self.measured_loss_change else (apart and float("inf"))


@dataclass(frozen=True)
class MatrixSensitivity:
    """What the analysis found for one matrix.

    Attributes:
        name, role, block, out_features, in_features: as in :class:`quantrature.models.LinearWeight`.
        scores: metric to score; see ``METRICS``.
        loss_change: setting to the predicted loss change (the signed PQI of the matrix), nats per token.
        error: setting to the squared quantization error, the sum of (w~ - w)^2, for the settings that a plan can use.
        nbytes: setting to the stored size in bytes, for the same settings.
        dtype: dtype of the weights; ``float32``, which needs the most memory, if unknown.
    """

    name: Text
    role: Text
    block: Integer
    out_features: Natural
    in_features: Natural
    scores: Mapping[Text, Number]
    loss_change: Mapping[Text, Number]
    error: Mapping[Text, Number] = field(default_factory=dict)
    nbytes: Mapping[Text, Integer] = field(default_factory=dict)
    dtype: Text = "float32"

    @property
    def numel(self) -> int:
        """Number of weights."""
        return self.out_features * self.in_features


@dataclass(frozen=True)
class AtPlan:
    """Loss changes at a plan, in which each matrix has a setting of its own.

    Attributes:
        proof: predicted and measured loss change of the plan.
        settings: matrix name to setting, such as ``b3g64``, for the matrices that the plan quantizes.
        loss_change: matrix name to its part of the predicted loss change, in nats per token.
    """

    proof: Proof
    settings: Mapping[Text, Text]
    loss_change: Mapping[Text, Number]


@dataclass(frozen=True, kw_only=True)
class SensitivityFile:
    """The result of an analysis, without the maps.

    Attributes:
        format: always ``quantrature-sensitivity``.
        format_version: version of the format.
        predicted_loss_change: predicted loss change of the whole model at the first setting, in nats per token;
            ``None`` without the metric ``pqi``.
        measured_loss_change: the same, measured.
        gradient_evaluations: number of gradients per calibration sample, for all settings.
        model: fingerprint (hash) of the weights.
        calibration: fingerprint of the token ids.
        settings: arguments of the analysis.
        proofs: one object for each setting; empty without the metric ``pqi``.
        rank_correlations: metric to Spearman's rank correlation of its scores with the predicted loss changes.
        modules: one object for each matrix, in model order.
        plans: one object for each plan that :func:`quantrature.analysis.integrate_plan` added.
    """

    format: Annotated[str, OneOf([FORMAT])] = FORMAT
    format_version: Annotated[Integer, Field(ge=FORMAT_VERSION, le=FORMAT_VERSION)] = FORMAT_VERSION
    predicted_loss_change: Number | None = None
    measured_loss_change: Number | None = None
    gradient_evaluations: Integer = 0
    model: Text
    calibration: Text
    settings: dict[Text, Any]
    proofs: list[Proof]
    rank_correlations: Mapping[Text, Number | None] = field(default_factory=dict)
    modules: list[MatrixSensitivity]
    plans: list[AtPlan] = field(default_factory=list)


@dataclass(frozen=True)
class Sensitivity:
    """The result of an analysis.

    Attributes:
        matrices: one entry per matrix, in model order.
        proofs: predicted and measured loss change at each setting; the first setting is that of the maps. Empty without
            PQI.
        settings: arguments of the analysis.
        model, calibration: fingerprints (hashes) of the model and the calibration text.
        maps: metric to matrix name to one float32 value per weight, (out_features, in_features).
        plans: loss changes at plans, which :func:`quantrature.analysis.integrate_plan` adds.
    """

    matrices: tuple[MatrixSensitivity, ...]
    proofs: tuple[Proof, ...]
    settings: Mapping[str, Any]
    model: str
    calibration: str
    maps: Mapping[str, Mapping[str, torch.Tensor]] = field(default_factory=dict, repr=False)
    plans: tuple[AtPlan, ...] = ()

    @property
    def predicted_loss_change(self) -> float | None:
        """Predicted loss change at the first setting, in nats per token; ``None`` without PQI."""
        return self.proofs[0].predicted_loss_change if self.proofs else None

    @property
    def measured_loss_change(self) -> float | None:
        """Measured loss change at the first setting, in nats per token; ``None`` without PQI."""
        return self.proofs[0].measured_loss_change if self.proofs else None

    @property
    def gradient_evaluations(self) -> int:
        """Number of gradient evaluations per calibration sample, for all settings together."""
        return sum(proof.gradient_evaluations for proof in (*self.proofs, *(plan.proof for plan in self.plans)))

    @property
    def objective(self) -> str:
        """Name of the objective, one of ``OBJECTIVES``; earlier releases do not record it and have ``nll``."""
        return str(self.settings.get("objective", "nll"))

    def rank_correlations(self) -> dict[str, float | None]:
        """Return Spearman's rank correlation of each metric's scores with the predicted loss changes of the matrices.

        Returns:
            Metric to correlation, at the first setting; ``None`` if all scores or all loss changes are equal. Empty
            without PQI, or with fewer than two matrices.
        """
        from scipy.stats import spearmanr

        if not self.proofs or len(self.matrices) < 2:
            return {}
        changes = [m.loss_change[self.proofs[0].setting] for m in self.matrices]
        found: dict[str, float | None] = {}
        for metric in self.matrices[0].scores:
            scores = [m.scores[metric] for m in self.matrices]
            varied = min(len(set(scores)), len(set(changes))) > 1
            found[metric] = float(spearmanr(scores, changes).statistic) if varied else None
        return found

    def to_json(self) -> dict[str, Any]:
        """Return the content of sensitivity.json: everything except the maps."""
        file = SensitivityFile(
            predicted_loss_change=self.predicted_loss_change,
            measured_loss_change=self.measured_loss_change,
            gradient_evaluations=self.gradient_evaluations,
            model=self.model,
            calibration=self.calibration,
            settings=dict(self.settings),
            proofs=[*self.proofs],
            rank_correlations=self.rank_correlations(),
            modules=[*self.matrices],
            plans=[*self.plans],
        )
        return asdict(file)

    def save(self, folder: str | os.PathLike[str], overwrite: bool = False) -> None:
        """Write sensitivity.json and the maps to a new folder, which appears only when it is complete.

        Args:
            folder: the folder.
            overwrite: whether to replace an existing folder that is not empty.

        Raises:
            InvalidArgumentError: if the folder exists and is not empty, unless ``overwrite`` is true.
        """
        from safetensors.torch import save_file

        with new_folder(folder, overwrite) as partial:
            (partial / SUMMARY).write_text(json.dumps(self.to_json(), indent=1) + "\n")
            for metric, maps in self.maps.items():
                tensors = {name: values.contiguous() for name, values in maps.items()}
                save_file(tensors, partial / MAPS.format(metric=metric), metadata={"metric": metric})

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Sensitivity:
        """Read a folder that :meth:`save` wrote. Each map is read only when it is used.

        Raises:
            InvalidArgumentError: if the file cannot be read, or a field is invalid; the message names file and field.
        """
        path = Path(folder) / SUMMARY
        data = read_format(path, "sensitivity", FORMAT, FORMAT_VERSION)
        items = {"modules": "module", "proofs": "proof"}
        file = read(SensitivityFile, data, op="sensitivity", origin=str(path), items=items)
        maps = sorted(Path(folder).glob(MAPS.format(metric="*")))
        return cls(
            tuple(file.modules),
            tuple(file.proofs),
            file.settings,
            file.model,
            file.calibration,
            {map.stem.removeprefix("maps-"): StoredMaps(map) for map in maps},
            tuple(file.plans),
        )


class StoredMaps(Mapping[str, torch.Tensor]):
    """The maps of one metric in a file; a map is read each time it is accessed."""

    def __init__(self, path: Path) -> None:
        from safetensors import safe_open

        self._file = safe_open(path, "pt")
        self._names = list(self._file.keys())

    def __getitem__(self, name: str) -> torch.Tensor:
        """Return the map of a matrix."""
        if name not in self._names:
            raise KeyError(name)
        values: torch.Tensor = self._file.get_tensor(name)
        return values

    def __iter__(self) -> Any:
        """Iterate over the names of the matrices."""
        return iter(self._names)

    def __len__(self) -> int:
        """Number of matrices."""
        return len(self._names)
