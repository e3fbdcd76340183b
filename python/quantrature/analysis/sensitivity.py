"""The result of an analysis, in memory and as a folder."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from .._C import InvalidArgumentError
from ..files.json_files import read_format
from ..files.new_folder import new_folder

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

    setting: str
    method: str
    rule: str
    nodes: int
    predicted_loss_change: float
    measured_loss_change: float
    gradient_evaluations: int
    within_tolerance: bool | None = None

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

    name: str
    role: str
    block: int
    out_features: int
    in_features: int
    scores: Mapping[str, float]
    loss_change: Mapping[str, float]
    error: Mapping[str, float] = field(default_factory=dict)
    nbytes: Mapping[str, int] = field(default_factory=dict)
    dtype: str = "float32"

    @property
    def numel(self) -> int:
        """Number of weights."""
        return self.out_features * self.in_features


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
    """

    matrices: tuple[MatrixSensitivity, ...]
    proofs: tuple[Proof, ...]
    settings: Mapping[str, Any]
    model: str
    calibration: str
    maps: Mapping[str, Mapping[str, torch.Tensor]] = field(default_factory=dict, repr=False)

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
        return sum(proof.gradient_evaluations for proof in self.proofs)

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
        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "predicted_loss_change": self.predicted_loss_change,
            "measured_loss_change": self.measured_loss_change,
            "gradient_evaluations": self.gradient_evaluations,
            "model": self.model,
            "calibration": self.calibration,
            "settings": dict(self.settings),
            "proofs": [asdict(proof) for proof in self.proofs],
            "rank_correlations": self.rank_correlations(),
            "modules": [asdict(matrix) for matrix in self.matrices],
        }

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
            InvalidArgumentError: if sensitivity.json is missing, is not valid JSON, or has another format; the message
                names it.
        """
        path = Path(folder) / SUMMARY
        data = read_format(path, "sensitivity", FORMAT, FORMAT_VERSION)
        try:
            return cls(
                tuple(MatrixSensitivity(**matrix) for matrix in data["modules"]),
                tuple(Proof(**proof) for proof in data["proofs"]),
                data["settings"],
                data["model"],
                data["calibration"],
                {
                    file.stem.removeprefix("maps-"): StoredMaps(file)
                    for file in sorted(Path(folder).glob(MAPS.format(metric="*")))
                },
            )
        except (KeyError, TypeError) as e:
            raise InvalidArgumentError(f"[sensitivity] {path} does not have the fields of an analysis: {e}") from None


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
