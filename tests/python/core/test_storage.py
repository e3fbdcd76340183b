"""Stored forms of matrices: kinds, JSON, tensors, scales of the inputs, and rows of them."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from quantrature import InvalidArgumentError, checkpoint, ops
from quantrature.methods import Statistics, quantize_matrix
from quantrature.models import find_linears
from quantrature.nn import quantized_layers
from quantrature.packed import KINDS, MatrixSpec, QuantizedMatrix
from quantrature.plan import PlanEntry
from quantrature.quantization import declare, put
from tiny_models import VOCABULARY, tiny_model

ENTRIES = {
    "grid": PlanEntry(3, 16),
    "grid with outliers": PlanEntry(3, 16, outlier_fraction=0.02),
    "symmetric grid": PlanEntry(4, -1, sym=True),
    "grid of grids": PlanEntry(2, 8, meta_bits=8, outlier_fraction=0.01),
    "named table": PlanEntry(4, 16, method="nf4", outlier_fraction=0.01),
    "named table, scales on a grid": PlanEntry(4, 8, method="fp4", meta_bits=8),
    "tables of rows": PlanEntry(3, -1, method="squeezellm", outlier_fraction=0.01),
}


def matrix(entry, rows=24, cols=40, dtype=torch.float32):
    weight = torch.randn(rows, cols, generator=torch.Generator().manual_seed(1))
    return quantize_matrix("w", weight.to(dtype), entry, statistics=Statistics(fisher=weight.square()))


def scaled(entry, kind=torch.float32, **shape):
    plain = matrix(entry, **shape)
    cols = plain.dense.shape[1]
    scale = (torch.rand(cols, generator=torch.Generator().manual_seed(2)) + 0.5).to(kind)
    return QuantizedMatrix(plain.dense, plain.outliers, scale)


def read_back(stored):
    spec = MatrixSpec.of(stored)
    again = MatrixSpec.from_json(spec.to_json())
    assert again == spec
    tensors = {name: tensor.clone() for name, tensor in spec.tensors(stored).items()}
    layout = [(name, tuple(t.shape), str(t.dtype).removeprefix("torch.")) for name, t in tensors.items()]
    assert sorted(layout) == sorted(again.layout())
    assert again.nbytes == stored.nbytes == sum(t.numel() * t.element_size() for t in tensors.values())
    return again.matrix(tensors)


@pytest.mark.parametrize("entry", ENTRIES.values(), ids=ENTRIES)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_what_is_read_back_is_what_was_stored(entry, dtype):
    stored = matrix(entry, dtype=getattr(torch, dtype))
    assert torch.equal(read_back(stored).dequantize(), stored.dequantize())
    assert stored.dequantize().dtype == getattr(torch, dtype)


def test_a_description_without_a_kind_is_a_grid():
    spec = MatrixSpec.of(matrix(PlanEntry(3, 16)))
    old = spec.to_json()
    assert old.pop("kind") == "grid"
    assert MatrixSpec.from_json(old) == spec


@pytest.mark.parametrize(
    ("field", "value", "complaint"),
    [
        ("kind", "lattice", r"kind of a matrix must be grid.*: got 'lattice'"),
        ("kind", ["grid"], r"kind of a matrix must be grid.*: got \['grid'\]"),
        ("input_scale", "int8", "input_scale of a matrix must be null, float16 or float32: got 'int8'"),
        ("input_scale", ["float32"], "input_scale of a matrix must be null, float16 or float32"),
        ("outliers", -1, "outliers of a matrix must be 0 to 960: got -1"),
        ("shape", [960], r"shape of a matrix must be rows and columns: got \(960,\)"),
    ],
)
def test_a_broken_description_is_refused(field, value, complaint):
    described = MatrixSpec.of(matrix(PlanEntry(3, 16))).to_json()
    with pytest.raises(InvalidArgumentError, match=complaint):
        MatrixSpec.from_json({**described, field: value})


@pytest.mark.parametrize(
    ("entry", "field", "value", "complaint"),
    [
        (
            PlanEntry(4, 16, method="nf4"),
            "codebook",
            "nf5",
            "codebook of a codebook must be nf4, fp4, shared or rows",
        ),
        (PlanEntry(4, 16, method="nf4"), "codebook", ["nf4"], "codebook of a codebook must be nf4, fp4"),
        (
            PlanEntry(4, 16, method="nf4"),
            "bits",
            3,
            "bits of a codebook must be the bits of a table of 16 values: got 3",
        ),
        (PlanEntry(4, 16, method="nf4"), "table", "float16", "table of a codebook must be null for a fixed table"),
        (PlanEntry(4, 16, method="nf4"), "scale", None, "scale of a codebook must be null if and only if"),
        (PlanEntry(4, 16, method="nf4"), "scale", {"bits": 3}, "scale.shape of a codebook is missing"),
        (PlanEntry(4, 16, method="nf4"), "group_size", 0, "group_size of a codebook must be null, -1 or at least 1"),
        (PlanEntry(3, -1, method="squeezellm"), "table", None, "table of a codebook must be float16 or float32"),
        (PlanEntry(3, -1, method="squeezellm"), "scale", "float16", "scale of a codebook must be null if and only if"),
        (PlanEntry(3, -1, method="squeezellm"), "dtype", "int8", "dtype of a codebook must be float32, float16"),
    ],
)
def test_a_broken_codebook_is_refused(entry, field, value, complaint):
    described = MatrixSpec.of(matrix(entry)).to_json()
    assert described["kind"] == "codebook"
    with pytest.raises(InvalidArgumentError, match=complaint):
        MatrixSpec.from_json({**described, field: value})
    del described[field]
    with pytest.raises(InvalidArgumentError, match=f"{field} of a codebook is missing"):
        MatrixSpec.from_json(described)


def test_one_table_for_all_rows():
    weight = torch.randn(24, 40, generator=torch.Generator().manual_seed(1))
    for table in (torch.linspace(-2, 2, 8), torch.linspace(-2, 2, 8).half()):
        stored = QuantizedMatrix(ops.quantize(weight, 3, None, codebook=table))
        assert MatrixSpec.of(stored).dense.setting == "b3 shared"
        assert torch.equal(read_back(stored).dequantize(), stored.dequantize())


def test_every_kind_says_its_name():
    assert all(spec.kind == name for name, spec in KINDS.items())


@pytest.mark.parametrize("entry", ENTRIES.values(), ids=ENTRIES)
@pytest.mark.parametrize("kind", [torch.float32, torch.float16])
def test_the_scale_of_the_inputs_is_part_of_the_matrix(entry, kind):
    stored = read_back(scaled(entry, kind))
    expected = stored.dense.dequantize("float32") * stored.input_scale.float()
    if stored.outliers is not None:
        stored.outliers.add_to(expected)
    assert torch.equal(stored.dequantize("float32"), expected)
    assert stored.input_scale.dtype == kind


def test_the_scale_of_the_inputs_is_rounded_once():
    stored = scaled(PlanEntry(4, 16))
    assert torch.equal(stored.dequantize("bfloat16"), stored.dequantize("float32").bfloat16())


@pytest.mark.parametrize("with_scale", [False, True])
@pytest.mark.parametrize("entry", ENTRIES.values(), ids=ENTRIES)
@pytest.mark.parametrize("rows", [slice(0, 1), slice(3, 11), slice(-5, None), slice(None)])
def test_rows_are_rows_of_the_whole(entry, rows, with_scale):
    stored = scaled(entry) if with_scale else matrix(entry)
    assert torch.equal(stored.dequantize("float32", rows), stored.dequantize("float32")[rows])


def test_rows_without_outliers_among_them():
    w = np.zeros((6, 8), np.float32)
    w[1, 2] = 5.0
    _, sparse = ops.extract_outliers(w, count=1)
    np.testing.assert_array_equal(sparse.rows(slice(2, 6)).to_dense(), 0)
    np.testing.assert_array_equal(sparse.rows(slice(1, 2)).to_dense(), w[1:2])


@pytest.mark.parametrize("rows", [slice(3, 3), slice(None, None, 2), slice(30, 40), slice(None, None, -1)])
def test_other_rows_are_refused(rows):
    with pytest.raises(InvalidArgumentError, match="rows must be a slice"):
        matrix(PlanEntry(3, 16)).dequantize("float32", rows)
    with pytest.raises(InvalidArgumentError, match="rows must be a slice"):
        matrix(PlanEntry(3, 16, outlier_fraction=0.02)).outliers.rows(rows)


def test_rows_need_groups_along_rows():
    q = ops.quantize(np.ones((8, 8), np.float32), 3, 8, axis=0)
    with pytest.raises(InvalidArgumentError, match="rows need a matrix with groups along axis 1: got axis=0"):
        q.dequantize("float32", slice(0, 2))


def test_scales_of_the_inputs_come_back_from_a_checkpoint(tmp_path):
    model = tiny_model("llama")
    linears = find_linears(model)
    specs = {}
    for linear in linears:
        plain = quantize_matrix(linear.name, linear.weight.contiguous(), PlanEntry(4, 16, outlier_fraction=0.01))
        scale = torch.linspace(0.5, 2.0, linear.in_features)
        specs[linear.name] = put(model, linear, QuantizedMatrix(plain.dense, plain.outliers, scale))
    declare(model, specs)
    checkpoint.save(model, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.arange(32)[None] % VOCABULARY
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model.eval()(ids).logits)
    for name, layer in quantized_layers(loaded).items():
        assert layer.spec == specs[name]
        assert layer.matrix.input_scale is not None
    assert all(m["input_scale"] == "float32" for m in checkpoint.inspect(tmp_path / "out").modules.values())
