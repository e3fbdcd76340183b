"""The method gguf: matrices stored as blocks of llama.cpp's file format."""

import pytest
import torch

import quantrature as qtr
from quantrature import InvalidArgumentError, Plan, PlanEntry, ops
from quantrature.methods import Statistics, quantize_matrix
from quantrature.methods.gguf import BITS, type_for
from quantrature.nn import quantized_layers
from quantrature.packed import GgufSpec, MatrixSpec
from quantrature.plan import stored_bytes
from sharp_models import TOKENS, sharp_model


def layer(rows=16, columns=256, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(300, columns, generator=g) * torch.randn(columns, generator=g).exp()
    return torch.randn(rows, columns, generator=g), Statistics(hessian=(x.T @ x / len(x)).contiguous())


@pytest.mark.parametrize(
    ("bits", "columns", "expected"),
    [
        (2, 256, "Q2_K"),
        (3, 512, "Q3_K"),
        (4, 256, "Q4_K"),
        (6, 256, "Q6_K"),
        (8, 256, "Q8_0"),
        (2, 96, "IQ4_NL"),
        (4, 576, "IQ4_NL"),
        (5, 576, "Q5_0"),
        (6, 64, "Q5_1"),
    ],
)
def test_the_type_depends_on_bits_and_columns(bits, columns, expected):
    assert type_for(PlanEntry(bits, 32, method="gguf"), columns) == expected


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("columns", [96, 256])
def test_blocks_are_those_of_the_op_weighted_by_the_inputs(bits, columns):
    weight, statistics = layer(columns=columns)
    entry = PlanEntry(bits, 32, method="gguf")
    found = quantize_matrix("a", weight, entry, statistics=statistics)
    kind = type_for(entry, columns)
    data = ops.gguf_quantize(weight, kind, statistics.hessian.diagonal().contiguous())
    assert torch.equal(found.dense.data, data)
    assert torch.equal(found.dequantize("float32"), ops.gguf_dequantize(data, kind, columns))
    assert found.nbytes == data.numel() == stored_bytes(*weight.shape, entry)
    assert torch.equal(found.dequantize("float32", slice(3, 7)), found.dequantize("float32")[3:7])
    spec = MatrixSpec.of(found)
    assert MatrixSpec.from_json(spec.to_json()) == spec
    assert torch.equal(spec.matrix(spec.tensors(found)).dense.data, data)


def test_a_type_can_be_chosen():
    weight, statistics = layer()
    entry = PlanEntry(4, 32, method="gguf", options={"type": "Q4_0"})
    assert quantize_matrix("a", weight, entry, statistics=statistics).dense.type == "Q4_0"


def test_inputs_that_are_always_zero_count_alike():
    weight, _ = layer()
    entry = PlanEntry(4, 32, method="gguf")
    found = quantize_matrix("a", weight, entry, statistics=Statistics(hessian=torch.zeros(256, 256)))
    assert torch.equal(found.dense.data, ops.gguf_quantize(weight, "Q4_K"))


def test_a_model_is_planned_quantized_saved_and_trained_on(tmp_path):
    model = sharp_model()
    of_whole_blocks = {"ignore": "re:.*down_proj", "group_size": 32, "method": "gguf"}  # it has 48 columns
    found = qtr.analyze(model, TOKENS, bits=[4, 5], nodes=2, metrics=["pqi"], **of_whole_blocks)
    assert {f"b{bits}g32" for bits in BITS} <= set(found.matrices[0].error)
    plan = qtr.allocate(found, avg_bits=5.2)
    assert len({entry.bits for entry in plan.entries.values()}) > 1
    model = qtr.quantize(model, plan=plan, calibration=TOKENS)
    assert all(isinstance(quantized.spec.dense, GgufSpec) for quantized in quantized_layers(model).values())
    stored = sum(quantized.spec.nbytes for quantized in quantized_layers(model).values())
    assert stored == plan.allocation["bytes"]
    logits = model(TOKENS).logits
    model.save_pretrained(tmp_path / "quantized")
    again = type(model).from_pretrained(tmp_path / "quantized")
    assert torch.equal(again(TOKENS).logits, logits)
    dense = again.get_input_embeddings()(TOKENS).detach().requires_grad_()
    again(inputs_embeds=dense).logits.square().sum().backward()
    assert dense.grad.abs().sum() > 0


def test_a_plan_is_read_back():
    plan = Plan({"a": PlanEntry(4, 32, method="gguf", options={"type": "Q4_1"})})
    assert Plan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"bits": 7}, "bits of gguf must be 2, 3, 4, 5, 6 or 8: got 7"),
        ({"group_size": 64}, "group_size of gguf must be 32: got 64"),
        ({"sym": True}, "sym, meta_bits and outlier_fraction must be left out with gguf"),
        ({"outlier_fraction": 0.01}, "sym, meta_bits and outlier_fraction must be left out with gguf"),
        ({"options": {"type": "Q4"}}, "option type of gguf must be auto, Q4_0, .*: got 'Q4'"),
        ({"options": {"type": "Q5_K"}}, "bits must be 5 with the type Q5_K: got 4"),
    ],
)
def test_what_the_types_have_not_is_refused(entry, message):
    with pytest.raises(InvalidArgumentError, match=message):
        PlanEntry(**{"bits": 4, "group_size": 32, "method": "gguf", **entry})


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        (80, {}, "IQ4_NL needs columns that are a multiple of 32: got 80; keep the matrix unquantized"),
        (96, {"type": "Q4_K"}, "Q4_K needs columns that are a multiple of 256: got 96; leave the option type out"),
    ],
)
def test_rows_without_whole_blocks_are_refused(columns, options, message):
    weight, statistics = layer(columns=columns)
    with pytest.raises(InvalidArgumentError, match=message):
        quantize_matrix("a", weight, PlanEntry(4, 32, method="gguf", options=options), statistics=statistics)
