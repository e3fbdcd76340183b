"""Whatever JSON the parsers of plans and checkpoints are given, they take it or refuse it with a QuantratureError.

The profile ``long`` looks longer: ``pytest tests/python/contracts/test_fuzz.py --hypothesis-profile=long``. In
``tests/fuzz/fuzz_documents.py`` libFuzzer chooses the documents of the same tests.
"""

import copy
import json
import tempfile
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from quantrature import Plan, QuantratureError, Sensitivity
from quantrature.checkpoint import inspect
from quantrature.packed import MatrixSpec
from quantrature.requantization import Requantization

settings.register_profile("long", settings.get_profile("default"), max_examples=20_000, deadline=None)

scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.integers(-3, 300)
    | st.floats()
    | st.text(max_size=6)
    | st.sampled_from(["float16", "float32", "bfloat16", "minmax", "hqq", "grid", "quantrature", "\udcff"])
)
anything = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4)
)

GRID = {
    "shape": [48, 32],
    "bits": 3,
    "group_size": 16,
    "sym": False,
    "dtype": "float32",
    "scale": "float16",
    "zero": {
        "shape": [96],
        "bits": 8,
        "group_size": 64,
        "sym": True,
        "dtype": "float32",
        "scale": "float16",
        "zero": None,
    },
}
MATRIX = {"kind": "grid", **GRID, "outliers": 4, "digest": "0" * 16}
CODEBOOK = {
    "kind": "codebook",
    "shape": [48, 32],
    "bits": 3,
    "group_size": 16,
    "dtype": "float16",
    "codebook": "rows",
    "table": "float16",
    "scale": GRID["zero"],
}
TRELLIS = {"kind": "trellis", "shape": [48, 32], "bits": 2, "state_bits": 12, "code": "hyb", "dtype": "float32"}
PLAN = {
    "format": "quantrature-plan",
    "format_version": 2,
    "allocation": {"strategy": "pqi"},
    "entries": {
        "a": {"bits": 3, "group_size": 64, "sym": False, "solver": "hqq", "meta_bits": 8, "outlier_fraction": 0.005},
        "b": {"bits": 16, "reason": "as it is", "predicted_loss_change": None},
    },
}
RECORD = {
    "format": "quantrature-requant",
    "format_version": 1,
    "modules": [{"name": "a", "weights": 100, "outliers": 3, "significant": 1, "mean_pqi": 0.1}],
    "stages": [{"name": "host", "kept": 4, "measured_loss_change": 0.1}],
    "trials": [{"temperature": 0.5, "measured_loss_change": 0.2}],
    "temperature": 0.5,
    "bytes": 100,
    "grid_bytes": 90,
    "settings": {},
    "model": "0",
    "calibration": "1",
}
SENSITIVITY = {
    "format": "quantrature-sensitivity",
    "format_version": 1,
    "model": "0",
    "calibration": "1",
    "settings": {"objective": "nll"},
    "proofs": [
        {
            "setting": "b3g64",
            "method": "rtn",
            "rule": "gauss",
            "nodes": 4,
            "predicted_loss_change": 0.1,
            "measured_loss_change": 0.2,
            "gradient_evaluations": 4,
        }
    ],
    "modules": [
        {
            "name": "a",
            "role": "a",
            "block": 0,
            "out_features": 48,
            "in_features": 32,
            "scores": {"pqi": 0.1},
            "loss_change": {"b3g64": 0.1},
        }
    ],
}


def places(document, path=()):
    """Paths to everything in a JSON document."""
    yield path
    if isinstance(document, dict | list):
        for key, inner in document.items() if isinstance(document, dict) else enumerate(document):
            yield from places(inner, (*path, key))


GOOD = (MATRIX, CODEBOOK, TRELLIS, PLAN, RECORD, SENSITIVITY)
FIELDS = sorted({path[-1] for good in GOOD for path in places(good) if path and isinstance(path[-1], str)})


def alike(value):
    """Values of the same JSON type: what is nearly right gets further than noise."""
    kinds = {
        bool: st.booleans(),
        int: st.integers(-1, 64),
        float: st.floats(0, 1) | st.floats(),
        str: st.sampled_from(["float16", "float32", "bfloat16", "minmax", "mse", "hqq", "nf4", "rows", "shared"]),
    }
    return kinds.get(type(value), anything)


@st.composite
def spoiled(draw, good):
    """A document with up to three places replaced, removed or added to; rarely something else altogether."""
    if draw(st.integers(0, 29)) == 0:
        return draw(anything)
    document = copy.deepcopy(good)
    for _ in range(draw(st.integers(1, 3))):
        paths = [path for path in places(document) if path]
        if not paths:
            break
        *above, last = draw(st.sampled_from(paths))
        place = document
        for key in above:
            place = place[key]
        what = draw(st.sampled_from(["alike", "anything", "remove", "add"]))
        if what == "add" and isinstance(place, dict):
            place[draw(st.sampled_from(FIELDS) | st.text(max_size=6))] = draw(anything)
        elif what == "remove":
            del place[last]
        else:
            place[last] = draw(alike(place[last]) if what == "alike" else anything)
    return document


def taken(read, *arguments):
    """What was read, or None where it was refused as it should be."""
    refused = ""
    try:
        return read(*arguments)
    except QuantratureError as error:
        refused = str(error)
    assert "\n" not in refused.strip()
    return None


@given(spoiled(PLAN))
def test_plans(document):
    plan = taken(Plan.from_json, document)
    if plan is not None:
        written = json.dumps(plan.to_json())
        assert json.dumps(Plan.from_json(json.loads(written)).to_json()) == written


@given(spoiled(MATRIX) | spoiled(CODEBOOK) | spoiled(TRELLIS))
def test_descriptions_of_matrices(document):
    spec = taken(MatrixSpec.from_json, document)
    if spec is None:
        return
    layout = taken(lambda: list(spec.layout()))
    if layout is not None:
        assert all(size >= 0 for _, shape, _ in layout for size in shape)
        assert MatrixSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


def file_taken(name, content):
    """The same of a file's parser."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, name)
        path.write_bytes(content)
        read = {
            "plan.json": Plan.load,
            "requant.json": Requantization.load,
            "sensitivity.json": lambda _: Sensitivity.load(folder),
            "config.json": lambda _: inspect(folder),
        }
        return taken(read[name], path)


@given(
    st.sampled_from(["plan.json", "requant.json", "sensitivity.json", "config.json"]),
    st.binary(max_size=60) | st.binary(max_size=9).map(lambda noise: b'{"format": "quantrature-plan", ' + noise),
)
def test_files_of_bytes(name, content):
    file_taken(name, content)


def test_the_documents_are_good_before_they_are_spoiled():
    assert taken(Plan.from_json, PLAN)
    assert all(taken(MatrixSpec.from_json, matrix) for matrix in (MATRIX, CODEBOOK, TRELLIS))
    assert file_taken("requant.json", json.dumps(RECORD).encode())
    assert file_taken("sensitivity.json", json.dumps(SENSITIVITY).encode())


@given(spoiled(SENSITIVITY))
def test_analyses(document):
    file_taken("sensitivity.json", json.dumps(document).encode())


@given(spoiled(RECORD))
def test_records(document):
    file_taken("requant.json", json.dumps(document).encode())


@given(spoiled({"quantization_config": {"quant_method": "quantrature", "format_version": 1, "modules": {"a": MATRIX}}}))
def test_configurations(document):
    file_taken("config.json", json.dumps(document).encode())
