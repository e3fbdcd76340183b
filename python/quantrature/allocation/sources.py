"""Sources of an allocation: an analysis, a model in memory, or a model folder whose weights are read one by one."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._C import InvalidArgumentError
from ..methods import METHODS, check_method
from ..ops._arrays import dtype_name
from ..plan import PlanEntry
from ..plan.option import Option, stored_bytes
from ..progress import progress as progress_bar

if TYPE_CHECKING:
    import torch

    from ..analysis.errors import Outcome
    from ..analysis.sensitivity import AtPlan, Sensitivity
    from ..methods import check_method
from ..models import LinearWeight

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Matrix:
    """The facts about a weight matrix that an allocation uses.

    Attributes:
        name, role, block: as in :class:`quantrature.models.LinearWeight`.
        rows, columns: out_features and in_features.
        dtype: dtype of the weights.
        loss_change, error, nbytes: as in :class:`quantrature.analysis.MatrixSensitivity`; empty without an analysis.
        kurtosis: kurtosis of the weights, if it was analyzed.
    """

    name: str
    role: str
    block: int
    rows: int
    columns: int
    dtype: str
    loss_change: Mapping[str, float] = field(default_factory=dict)
    error: Mapping[str, float] = field(default_factory=dict)
    nbytes: Mapping[str, int] = field(default_factory=dict)
    kurtosis: float | None = None

    @property
    def numel(self) -> int:
        """Number of weights."""
        return self.rows * self.columns


@dataclass(frozen=True)
class Grid:
    """The settings that are the same for all entries of a plan."""

    method: str
    sym: bool = False
    meta_bits: int | None = None
    zero: str = "float"
    scale_dtype: str = "auto"

    def entry(self, option: Option) -> PlanEntry:
        """Return the plan entry for an option."""
        return replace(
            option.entry(self.method, self.sym, self.meta_bits), zero=self.zero, scale_dtype=self.scale_dtype
        )


@dataclass(frozen=True)
class Source:
    """The matrices of a model, and access to their weights.

    Attributes:
        matrices: the matrices in model order.
        method: quantization method of the analysis.
        grid: settings of the analysis, to which the errors and bytes of the matrices belong.
        group_size: group size of the analysis.
        weight: function that returns the weights of a matrix, contiguous, on the CPU; ``None`` if only an analysis is
            given.
        about: fingerprints, what the analysis integrated, and where the text had BOS, for plan.json.
        plans: what was integrated at plans (:func:`quantrature.analysis.integrate_plan`).
        measured: measurements so far, by matrix, grid and setting. The next plan from the same source reuses them.
    """

    matrices: tuple[Matrix, ...]
    method: str | None = None
    grid: Grid | None = None
    group_size: int = 64
    weight: Callable[[str], torch.Tensor] | None = None
    about: Mapping[str, str] = field(default_factory=dict)
    plans: tuple[AtPlan, ...] = ()
    measured: dict[tuple[str, Grid, str], Outcome] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(cls, source: Any, weights: Any = None, trust_remote_code: bool = False) -> Source:
        """Make a source from a Sensitivity, a model, or the path of either; a Source is returned unchanged.

        Raises:
            InvalidArgumentError: for any other object, and for weights of another model.
        """
        if isinstance(source, Source):
            return source
        if isinstance(source, (str, os.PathLike)):
            from ..analysis.sensitivity import SUMMARY, Sensitivity

            if (Path(source) / SUMMARY).is_file():
                source = Sensitivity.load(source)
            else:
                return _of_folder(source, trust_remote_code)
        if hasattr(source, "proofs"):
            return _of_analysis(source, weights, trust_remote_code)
        if hasattr(source, "named_modules"):
            return _of_model(source)
        raise InvalidArgumentError(
            f"[allocate] source must be an analysis, a model or a folder with one: got {type(source).__name__}"
        )

    def outcomes(
        self, matrices: Sequence[Matrix], options: Iterable[Option], grid: Grid, progress: bool | None = None
    ) -> list[dict[str, Outcome]] | None:
        """Measure error and size of all options for each matrix, or reuse earlier measurements.

        Returns:
            For each matrix, setting to outcome; ``None`` without the weights, and for a method that needs calibration.
        """
        if self.weight is None or METHODS[grid.method].needs:
            return None
        from ..analysis.errors import outcomes

        options = list(options)
        missing = {m.name: [o for o in options if (m.name, grid, o.key) not in self.measured] for m in matrices}
        with progress_bar("measuring settings", sum(map(len, missing.values())), progress) as bar:
            for name, new in missing.items():
                if new:
                    found = outcomes(name, self.weight(name), new, grid.entry, bar.advance)
                    self.measured.update({(name, grid, key): outcome for key, outcome in found.items()})
        return [{o.key: self.measured[m.name, grid, o.key] for o in options} for m in matrices]


def size_of(matrix: Matrix, option: Option, grid: Grid, known: Mapping[str, int]) -> int:
    """Return the bytes of a matrix with an option: measured if known, else computed from its shape."""
    if option.key in known:
        return known[option.key]
    return stored_bytes(matrix.rows, matrix.columns, grid.entry(option), matrix.dtype)


def _of_analysis(found: Sensitivity, weights: Any, trust_remote_code: bool) -> Source:
    matrices = tuple(
        Matrix(
            m.name,
            m.role,
            m.block,
            m.out_features,
            m.in_features,
            m.dtype,
            m.loss_change,
            m.error,
            m.nbytes,
            m.scores.get("kurtosis"),
        )
        for m in found.matrices
    )
    reader = None
    if weights is not None:
        other = Source.of(weights, trust_remote_code=trust_remote_code)
        shapes = {m.name: (m.rows, m.columns) for m in other.matrices}
        for m in matrices:
            if shapes.get(m.name) != (m.rows, m.columns):
                raise InvalidArgumentError(
                    f"[allocate] the weights must be those of the model that was analyzed: got {shapes.get(m.name)} "
                    f"for {m.name} of shape {(m.rows, m.columns)}"
                )
        reader = other.weight
    method = str(found.settings["method"])
    check_method(method)
    return Source(
        matrices,
        method,
        Grid(
            method,
            bool(found.settings["sym"]),
            zero=str(found.settings.get("zero", "float")),
            scale_dtype=str(found.settings.get("scale_dtype", "auto")),
        ),
        int(found.settings["group_size"]),
        reader,
        {"model": found.model, "calibration": found.calibration, "predicts": found.objective, **_bos(found)},
        found.plans,
    )


def _bos(found: Sensitivity) -> dict[str, str]:
    """Return where the text of an analysis had BOS; empty for analyses of earlier releases, which do not record it."""
    return {"bos": str(found.settings["bos"])} if "bos" in found.settings else {}


def _of_model(model: Any) -> Source:
    from ..models import find_linears

    linears = find_linears(model, experts=False)
    matrices = tuple(
        Matrix(x.name, x.role, x.block, x.out_features, x.in_features, dtype_name(x.parameter)) for x in linears
    )
    return Source(matrices, weight=lambda name: linears.find(name).weight.cpu().contiguous())


def _of_folder(folder: str | os.PathLike[str], trust_remote_code: bool) -> Source:
    """Make a source of a model folder. Weights are read from the safetensors files one by one, when they are needed."""
    from ..models import check_dense, empty_model, find_linears, load_config, load_model
    from ..models.loading import tensor_files

    config = load_config(folder, trust_remote_code)
    check_dense("allocate", config)
    files = tensor_files(Path(folder))
    linears = find_linears(empty_model(config, trust_remote_code), experts=False)
    keys = {linear.name: f"{linear.name}.{linear.attribute}" for linear in linears}
    if any(key not in files for key in keys.values()):
        _log.warning("%s names its weights differently from the model; the whole model is loaded instead", folder)
        return _of_model(load_model(folder, "auto", trust_remote_code=trust_remote_code))
    dtypes = {name: _dtype(files[key], key) for name, key in keys.items()}
    matrices = tuple(Matrix(x.name, x.role, x.block, x.out_features, x.in_features, dtypes[x.name]) for x in linears)

    def weight(name: str) -> torch.Tensor:
        linear: LinearWeight = linears.find(name)
        with _opened(files[keys[name]]) as file:
            tensor = file.get_tensor(keys[name])
        return linear.view(tensor).contiguous()

    return Source(matrices, weight=weight)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise InvalidArgumentError(f"[allocate] {path} is missing, truncated or corrupted: {error}") from None


def _dtype(path: Path, key: str) -> str:
    names = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
    with _opened(path) as file:
        found = str(file.get_slice(key).get_dtype())
    if found not in names:
        raise InvalidArgumentError(f"[allocate] {key} must be float32, float16 or bfloat16: got {found}")
    return names[found]
