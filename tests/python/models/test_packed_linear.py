"""The operator behind quantized layers: the same as the dequantized matrix times the input, and known to torch."""

import contextlib
import copy
import gc
import io

import pytest
import torch
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.functional import linear as dense_linear
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

import quantrature as qtr
from quantrature import InvalidArgumentError, ops
from quantrature.methods import quantize_matrix
from quantrature.methods.method import Statistics
from quantrature.nn import QuantLinear, quantized_layers
from quantrature.nn import product as packed_linear
from quantrature.packed import MatrixSpec, QuantizedMatrix, product
from quantrature.plan import PlanEntry
from tiny_models import tiny_model

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def made(matrix, bias=False):
    rows = matrix.dense.shape[0]
    layer = QuantLinear(MatrixSpec.of(matrix), torch.nn.Parameter(torch.randn(rows)) if bias else None)
    layer.store(matrix)
    return layer


def layer_of(rows=24, cols=70, bias=False, seed=0, **settings):
    torch.manual_seed(seed)
    weight = torch.randn(rows, cols) * 0.1
    return made(quantize_matrix("m", weight, PlanEntry(**{"bits": 4, "group_size": 32, **settings})), bias)


def check(layer, x):
    """The result is that of the float64 product within what the docstring of the operator allows."""
    y = layer(x)
    assert y.dtype == x.dtype
    assert y.shape == (*x.shape[:-1], layer.out_features)
    weight = layer.dequantize(torch.float32).double()
    exact = dense_linear(x.double(), weight, None if layer.bias is None else layer.bias.double())
    cols = layer.in_features
    # Sums of float32 as matvec.hpp bounds them, with 32 for the ratio of a code's size to a value's; one rounding of
    # the result; and of the weights, where many rows are multiplied in 16 bits.
    few = x.reshape(-1, cols).shape[0] <= product.FEW[x.dtype]
    size = dense_linear(x.double().abs(), weight.abs())
    unit = torch.finfo(x.dtype).eps
    bound = 2.0**-23 * (cols / 8 + 32) * 32 * size + unit * exact.abs() + 1e-6
    if not few and x.dtype == torch.bfloat16:
        bound += 2 * unit * size
    assert ((y.double() - exact).abs() <= bound).all(), ((y.double() - exact).abs() / bound).max()
    return y


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bits", range(1, 9))
def test_few_and_many_rows_give_the_product(bits, dtype):
    for settings in ({"group_size": 32}, {"group_size": -1}, {"group_size": 64, "sym": True}, {"meta_bits": 8}):
        for outliers in (0.0, 0.03):
            layer = layer_of(bits=bits, outlier_fraction=outliers, bias=True, **settings)
            for rows in (1, 3, product.FEW[dtype], product.FEW[dtype] + 1):
                check(layer, torch.randn(rows, layer.in_features).to(dtype))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    "settings",
    [
        {"method": "nf4", "bits": 4},
        {"method": "nf4", "bits": 4, "meta_bits": 8},
        {"method": "fp4", "bits": 4, "group_size": -1},
        {"method": "squeezellm", "bits": 3, "group_size": -1, "options": {"sensitive": 0.01}},
    ],
    ids=str,
)
def test_codebooks_are_multiplied_packed(settings, dtype, monkeypatch):
    torch.manual_seed(0)
    weight, fisher = torch.randn(24, 70) * 0.1, Statistics(fisher=torch.rand(24, 70))
    for outliers in (0.0, 0.03):
        entry = PlanEntry(**{"group_size": 32, "outlier_fraction": outliers, **settings})
        layer = made(quantize_matrix("m", weight, entry, statistics=fisher), bias=True)
        for rows in (1, 3, product.FEW[dtype], product.FEW[dtype] + 1):
            check(layer, torch.randn(rows, layer.in_features).to(dtype))
        with monkeypatch.context() as blocked:
            blocked.setattr(QuantizedMatrix, "dequantize", None)
            layer(torch.randn(3, layer.in_features).to(dtype))


@pytest.mark.parametrize("block", [70, 71 * 5, 1 << 20])
def test_blocks_make_no_difference(block, monkeypatch):
    layer = layer_of(outlier_fraction=0.05, meta_bits=8)
    x = torch.randn(150, 70)
    expected = layer(x)
    monkeypatch.setattr(product, "BLOCK", block)
    assert torch.allclose(layer(x), expected, rtol=1e-5, atol=1e-6)


def test_the_whole_matrix_is_never_dequantized(monkeypatch):
    layer = layer_of(rows=64, cols=64, outlier_fraction=0.02)
    monkeypatch.setattr(product, "BLOCK", 16 * 64)
    sizes = []
    dequantize = QuantizedMatrix.dequantize

    def noted(self, dtype=None, rows=None):
        sizes.append(self.dense.shape[0] if rows is None else rows.stop - rows.start)
        return dequantize(self, dtype, rows)

    monkeypatch.setattr(QuantizedMatrix, "dequantize", noted)
    x = torch.randn(160, 64, requires_grad=True)
    layer(x).sum().backward()
    layer(x[:1])
    assert sizes == [16] * 8


@pytest.mark.parametrize("rows", [2, 160])
@pytest.mark.parametrize("codebook", [None, "nf4"])
def test_scaled_inputs_pass_the_outliers_by(rows, codebook):
    torch.manual_seed(0)
    weight, scale = torch.randn(24, 70) * 0.1, torch.rand(70) + 0.5
    _, outliers = ops.extract_outliers(weight, fraction=0.05)
    codes = ops.quantize(weight / scale, 4, 32, exclude=outliers, codebook=codebook)
    layer = made(QuantizedMatrix(codes, outliers, scale), bias=True)
    flat = outliers.positions()
    assert torch.equal(layer.dequantize().flatten()[flat], weight.flatten()[flat])
    check(layer, torch.randn(rows, 70))


def test_any_shape_of_activations():
    layer = layer_of(bias=True)
    check(layer, torch.randn(70))
    check(layer, torch.randn(2, 3, 70))
    check(layer, torch.randn(2, 70, 3).mT)
    assert layer(torch.randn(2, 0, 70)).shape == (2, 0, 24)


@pytest.mark.parametrize(
    ("x", "complaint"),
    [
        (torch.randn(2, 70).double(), "float32, float16 or bfloat16: got dtype=torch.float64"),
        (torch.randn(2, 69), r"x must have shape \(..., 70\): got shape=\(2, 69\)"),
        (torch.tensor(1.0), r"x must have shape \(..., 70\): got shape=\(\)"),
    ],
)
def test_other_activations_are_refused(x, complaint):
    with pytest.raises(InvalidArgumentError, match=complaint):
        layer_of()(x)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("rows", [3, 160])
def test_the_gradient_flows_through(rows, dtype):
    layer = layer_of(bias=True, outlier_fraction=0.03)
    x = torch.randn(rows, 70, dtype=dtype, requires_grad=True)
    direction = torch.randn(rows, 24).to(dtype)
    layer(x).backward(direction)
    assert torch.allclose(x.grad.float(), direction.float() @ layer.dequantize(), rtol=1e-2, atol=1e-2)
    assert torch.allclose(layer.bias.grad, direction.float().sum(0), rtol=1e-5, atol=1e-5)
    if dtype == torch.float32:
        assert torch.allclose(x.grad, direction @ layer.dequantize(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rows", [2, 160])
def test_results_may_be_changed_in_place(rows):
    layer = layer_of(bias=True)
    x = torch.randn(1, rows, 70, requires_grad=True)
    expected = layer(x) + 1
    y = layer(x)
    y += 1  # as Falcon and GPT-NeoX do
    y.sum().backward()
    assert torch.equal(y, expected) and x.grad.abs().sum() > 0


@pytest.mark.parametrize("bias", [False, True])
def test_torch_accepts_the_operator(bias):
    layer = layer_of(bias=bias, outlier_fraction=0.03)
    stored = list(layer.stored().values())
    x = torch.randn(3, 70, requires_grad=True)
    arguments = (x, stored, packed_linear.describe(layer.spec), layer.bias)
    assert set(torch.library.opcheck(torch.ops.quantrature.linear.default, arguments).values()) == {"SUCCESS"}


@pytest.mark.parametrize("layout", ["llama", "qwen2"])
def test_a_compiled_model_is_one_graph(layout):
    model = qtr.quantize(tiny_model(layout), bits=4, group_size=16, outlier_fraction=0.02)
    tokens = torch.arange(20).view(1, 20)
    with torch.no_grad():
        expected = model(tokens).logits
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert torch.allclose(compiled(tokens).logits, expected, atol=1e-5)
    leaf = model.get_input_embeddings().weight
    torch.compile(model, fullgraph=True, backend="aot_eager")(tokens).logits.sum().backward()
    assert leaf.grad is not None and leaf.grad.abs().sum() > 0


def test_inductor_takes_a_layer():
    layer = layer_of(outlier_fraction=0.02, bias=True)
    compiled = torch.compile(lambda x: layer(x).relu() * 2, fullgraph=True)
    for rows in (1, 3, 160):
        x = torch.randn(rows, 70)
        assert torch.allclose(compiled(x), layer(x).relu() * 2, atol=1e-5)


# What is prepared


@pytest.fixture
def preparations(monkeypatch):
    made_ones = []
    make = packed_linear._made
    monkeypatch.setattr(packed_linear, "_made", lambda *a: (made_ones.append(a[1]), make(*a))[1])
    return made_ones


def test_a_matrix_is_prepared_once_and_forgotten_with_its_layer(preparations):
    gc.collect()
    before = len(packed_linear._prepared)
    layer = layer_of(outlier_fraction=0.03)
    for rows in (1, 150, 2):
        layer(torch.randn(rows, 70))
    assert len(preparations) == 1
    assert len(packed_linear._prepared) == before + 1
    del layer
    gc.collect()
    assert len(packed_linear._prepared) == before


def test_what_is_prepared_is_small():
    layer = layer_of(rows=256, cols=512, outlier_fraction=0.005)
    layer(torch.randn(1, 512))
    ready = packed_linear._prepared[id(layer.codes)].ready
    assert ready.packed.dense.codes.data_ptr() == layer.codes.data_ptr()
    assert ready.packed.residuals.values.nbytes == 4 * layer.spec.outliers


def test_new_values_are_seen(preparations):
    layer, other = layer_of(outlier_fraction=0.03), layer_of(outlier_fraction=0.03, seed=1)
    x = torch.randn(2, 70)
    before = layer(x)
    layer.load_state_dict(other.state_dict())  # in place
    assert torch.equal(layer(x), other(x)) and not torch.equal(layer(x), before)
    layer.store(layer_of(outlier_fraction=0.03).matrix)
    assert torch.equal(layer(x), before)
    layer.to(torch.bfloat16)
    assert torch.equal(layer(x), before)
    assert torch.equal(copy.deepcopy(layer)(x), before)


def test_inference_mode_runs():
    layer = layer_of(outlier_fraction=0.03)
    x = torch.randn(2, 70)
    expected = layer(x)
    with torch.inference_mode():
        assert torch.equal(layer(x), expected)
        assert torch.equal(copy.deepcopy(layer)(x), expected)


def test_a_model_on_the_meta_device_has_shapes():
    model = qtr.quantize(tiny_model("llama"), bits=4, group_size=16, outlier_fraction=0.02).to("meta")
    assert quantized_layers(model)
    assert model(torch.arange(6, device="meta").view(1, 6)).logits.shape == (1, 6, 258)


def scale_of(layer):
    """The scales of a layer, or those of its scales on a grid."""
    return "scale_scale" if "scale_scale" in layer._buffers else "scale"


def replace_scale(layer, other):
    setattr(layer, scale_of(layer), getattr(other, scale_of(layer)))


def write_scale(layer, other):
    getattr(layer, scale_of(layer)).copy_(getattr(other, scale_of(layer)))


def give_scale_other_memory(layer, other):
    getattr(layer, scale_of(layer)).data = getattr(other, scale_of(layer)).clone()


def swap_scales(layer, other):
    torch.utils.swap_tensors(getattr(layer, scale_of(layer)), copy.deepcopy(getattr(other, scale_of(layer))))


CHANGES = {
    "replace a buffer": replace_scale,
    "write to a buffer": write_scale,
    "give a buffer other memory": give_scale_other_memory,
    "swap a buffer": swap_scales,
    "load in place": lambda layer, other: layer.load_state_dict(other.state_dict()),
    "load by assignment": lambda layer, other: layer.load_state_dict(other.state_dict(), assign=True),
    "store": lambda layer, other: layer.store(other.matrix),
    "become": lambda layer, other: layer.become(other.matrix),
}


@pytest.mark.parametrize("settings", [{}, {"outlier_fraction": 0.03}, {"meta_bits": 8}], ids=str)
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@torch.no_grad()
def test_the_next_product_is_of_the_changed_layer(change, settings):
    layer, other = layer_of(**settings), layer_of(**{**settings, "seed": 1})
    x = torch.randn(2, 70)
    layer(x)
    before = layer(x)
    change(layer, other)
    after = layer(x)
    assert torch.equal(after, made(layer.matrix)(x)) and not torch.equal(after, before)
    assert torch.equal(layer(x), after)


@torch.no_grad()
def test_copies_and_pickles_multiply_with_buffers_of_their_own():
    layer = layer_of(outlier_fraction=0.03, bias=True)
    x = torch.randn(2, 70)
    expected = layer(x)
    saved = io.BytesIO()
    torch.save(layer, saved)
    saved.seek(0)
    for twin in (copy.deepcopy(layer), torch.load(saved, weights_only=False)):
        assert torch.equal(twin(x), expected)
        twin.scale.mul_(2)
        assert not torch.equal(twin(x), expected)
    assert torch.equal(layer(x), expected)


@torch.no_grad()
def test_moving_a_layer_frees_what_was_prepared():
    layer = layer_of()
    x = torch.randn(2, 70)
    layer(x)
    gc.collect()
    before = len(packed_linear._prepared)
    layer.to("meta")
    gc.collect()
    assert len(packed_linear._prepared) == before - 1
    assert layer(x.to("meta")).shape == (2, 24)


# The operator, and the way without it


@pytest.fixture
def operator_calls(monkeypatch):
    """The inputs of the operator, noted from now on."""
    calls, operator = [], torch.ops.quantrature.linear

    def noted(x, *more):
        calls.append(x)
        return operator(x, *more)

    noted.default = operator.default
    monkeypatch.setattr(torch.ops.quantrature, "linear", noted)
    return calls


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("settings", [{}, {"outlier_fraction": 0.03, "meta_bits": 8}, {"method": "nf4"}], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_without_gradients_the_operator_is_called_once(settings, bias, dtype, operator_calls):
    layer = layer_of(bias=bias, **settings)
    for rows in (1, 3, 300):
        x = torch.randn(2, rows, 70).to(dtype)
        operator = torch.ops.quantrature.linear(x, layer._in_order(), layer._description, layer.bias)
        operator_calls.clear()
        for mode in (torch.no_grad(), torch.inference_mode()):
            with mode:
                assert torch.equal(layer(x), operator)
                assert torch.equal(layer(x.mT.contiguous().mT), operator)
        assert not operator_calls
    layer.requires_grad_(False)
    assert torch.equal(layer(x), operator) and not operator_calls


class Onlooker(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def with_tangent(layer, x):
    with forward_ad.dual_level():
        layer(forward_ad.make_dual(x, torch.ones_like(x)))


def within(context):
    def call(layer, x):
        with context():
            layer(x)

    return call


WATCHED = {
    "gradient of x": lambda layer, x: layer(x.requires_grad_()),
    "gradient of the bias": lambda layer, x: layer.requires_grad_()(x),
    "dispatch mode": within(lambda: FlopCounterMode(display=False)),
    "function mode": within(Onlooker),
    "default device": within(lambda: torch.device("cpu")),
    "profile": within(torch.profiler.profile),
    "vmap": lambda layer, x: torch.vmap(layer)(x),
    "forward gradient": with_tangent,
    "torch.func.jvp": lambda layer, x: torch.func.jvp(layer, (x,), (x,)),
    "torch.func.grad": lambda layer, x: torch.func.grad(lambda x: layer(x).sum())(x),
    "jit.trace": lambda layer, x: torch.jit.trace(layer, x, check_trace=False),
    "make_fx": lambda layer, x: make_fx(layer, tracing_mode="real")(x),
    "negated view": lambda layer, x: layer(torch.complex(x, x).conj().imag),
    "x elsewhere": lambda layer, x: layer(x.to("meta")),
    "sparse x": lambda layer, x: layer(x.to_sparse()),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("watch", WATCHED.values(), ids=WATCHED)
def test_who_watches_sees_the_operator(watch, operator_calls):
    layer = layer_of(bias=True).requires_grad_(False)
    x = torch.randn(3, 70)
    layer(x)
    layer(x)
    assert len(operator_calls) == 1
    # Torch may say that the operator has no rule for it, which is for the operator to say.
    with contextlib.suppress(RuntimeError, NotImplementedError):
        watch(layer, x)
    assert len(operator_calls) > 1


@torch.no_grad()
def test_a_negated_view_has_its_own_signs():
    layer, x = layer_of(), torch.randn(3, 70)
    negated = torch.complex(x, x)[0].conj().imag
    layer(x)
    assert torch.equal(layer(negated), layer(-x[0]))
