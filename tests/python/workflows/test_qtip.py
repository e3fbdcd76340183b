"""QTIP: incoherence, feedback between blocks, stored form, models."""

from dataclasses import replace

import pytest
import torch

import quantrature as qtr
from quantrature import InvalidArgumentError, Plan, checkpoint, models, ops
from quantrature.methods import Statistics, quantize_matrix
from quantrature.methods.qtip import block_ldlq, feedback
from quantrature.nn import QuantLinear, quantized_layers
from quantrature.ops import Trellis
from quantrature.packed import MatrixSpec
from quantrature.packed.product import RotatedProduct
from quantrature.packed.trellis import padded, rotated, unrotated
from quantrature.plan import PlanEntry
from quantrature.plan.option import stored_bytes
from tiny_models import tiny_model

OPTIONS = {"state_bits": 8}


def entry(bits=2, **settings):
    options = OPTIONS | settings.pop("options", {})
    return PlanEntry(bits, -1, method="qtip", options=options, **settings)


def sample(rows=48, cols=96, seed=0):
    """Weights, and the Hessian of inputs that hang together."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, cols, generator=generator)
    x = torch.randn(4 * cols, cols, generator=generator) @ torch.randn(cols, cols, generator=generator)
    x *= torch.rand(cols, generator=generator) ** 3
    return weight, x.T @ x / len(x)


def quantized(weight, hessian, plan_entry):
    return quantize_matrix("w", weight, plan_entry, statistics=Statistics(hessian=hessian))


def proxy(weight, image, hessian):
    e = (weight - image).double()
    return float((e @ hessian.double() * e).sum() / (weight.double() @ hessian.double() * weight.double()).sum())


@pytest.mark.parametrize(("rows", "cols"), [(32, 48), (96, 64), (688, 112)])
def test_rotations_are_taken_back_and_leave_the_loss(rows, cols):
    weight, hessian = sample(rows, cols)
    signs = [torch.from_numpy(ops.random_signs(n, seed)) for n, seed in ((cols, 1), (rows, 2))]
    turned = rotated(weight, *signs)
    torch.testing.assert_close(unrotated(turned, *signs), weight, atol=1e-5, rtol=1e-5)
    hessian_turned = rotated(hessian, signs[0], signs[0])
    before = (weight @ hessian * weight).sum()
    torch.testing.assert_close((turned @ hessian_turned * turned).sum(), before, rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (16, 16),
        (1, 16),
        (100, 112),
        (768, 768),
        (4096, 4096),
        (11008, 11008),
        (16 * 1021, 32 * 511),
        (16 * 1031, 32 * 516),
    ],
)
def test_sizes_are_padded_to_tiles_that_have_a_transform(size, expected):
    assert padded(size) == expected


def test_the_factor_is_a_block_ldl_decomposition():
    _, hessian = sample(16, 80)
    lower = feedback(hessian, 0.01)[0].double()
    damped = hessian.double() + 0.01 * hessian.double().diagonal().mean() * torch.eye(80)
    inverse = torch.linalg.inv(lower)
    d = inverse @ damped @ inverse.T
    for i in range(5):
        for j in range(5):
            block = d[16 * i : 16 * i + 16, 16 * j : 16 * j + 16]
            if i != j:
                assert block.abs().max() < 1e-3 * d.abs().max()
            corner = lower[16 * i : 16 * i + 16, 16 * j : 16 * j + 16]
            if i == j:
                torch.testing.assert_close(corner, torch.eye(16).double(), atol=1e-5, rtol=0)
            elif i < j:
                assert not corner.any()


def test_a_hessian_without_rank_is_damped_until_it_has_a_factor():
    assert torch.equal(feedback(torch.zeros(32, 32), 0.01)[0], torch.eye(32))
    lower, share = feedback(torch.ones(32, 32) - 0.05 * torch.eye(32), 0.01)
    assert torch.isfinite(lower).all()
    assert 0.05 / 0.95 < share < 0.11
    with pytest.raises(InvalidArgumentError, match="hessian must be finite"):
        feedback(torch.full((16, 16), torch.nan), 0.01)


def test_blocks_are_fed_with_the_errors_of_those_before():
    """The loop over blocks in the form of the paper, without buffers."""
    weight, hessian = sample(32, 304)
    trellis, lower = Trellis(2, 8), feedback(hessian, 0.01)[0]
    image = torch.zeros_like(weight)
    streams = {}
    for k in reversed(range(19)):
        now, done = slice(16 * k, 16 * k + 16), slice(16 * k + 16, None)
        wanted = weight[:, now] + (weight[:, done] - image[:, done]) @ lower[done, now]
        codes = ops.trellis_quantize(wanted.reshape(2, 256), trellis, 1.0)
        image[:, now] = ops.trellis_dequantize(codes, 256, trellis, 1.0).view(32, 16)
        streams[k] = codes
    expected = torch.stack([streams[k] for k in range(19)], 1).view(38, -1)
    got = block_ldlq(weight, lower, trellis, 1.0)
    # Sums of another order can turn a code; nearly all are the same.
    assert (got == expected).float().mean() > 0.97


@pytest.mark.parametrize("code", ["1mad", "3inst", "hyb"])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_errors_fall_with_bits_and_with_feedback(code, bits):
    weight, hessian = sample()
    with_feedback = quantized(weight, hessian, entry(bits, options={"code": code, "state_bits": 9}))
    without = quantized(weight, torch.eye(96), entry(bits, options={"code": code, "state_bits": 9}))
    mse = float((without.dequantize("float32") - weight).square().mean() / weight.square().mean())
    assert mse < {1: 0.33, 2: 0.095, 3: 0.032, 4: 0.012}[bits]
    assert proxy(weight, with_feedback.dequantize("float32"), hessian) < 0.7 * proxy(
        weight, without.dequantize("float32"), hessian
    )


def test_is_better_than_a_grid_of_more_bits():
    weight, hessian = sample(64, 128)
    mine = proxy(weight, quantized(weight, hessian, entry(2)).dequantize("float32"), hessian)
    grid = proxy(weight, quantize_matrix("w", weight, PlanEntry(2, 32, method="hqq")).dequantize("float32"), hessian)
    assert mine < 0.4 * grid


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("rows", "cols"), [(48, 96), (40, 50)])
@pytest.mark.parametrize("outliers", [0.0, 0.01])
def test_what_is_read_back_is_what_was_stored(dtype, rows, cols, outliers):
    weight, hessian = sample(rows, cols)
    stored = quantized(weight.to(dtype), hessian, entry(outlier_fraction=outliers))
    spec = MatrixSpec.of(stored)
    again = MatrixSpec.from_json(spec.to_json())
    assert again == spec
    assert again.dense.setting == "b2L8 3inst"
    tensors = {name: tensor.clone() for name, tensor in spec.tensors(stored).items()}
    assert sorted((n, tuple(t.shape), str(t.dtype)[6:]) for n, t in tensors.items()) == sorted(again.layout())
    assert again.nbytes == stored.nbytes == sum(t.numel() * t.element_size() for t in tensors.values())
    image = again.matrix(tensors).dequantize()
    assert torch.equal(image, stored.dequantize())
    assert image.dtype == dtype
    assert image.shape == (rows, cols)
    assert torch.equal(stored.dequantize("float32", slice(3, 9)), stored.dequantize("float32")[3:9])
    if outliers:
        places = stored.outliers.positions()
        assert torch.equal(image.view(-1)[places], weight.to(dtype).view(-1)[places])


def test_bits_are_those_of_codes_signs_and_scale():
    weight, hessian = sample(64, 128)
    stored = quantized(weight, hessian, entry(3))
    assert 8 * stored.nbytes == 3 * 64 * 128 + 64 + 128 + 32
    assert stored_bytes(64, 128, entry(3)) == stored.nbytes
    padded_to_tiles = quantized(*sample(40, 50), entry(2))
    assert stored_bytes(40, 50, entry(2)) == padded_to_tiles.nbytes


@pytest.mark.parametrize("count", [1, 5, 40])
@pytest.mark.parametrize(("rows", "cols"), [(48, 96), (40, 50)])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("outliers", [0.0, 0.02])
def test_products_stay_in_the_rotated_basis(rows, cols, outliers, scaled, count):
    weight, hessian = sample(rows, cols)
    stored = quantized(weight, hessian, entry(outlier_fraction=outliers))
    if scaled:
        stored = replace(stored, input_scale=torch.rand(cols) + 0.5)
    image = stored.dequantize("float32")
    matrix = RotatedProduct.of(stored)
    x, y = torch.randn(count, cols), torch.randn(count, rows)
    torch.testing.assert_close(matrix.product(x), x @ image.T, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(matrix.transposed_product(y), y @ image, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("count", [3, 70])
def test_layers_compute_what_their_matrix_does(count, dtype):
    weight, hessian = sample()
    stored = quantized(weight, hessian, entry(outlier_fraction=0.01))
    layer = QuantLinear(MatrixSpec.of(stored), torch.nn.Parameter(torch.randn(48)))
    layer.store(stored)
    x = torch.randn(2, count, 96).to(dtype).requires_grad_()
    expected = torch.nn.functional.linear(x.float(), stored.dequantize("float32"), layer.bias)
    got = layer(x)
    assert got.dtype == dtype
    torch.testing.assert_close(got, expected.to(dtype))
    seed = torch.randn_like(expected)
    (of_x,) = torch.autograd.grad(got, x, seed.to(dtype), retain_graph=True)
    (of_bias,) = torch.autograd.grad(got, layer.bias, seed.to(dtype))
    torch.testing.assert_close(
        of_x.float(), seed.to(dtype).float() @ stored.dequantize("float32"), atol=0.05, rtol=0.02
    )
    torch.testing.assert_close(of_bias, seed.to(dtype).float().sum((0, 1)))


def test_outliers_are_out_of_the_fit():
    weight, hessian = sample()
    weight[3, 5] = 1000.0
    plain = quantized(weight, hessian, entry())
    kept = quantized(weight, hessian, entry(outlier_fraction=1 / weight.numel()))
    rest = torch.ones_like(weight, dtype=torch.bool)
    rest[3, 5] = False
    errors = [(m.dequantize("float32") - weight)[rest].square().mean() for m in (plain, kept)]
    assert errors[1] < 0.2 * errors[0]
    assert kept.dequantize("float32")[3, 5] == 1000.0


def test_a_matrix_of_zeros_stays_near_zero():
    _, hessian = sample()
    image = quantized(torch.zeros(48, 96), hessian, entry()).dequantize("float32")
    assert image.abs().max() < 1e-20


def test_the_seed_and_nothing_else_changes_the_codes():
    weight, hessian = sample()
    one, same, other = (quantized(weight, hessian, entry(options={"seed": seed})).dense.codes for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 5}, "bits of qtip must be 1 to 4: got 5"),
        ({"sym": True}, "sym must be false with qtip"),
        ({"meta_bits": 8}, "meta_bits must be null with qtip"),
        ({"options": {"state_bits": 17}}, "state_bits must be 2 to 16: got state_bits=17"),
        ({"options": {"code": "lut"}}, "code must be 1mad, 3inst or hyb: got code='lut'"),
        ({"options": {"damp_percent": 0.0}}, "damp_percent of qtip must be between 0 and 1: got 0.0"),
        ({"options": {"seed": -1}}, "option seed of qtip must be 0 to"),
    ],
)
def test_entries_that_cannot_be_are_refused(settings, message):
    with pytest.raises(InvalidArgumentError, match=message):
        entry(**settings)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("code", "lut", "code must be 1mad, 3inst or hyb"),
        ("state_bits", 99, "state_bits must be 2 to 16"),
        ("state_bits", "8", "state_bits of a trellis must be at least 1: got '8'"),
        ("bits", 6, "bits must be 1 to 4: got bits=6"),
        ("shape", [48], "shape of a trellis must be 2 sizes"),
    ],
)
def test_a_broken_description_is_refused(field, value, message):
    described = MatrixSpec.of(quantized(*sample(), entry())).to_json()
    with pytest.raises(InvalidArgumentError, match=message):
        MatrixSpec.from_json({**described, field: value})


def test_tensors_that_do_not_fit_are_refused():
    stored = quantized(*sample(), entry())
    spec = MatrixSpec.of(stored)
    for name in ("weight", "scale", "input_signs", "output_signs"):
        tensors = dict(spec.tensors(stored))
        tensors[name] = tensors[name][:-1]
        with pytest.raises(InvalidArgumentError, match=f"tensor {name} must have shape"):
            spec.matrix(tensors)


WINDOWS = torch.randint(0, 256, (6, 24), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("layout", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("code", ["3inst", "hyb"])
def test_a_model_comes_back_from_its_checkpoint(layout, code, tmp_path):
    model = tiny_model(layout)
    with torch.no_grad():
        before = model(WINDOWS).logits
        qtr.quantize(model, bits=4, method="qtip", calibration=WINDOWS, state_bits=10, code=code)
        after = model(WINDOWS).logits
    assert torch.nn.functional.cosine_similarity(after.flatten(), before.flatten(), dim=0) > 0.95
    checkpoint.save(model, tmp_path / "out")
    loaded = models.load_model(tmp_path / "out")
    layers = quantized_layers(loaded)
    assert layers.keys() == quantized_layers(model).keys()
    assert all(layer.intact and layer.spec.dense.code == code for layer in layers.values())
    with torch.no_grad():
        assert torch.equal(loaded(WINDOWS).logits, after)
    assert all(m["kind"] == "trellis" for m in checkpoint.inspect(tmp_path / "out").modules.values())


def test_requant_restores_weights_beside_the_codes():
    model = tiny_model("llama")
    dense = {linear.name: linear.weight.clone() for linear in models.find_linears(model)}
    plan = Plan({name: entry(2) for name in dense})
    model, record = qtr.requant(model, WINDOWS, plan=plan, outlier_fraction=0.0, significant_fraction=0.02, nodes=2)
    kept = 0
    for name, layer in quantized_layers(model).items():
        matrix = layer.matrix
        if matrix.outliers is not None:
            places = matrix.outliers.positions()
            kept += len(places)
            assert torch.equal(layer.dequantize().view(-1)[places], dense[name].float().view(-1)[places])
    assert kept == int(0.02 * sum(w.numel() for w in dense.values()))
    losses = [stage.measured_loss_change for stage in record.stages]
    assert losses[-1] < losses[0]
