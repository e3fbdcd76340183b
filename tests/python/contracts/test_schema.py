"""Plans, descriptions and records are checked by their types: what is wrong is named in one line."""

import copy
import json
import math
import pickle
from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest
import torch

from good_documents import GRID, MATRIX, RECORD, SENSITIVITY
from quantrature import InvalidArgumentError, Plan, PlanEntry, Sensitivity
from quantrature.models.folding import Fold
from quantrature.packed import MatrixSpec
from quantrature.requantization import Requantization

ENTRY = PlanEntry(3, 32, method="gptq", options={"damp_percent": 0.02})
HUGE = "1" + "0" * 400
NESTED = "[" * 50 + "]" * 50


def test_an_entry_is_a_plain_value():
    assert pickle.loads(pickle.dumps(ENTRY)) == copy.deepcopy(ENTRY) == copy.copy(ENTRY) == replace(ENTRY) == ENTRY
    assert hash(replace(ENTRY, bits=4)) == hash(replace(ENTRY, bits=4)) != hash(ENTRY)
    with pytest.raises(FrozenInstanceError):
        ENTRY.bits = 4
    with pytest.raises(InvalidArgumentError, match=r"^bits must be 1 to 8, or 16 for unquantized: got 9$"):
        replace(ENTRY, bits=9)


def test_a_positional_argument_is_named():
    with pytest.raises(InvalidArgumentError, match=r"^group_size must be -1 or at least 1: got 'all'$"):
        PlanEntry(3, "all")


@pytest.mark.parametrize(
    ("args", "fields"), [((), {}), ((3,), {"group": 64}), ((), {"bits": 3, "group": 64}), (range(12), {})], ids=str
)
def test_a_wrong_call_is_a_type_error_as_for_any_function(args, fields):
    with pytest.raises(TypeError, match="missing a required argument: 'bits'|keyword argument 'group'|too many positi"):
        PlanEntry(*args, **fields)


def test_numbers_of_numpy_are_taken_where_they_are_floats():
    entry = PlanEntry(3, outlier_fraction=np.float64(0.25), predicted_loss_change=np.float64(0.5))
    assert entry == PlanEntry(3, outlier_fraction=0.25, predicted_loss_change=0.5)
    with pytest.raises(InvalidArgumentError, match="bits must be"):
        PlanEntry(np.int64(3))


@pytest.mark.parametrize("name", ["bits", "group_size", "meta_bits", "outlier_fraction", "predicted_loss_change"])
@pytest.mark.parametrize("value", ["NaN", "-Infinity", "1e400", HUGE, "true", '"4"', "{}", NESTED], ids=lambda v: v[:9])
def test_a_number_that_is_none_is_refused(name, value, tmp_path):
    path = tmp_path / "plan.json"
    fields = f'"{name}": {value}' if name == "bits" else f'"bits": 3, "{name}": {value}'
    path.write_text(f'{{"format": "quantrature-plan", "format_version": 2, "entries": {{"a.b": {{{fields}}}}}}}')
    with pytest.raises(InvalidArgumentError, match=rf"plan.json, entry 'a.b': {name} must be .*: got ") as refused:
        Plan.load(path)
    assert "\n" not in str(refused.value) and len(str(refused.value).replace(str(tmp_path), "")) < 200


@pytest.mark.parametrize("value", [16.0, 4.0, -1.0], ids=str)
def test_a_float_is_no_number_of_bits_or_weights(value):
    with pytest.raises(InvalidArgumentError, match="must be"):
        PlanEntry(value)
    with pytest.raises(InvalidArgumentError, match="must be"):
        PlanEntry(3, value)


@pytest.mark.parametrize("version", [True, 1.0, "2", None, [2]], ids=str)
def test_a_version_that_is_no_integer_is_refused(version):
    plan = Plan({"a": ENTRY}).to_json() | {"format_version": version}
    with pytest.raises(InvalidArgumentError, match="this version reads 1 and 2"):
        Plan.from_json(plan)


@pytest.mark.parametrize(
    ("entries", "complaint"),
    [
        ('{"a": {"bits": 3}, "a": {"bits": 4}}', "has the field 'a' twice in one object"),
        ('{"a": {"bits": 3, "bits": 4}}', "has the field 'bits' twice in one object"),
        ('{"a": {"bits": 3, "\\u0000object": 4}}', r"entry 'a': unknown field '\\x00object'"),
        ('{"a": {"bits": 3, "": 4}}', "entry 'a': unknown field ''"),
        ('[{"bits": 3}]', "plan.json: entries must be an object"),
    ],
)
def test_a_field_that_is_there_twice_or_unknown_is_refused(entries, complaint, tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(f'{{"format": "quantrature-plan", "format_version": 2, "entries": {entries}}}')
    with pytest.raises(InvalidArgumentError, match=complaint):
        Plan.load(path)


def test_a_plan_may_name_its_json_schema():
    plan = Plan({"a": ENTRY})
    assert Plan.from_json({"$schema": "./plan.schema.json", **plan.to_json()}) == plan


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"shape": [48, True]}, "shape of a grid must be 1 or 2 sizes"),
        ({"shape": {"48": 32}}, "shape of a grid must be 1 or 2 sizes"),
        ({"bits": math.nan}, "bits of a grid must be 1 to 8: got nan"),
        ({"bits": "3"}, "bits of a grid must be 1 to 8: got '3'"),
        ({"sym": 0}, "sym of a grid must be true or false: got 0"),
        ({"outliers": "4"}, "outliers of a matrix must be a number of weights: got '4'"),
        ({"zero": {**GRID["zero"], "bits": 9}}, "zero.bits of a grid must be 1 to 8: got 9"),
        ({"scale": {**GRID["zero"], "scale": GRID["zero"]}}, "scale of a grid must be a grid whose own scales"),
        ({"scale": None}, "scale of a grid must be float16, bfloat16, float32 or a grid: got None"),
    ],
)
def test_a_field_of_a_stored_form_is_named(change, complaint):
    with pytest.raises(InvalidArgumentError, match=rf"^\[checkpoint\] {complaint}"):
        MatrixSpec.from_json({**MATRIX, **change})


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        ([], "a fold must be an object: got []"),
        ({"kind": "norm", "producer": "n", "repeats": [0, 1]}, "consumers of a fold is missing"),
        (
            {"kind": "norm", "producer": "n", "consumers": ["a", 1], "repeats": [0, 1]},
            "consumers of a fold must be",
        ),
        ({"kind": "norm", "producer": "n", "consumers": ["a"], "repeats": [0, True]}, "repeats of a fold must be two"),
    ],
)
def test_a_field_of_a_fold_is_named(data, complaint):
    with pytest.raises(InvalidArgumentError) as refused:
        Fold.from_json(data, torch.ones(3))
    assert complaint in str(refused.value)


@pytest.mark.parametrize(
    ("load", "name", "good", "path", "value", "complaint"),
    [
        (Sensitivity.load, "sensitivity.json", SENSITIVITY, ("modules", 0, "block"), "0", "module '0': block must be"),
        (
            Sensitivity.load,
            "sensitivity.json",
            SENSITIVITY,
            ("modules", 0, "scores", "pqi"),
            None,
            "module '0': scores",
        ),
        (Sensitivity.load, "sensitivity.json", SENSITIVITY, ("proofs", 0), [], "proof '0': must be an object"),
        (Sensitivity.load, "sensitivity.json", SENSITIVITY, ("settings",), 3, "settings must be"),
        (Requantization.load, "requant.json", RECORD, ("modules", 0, "weights"), 0, "module '0': weights must be"),
        (
            Requantization.load,
            "requant.json",
            RECORD,
            ("trials", 0, "temperature"),
            "hot",
            "trial '0': temperature",
        ),
        (Requantization.load, "requant.json", RECORD, ("bytes",), True, "bytes must be a valid integer: got True"),
        (Requantization.load, "requant.json", RECORD, ("stages",), [], "stages must not be empty"),
    ],
)
def test_a_field_of_a_result_is_named(load, name, good, path, value, complaint, tmp_path):
    document = copy.deepcopy(good)
    place = document
    for key in path[:-1]:
        place = place[key]
    file = tmp_path / name
    where = tmp_path if load == Sensitivity.load else file
    file.write_text(json.dumps(document))
    load(where)
    place[path[-1]] = value
    file.write_text(json.dumps(document))
    with pytest.raises(InvalidArgumentError) as refused:
        load(where)
    assert f"{file}, {complaint}" in str(refused.value) or f"{file}: {complaint}" in str(refused.value)
