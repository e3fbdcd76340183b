"""Ops on tensors of a CUDA device against the same ops on NumPy arrays.

Where there is no such device, ``QUANTRATURE_CUDA_PLUGIN`` can name ``libquantrature_cuda_on_host.so``, which runs the
kernels on the host (see tests/cuda_on_host): torch tensors then count as being on the device.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest

import quantrature
from quantrature import QuantratureError, ops
from quantrature.ops import _arrays

torch = pytest.importorskip("torch")

ROOT = Path(__file__).resolve().parents[3]
ON_HOST = "on_host" in os.environ.get("QUANTRATURE_CUDA_PLUGIN", "")
GPU = not ON_HOST and torch.cuda.is_available() and quantrature.cuda_device_count()[0] > 0

needs_a_device = pytest.mark.skipif(
    not (GPU or ON_HOST), reason=f"no CUDA device: {quantrature.cuda_device_count()[1]}"
)
needs_a_gpu = pytest.mark.skipif(not GPU, reason="needs a GPU")


@pytest.fixture
def on_device(monkeypatch):
    """Puts an array on the device."""
    if GPU:
        return lambda x: torch.from_numpy(np.array(x)).cuda()

    def device_of(x):
        return torch.device("cuda", 0) if _arrays.is_torch(x) else None

    for module in (_arrays, sys.modules["quantrature.ops._grid"], sys.modules["quantrature.ops._outliers"]):
        monkeypatch.setattr(module, "device_of", device_of)
    monkeypatch.setattr(_arrays, "stream_of", lambda device: 0)
    return lambda x: torch.from_numpy(np.array(x))


@pytest.fixture
def model_on_device(monkeypatch):
    """Puts a model on the device."""
    pytest.importorskip("transformers")
    if GPU:
        yield lambda model: model.cuda()
        return
    from pretended_device import moved, pretended_device

    with pretended_device(monkeypatch):
        yield moved


def numbers(rows, cols, seed=0):
    x = np.random.default_rng(seed).standard_t(4, (rows, cols)).astype(np.float32)
    return x[0] if rows == 1 else x


def host(x):
    x = x.cpu()
    return (x.view(torch.uint16) if x.dtype == torch.bfloat16 else x).numpy()


def same(device, expected):
    assert host(device).dtype == expected.dtype
    np.testing.assert_array_equal(host(device).view(np.uint8), np.ascontiguousarray(expected).view(np.uint8))


def same_grid(q, expected):
    same(q.codes, expected.codes)
    for name in ("scale", "zero"):
        mine, other = getattr(q, name), getattr(expected, name)
        if isinstance(other, ops.QuantizedTensor):
            same_grid(mine, other)
        elif other is None:
            assert mine is None
        else:
            same(mine, other)


@needs_a_device
def test_moments(on_device):
    w = numbers(19, 300)
    for axis, group in ((None, None), (0, None), (1, None), (1, 64), (0, 7)):
        mine, expected = ops.moments(on_device(w), axis, group), ops.moments(w, axis, group)
        np.testing.assert_allclose(mine.table, expected.table, rtol=1e-11, atol=1e-10)
        np.testing.assert_array_equal(mine.table, ops.moments(on_device(w), axis, group).table)
    assert ops.kurtosis(on_device(w)) == pytest.approx(ops.kurtosis(w), rel=1e-12)


@needs_a_device
def test_the_integral(on_device):
    acc, grad, w, image = (numbers(9, 130, seed) for seed in range(4))
    mine = on_device(acc)
    ops.pqi_accumulate(mine, on_device(grad).bfloat16(), 0.3)
    expected = torch.from_numpy(acc).clone()
    expected += np.float32(0.3) * torch.from_numpy(grad).bfloat16().float()
    same(mine, expected.numpy())
    same(ops.interpolate(on_device(w), on_device(image), 0.25), ops.interpolate(w, image, 0.25))
    total = ops.pqi_sum(mine, on_device(w), on_device(image))
    assert total == pytest.approx(ops.pqi_sum(host(mine), w, image), rel=1e-12)
    expected = ops.pqi_finalize(host(mine).copy(), w, image)
    same(ops.pqi_finalize(mine, on_device(w), on_device(image)), expected)


@needs_a_device
@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_adding_up_notes_gradients_that_are_not_finite(on_device, wrong, dtype):
    flags = on_device(np.zeros(3, np.int32))
    grad, acc = numbers(9, 131), on_device(np.full((9, 131), np.inf, np.float32))
    ops.pqi_accumulate(acc, on_device(grad).to(dtype), 0.5, flags[1:2])
    assert flags.tolist() == [0, 0, 0]
    for place in (0, 600, 9 * 131 - 1):
        grad.flat[place] = wrong
        for flag in (0, 2):
            ops.pqi_accumulate(acc, on_device(grad).to(dtype), 0.5, flags[flag : flag + 1])
        grad.flat[place] = 1
        assert flags.tolist() == [1, 0, 1]
        flags.zero_()


@needs_a_device
def test_packing(on_device):
    codes = np.random.default_rng(0).integers(0, 8, (5, 333), dtype=np.uint8)
    packed = ops.pack(on_device(codes), 3)
    same(packed, ops.pack(codes, 3))
    same(ops.unpack(packed, 3, 333), codes)
    with pytest.raises(quantrature.InvalidArgumentError, match=r"\[pack\] codes must fit into bits: got code="):
        ops.pack(on_device(codes), 2)


@needs_a_device
def test_topk(on_device):
    a, b = numbers(7, 500), np.round(numbers(1, 2000, 1))
    for k in (0, 1, 77, 3500):
        for key in ("abs", "value"):
            mine, expected = ops.topk([on_device(a), on_device(b)], k, key), ops.topk([a, b], k, key)
            for x, y in zip(mine, expected, strict=True):
                same(x[0], y[0])
                same(x[1], y[1])
    b[1234] = np.nan
    with pytest.raises(quantrature.InvalidArgumentError, match="column=1234"):
        ops.topk(on_device(b), 3)


@needs_a_device
@pytest.mark.parametrize("way", [{"fraction": 0.02}, {"count": 3, "per": "row"}, {"indices": True}, {"count": 0}])
def test_outliers(on_device, way):
    w = numbers(13, 257)
    chosen = np.arange(5, w.size, 91)
    mine = ops.extract_outliers(on_device(w), **way | ({"indices": on_device(chosen)} if "indices" in way else {}))
    expected = ops.extract_outliers(w, **way | ({"indices": chosen} if "indices" in way else {}))
    same(mine[0], expected[0])
    for name in ("values", "columns", "row_offsets"):
        same(getattr(mine[1], name), getattr(expected[1], name))
    same(mine[1].to_dense(), expected[1].to_dense())
    same(mine[1].add_to(mine[0]), w)
    same(mine[1].rows(slice(3, 9)).to_dense(), expected[1].rows(slice(3, 9)).to_dense())


@needs_a_device
@pytest.mark.parametrize(
    "settings",
    [
        {"bits": 4},
        {"bits": 3, "group_size": 50, "solver": "mse"},
        {"bits": 4, "solver": "hqq"},
        {"bits": 2, "group_size": 32, "solver": "hqq", "axis": 0},
        {"bits": 8, "group_size": -1, "sym": True},
        {"bits": 3, "meta_bits": 8, "meta_group": 16},
        {"bits": 4, "scale_dtype": "float32"},
    ],
    ids=str,
)
def test_grids(on_device, settings):
    w = numbers(16, 320)
    q, expected = ops.quantize(on_device(w), **settings), ops.quantize(w, **settings)
    same_grid(q, expected)
    for dtype in ("float32", "float16"):
        same(q.dequantize(dtype), expected.dequantize(dtype))
    same(q.unpack(), expected.unpack())


@needs_a_device
def test_grids_beside_outliers(on_device):
    w = numbers(16, 320)
    rest, outliers = ops.extract_outliers(w, fraction=0.02)
    mine = ops.extract_outliers(on_device(w), fraction=0.02)
    for solver in ("minmax", "mse", "hqq"):
        q = ops.quantize(mine[0], bits=3, solver=solver, exclude=mine[1])
        same_grid(q, ops.quantize(rest, bits=3, solver=solver, exclude=outliers))
    with pytest.raises(quantrature.InvalidArgumentError, match="w must be finite: got value=inf, row=3, col=5"):
        ops.quantize(on_device(np.where(np.arange(5120).reshape(16, 320) == 3 * 320 + 5, np.inf, w)), bits=4)


@needs_a_device
@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_matvec(on_device, bits):
    w = numbers(37, 768)
    rest, outliers = ops.extract_outliers(on_device(w), fraction=0.01)
    q = ops.quantize(rest, bits=bits, exclude=outliers)
    packed = ops.PackedMatrix.of(q, outliers)
    dense = host(outliers.add_to(q.dequantize("float32"))).astype(np.float64)
    size = host(q.scale).astype(np.float64).repeat(64, axis=1) * (
        2**bits + abs(host(q.zero).astype(np.float64))
    ).repeat(64, axis=1)
    for vectors in (1, 2, 4, 7, 16, 33):
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            x = on_device(numbers(vectors, 768, vectors).reshape(vectors, 768)).to(dtype)
            exact = x.double().cpu().numpy()
            bound = 2.0**-23 * (768 / 8 + 32) * (abs(exact) @ (size + abs(dense)).T)
            assert (abs(host(packed.matvec(x)) - exact @ dense.T) <= bound).all()
    assert packed.matmul(x).dtype == torch.bfloat16
    with pytest.raises(quantrature.UnsupportedError, match="for the CPU"):
        packed.matvec(x, activations="int8")


@needs_a_device
@pytest.mark.parametrize("bits", [2, 3, 4, 6])
@pytest.mark.parametrize("group_size", [None, 64])
def test_matvec_of_codebooks(on_device, bits, group_size):
    w = numbers(37, 768)
    rest, outliers = ops.extract_outliers(on_device(w), fraction=0.01)
    q = ops.quantize(rest, bits, group_size, codebook=on_device(numbers(37, 1 << bits)), exclude=outliers)
    packed = ops.PackedMatrix.of(q, outliers)
    codes = host(q.dequantize("float32")).astype(np.float64)
    dense = host(outliers.add_to(q.dequantize("float32"))).astype(np.float64)
    for vectors in (1, 4, 7, 16, 33):
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            x = on_device(numbers(vectors, 768, vectors).reshape(vectors, 768)).to(dtype)
            exact = x.double().cpu().numpy()
            bound = 2.0**-23 * (768 / 8 + 32) * (abs(exact) @ (abs(codes) + abs(dense - codes)).T)
            assert (abs(host(packed.matvec(x)) - exact @ dense.T) <= bound).all()


@needs_a_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("method", ["rtn", "nf4"])
def test_layers(on_device, dtype, method):
    pytest.importorskip("transformers")
    from quantrature.methods import quantize_matrix
    from quantrature.nn import QuantLinear
    from quantrature.packed import MatrixSpec
    from quantrature.plan import PlanEntry

    entry = PlanEntry(bits=4, group_size=32, outlier_fraction=0.02, method=method)
    matrix = quantize_matrix("m", torch.from_numpy(numbers(48, 256)), entry)
    layer = QuantLinear(MatrixSpec.of(matrix))
    layer.store(matrix)
    layer.to(on_device(np.zeros(1)).device)
    weight = layer.dequantize(torch.float32).double()
    for rows in (1, 5, 40):
        x = on_device(numbers(rows, 256, 7).reshape(rows, 256)).to(dtype)
        y, exact = layer(x), x.double() @ weight.T
        assert y.dtype == dtype and y.device == x.device
        unit = torch.finfo(dtype).eps
        assert ((y.double() - exact).abs() <= (2.0**-12 + 2 * unit) * (x.double().abs() @ weight.abs().T) + 1e-6).all()


@needs_a_device
def test_arrays_in_different_places_are_refused(on_device):
    w = numbers(4, 64)
    with pytest.raises(quantrature.InvalidArgumentError, match=r"\[pqi_sum\] w must be on the device of acc"):
        ops.pqi_sum(on_device(w), w, w)


@needs_a_device
@pytest.mark.parametrize("group_size", [None, -1, 48])
def test_codebooks(on_device, group_size):
    w = numbers(12, 200)
    for codebook, table in (("nf4", "nf4"), (numbers(12, 16, 3), on_device(numbers(12, 16, 3)))):
        expected = ops.quantize(w, 4, group_size, codebook=codebook)
        q = ops.quantize(on_device(w), 4, group_size, codebook=table)
        same(q.codes, expected.codes)
        if group_size is not None:
            same(q.scale, expected.scale)
        same(q.dequantize("float32"), expected.dequantize("float32"))
        same(q.dequantize("float32", slice(3, 7)), expected.dequantize("float32", slice(3, 7)))


@needs_a_device
def test_hadamard_transforms(on_device):
    x = numbers(5, 384)
    signs = ops.random_signs(384, 1)
    turned = ops.hadamard(on_device(x), on_device(signs))
    same(turned, ops.hadamard(x, signs))
    same(ops.hadamard(turned, on_device(signs), inverse=True), ops.hadamard(host(turned), signs, inverse=True))


@needs_a_device
@pytest.mark.parametrize("code", ["1mad", "3inst", "hyb"])
def test_trellis_codes(on_device, code):
    trellis = ops.Trellis(bits=2, state_bits=12, code=code)
    codes = np.random.default_rng(0).integers(0, 256, (12, 64), dtype=np.uint8)
    dense = ops.trellis_dequantize(codes, 256, trellis, 0.5)
    same(ops.trellis_dequantize(on_device(codes), 256, trellis, 0.5), dense)
    w = dense.reshape(3, 4, 16, 16).swapaxes(1, 2).reshape(48, 64).astype(np.float64)
    x = numbers(5, 64)
    y = ops.trellis_matvec(on_device(codes), (48, 64), on_device(x), trellis, 0.5)
    assert (abs(host(y) - x @ w.T) <= 2.0**-23 * (64 / 4 + 32) * (abs(x) @ abs(w).T)).all()


@needs_a_device
@pytest.mark.parametrize("code", ["1mad", "3inst", "hyb"])
def test_the_search_for_trellis_codes(on_device, code):
    trellis = ops.Trellis(bits=2, state_bits=8, code=code)
    x = numbers(3, 64)
    same(ops.trellis_quantize(on_device(x), trellis, 0.7), ops.trellis_quantize(x, trellis, 0.7))
    x[2, 5] = np.nan
    with pytest.raises(quantrature.InvalidArgumentError, match="x must be finite: got value=nan, row=2, column=5"):
        ops.trellis_quantize(on_device(x), trellis, 0.7)


@needs_a_device
@pytest.mark.parametrize("weighted", [False, True])
def test_kmeans(on_device, weighted):
    x, weights = numbers(3, 300), numbers(3, 300, 1) ** 2 if weighted else None
    mine = ops.kmeans_1d(on_device(x), 8, on_device(weights) if weighted else None)
    for one, other in zip(mine, ops.kmeans_1d(x, 8, weights), strict=True):
        same(one, other)
    for one, other in zip(ops.kmeans_1d(on_device(x[1]), 5), ops.kmeans_1d(x[1], 5), strict=True):
        same(one, other)


@needs_a_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_hessians(on_device, monkeypatch, dtype):
    x = on_device(numbers(700, 75)).to(dtype)
    total = on_device(np.zeros((75, 75), np.float32))
    products = torch.backends.cuda.matmul
    products.allow_tf32 = True
    seen = []
    add = torch.Tensor.addmm_

    def watched(*args):
        seen.append(products.fp32_precision if hasattr(products, "fp32_precision") else products.allow_tf32)
        return add(*args)

    monkeypatch.setattr(torch.Tensor, "addmm_", watched)
    try:
        for _ in range(2):
            assert ops.hessian_accumulate(total, x) is total
        assert products.allow_tf32
        if hasattr(products, "fp32_precision"):
            products.fp32_precision = "tf32"
            ops.hessian_accumulate(torch.zeros_like(total), x)
            assert products.fp32_precision == "tf32"
    finally:
        products.allow_tf32 = False
    assert set(seen) <= {"ieee", False}
    exact = 2 * x.double().mT @ x.double()
    bound = 2 * x.double().abs().mT @ x.double().abs() * (256 + 6) * 2.0**-24
    assert ((total - exact).abs() <= bound).all()
    assert torch.equal(total, total.mT)
    with pytest.raises(quantrature.InvalidArgumentError, match=r"a column for each column of x: got shape=\(75, 75\)"):
        ops.hessian_accumulate(total, x[:, :74].contiguous())
    with pytest.raises(quantrature.InvalidArgumentError, match="total must be float32: got dtype=float64"):
        ops.hessian_accumulate(total.double(), x)
    with pytest.raises(quantrature.InvalidArgumentError, match="x must be on the device of total"):
        ops.hessian_accumulate(total, numbers(5, 75))


def hessian(columns, tokens):
    x = numbers(tokens, columns, 9)
    return ops.hessian_accumulate(np.zeros((columns, columns), np.float32), x + np.roll(x, 1, axis=1))


@needs_a_device
@pytest.mark.parametrize("group_size", [-1, 32, 48, 128])
@pytest.mark.parametrize("desc_act", [False, True])
@pytest.mark.parametrize("sym", [False, True])
def test_gptq(on_device, group_size, desc_act, sym):
    w, h = numbers(37, 200), hessian(200, 500)
    rest, outliers = ops.extract_outliers(w, fraction=0.02)
    mine, theirs = ops.extract_outliers(on_device(w), fraction=0.02)
    settings = {"group_size": group_size, "sym": sym}
    ways = [
        {"bits": 3, **settings},
        {"bits": 4, "solver": "mse", **settings},
        {"grid": ({"bits": 3, "solver": "mse"}, {"bits": 2, "meta_bits": 8})[sym]},
    ]
    for way in ways:
        expected_way, my_way = dict(way), dict(way)
        if "grid" in way:
            expected_way["grid"] = ops.quantize(rest, **way["grid"], **settings, exclude=outliers)
            my_way["grid"] = ops.quantize(mine, **way["grid"], **settings, exclude=theirs)
        expected = ops.gptq(rest, h, **expected_way, desc_act=desc_act, exclude=outliers)
        found = ops.gptq(mine, on_device(h), **my_way, desc_act=desc_act, exclude=theirs)
        same_grid(found[0], expected[0])
        assert found[1] == expected[1]


@needs_a_device
@pytest.mark.parametrize("fitted", [False, True])
@pytest.mark.parametrize("desc_act", [False, True])
def test_gptq_with_a_factor_that_is_given(on_device, fitted, desc_act):
    w, h = numbers(37, 203), hessian(203, 500)
    h[7] = h[:, 7] = 0
    way = {"bits": 3, "group_size": 32, "desc_act": desc_act}
    mine, grid = on_device(w), {} if fitted else {"grid": ops.quantize(w, 3, 32)}
    my_grid = {} if fitted else {"grid": ops.quantize(on_device(w), 3, 32)}
    expected = ops.gptq(w, h, **(way if fitted else {"desc_act": desc_act}), **grid)
    factor = ops.gptq_factor(on_device(h), desc_act=desc_act, group_size=32 if fitted else None)
    found = ops.gptq(mine, factor, **(way if fitted else {"desc_act": desc_act}), **my_grid)
    assert (host(found[0].unpack()) == expected[0].unpack()).mean() > 0.99
    assert found[1].loss == pytest.approx(expected[1].loss, rel=1e-2)
    assert (found[1].damp_percent, found[1].dead) == (expected[1].damp_percent, expected[1].dead) == (0.01, 1)
    on_cpu = ops.GptqFactor(host(factor.panels), *(x.numpy() for x in (factor.order, factor.pivots)), 0.01, 1)
    same_grid(found[0], ops.gptq(w, on_cpu, **(way if fitted else {"desc_act": desc_act}), **grid)[0])


@needs_a_device
def test_a_factor_raises_its_damping_and_refuses_as_gptq_does(on_device):
    w, h = numbers(5, 40), np.eye(40, dtype=np.float32)
    grid, my_grid = ops.quantize(w, 4, 8), ops.quantize(on_device(w), 4, 8)
    for value in (1.2, 50):
        h[3, 0] = value
        expected, found = ops.gptq(w, h, grid), ops.gptq(on_device(w), ops.gptq_factor(on_device(h)), my_grid)
        assert found[1].damp_percent == expected[1].damp_percent > 0.1
        same_grid(found[0], expected[0])
    for place, value in (((4, 4), -2), ((6, 2), np.nan)):
        bad = np.eye(40, dtype=np.float32)
        bad[place] = value
        with pytest.raises(quantrature.InvalidArgumentError) as expected:
            ops.gptq(w, bad, grid)
        with pytest.raises(quantrature.InvalidArgumentError) as found:
            ops.gptq_factor(on_device(bad))
        assert str(found.value) == str(expected.value)
    with pytest.raises(
        quantrature.InvalidArgumentError, match=r"\[gptq\] factor must be of a Hessian of as many columns"
    ):
        ops.gptq(on_device(w), ops.gptq_factor(on_device(np.eye(39, dtype=np.float32))), my_grid)
    with pytest.raises(quantrature.InvalidArgumentError, match="order must keep groups whole where grids are fitted"):
        ops.gptq(
            on_device(w), ops.gptq_factor(on_device(np.diag(np.float32(numbers(1, 40) ** 2)))), bits=4, group_size=8
        )
    with pytest.raises(quantrature.InvalidArgumentError, match="damp must be finite and not negative"):
        ops.gptq_factor(on_device(h), damp_percent=-1)
    with pytest.raises(quantrature.InvalidArgumentError, match="hessian must be a torch tensor"):
        ops.gptq_factor(h)
    with pytest.raises(quantrature.InvalidArgumentError, match="hessian must be square"):
        ops.gptq_factor(on_device(h[:7].copy()))


@needs_a_device
def test_gptq_refuses(on_device):
    w, h = numbers(4, 64), hessian(64, 100)
    bad = w.copy()
    bad[2, 5] = np.inf
    with pytest.raises(
        quantrature.InvalidArgumentError, match=r"\[gptq\] w must be finite: got value=inf, row=2, col=5"
    ):
        ops.gptq(on_device(bad), on_device(h), bits=4)
    with pytest.raises(quantrature.InvalidArgumentError, match=r"\[gptq\] scale must be on the device of w"):
        ops.gptq(on_device(w), on_device(h), ops.quantize(w, 4))


@needs_a_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["rtn", "mse", "hqq", "gptq", "squeezellm"])
def test_a_model_is_quantized_where_it_is(model_on_device, monkeypatch, method, dtype):
    from quantrature.nn import quantized_layers
    from sharp_models import TOKENS, sharp_model

    settings = {"bits": 3, "group_size": 16, "method": method, "outlier_fraction": 0.01}
    if method in ("gptq", "squeezellm"):
        settings["calibration"] = TOKENS
    if method == "squeezellm":
        del settings["group_size"]
    hessians, weights = [], []
    quantize, gptq, accumulate = ops.quantize, ops.gptq, ops.hessian_accumulate

    def watched(op):
        def watching(w, *args, **kwargs):
            weights.append(w.device.type)
            return op(w, *args, **kwargs)

        return watching

    def watched_sum(total, x):
        hessians.append((total.device.type, x.device.type))
        # What a device sums has other bits: the model on the CPU is given these.
        sys.modules["quantrature.ops._hessian"]._add_on_device(total, x)

    def with_factor(w, h, grid=None, *, damp_percent, desc_act, **how):
        factor = ops.gptq_factor(h, damp_percent=damp_percent, desc_act=desc_act)
        return gptq(w, factor, grid, **how)

    expected = sharp_model().to(dtype)
    with monkeypatch.context() as of_device:
        of_device.setattr(ops, "gptq", with_factor)
        of_device.setattr(ops, "hessian_accumulate", watched_sum if ON_HOST else accumulate)
        quantrature.quantize(expected, **settings)
    hessians.clear()
    model = model_on_device(sharp_model().to(dtype))
    monkeypatch.setattr(ops, "quantize", watched(quantize))
    monkeypatch.setattr(ops, "gptq", watched(gptq))
    monkeypatch.setattr(ops, "hessian_accumulate", watched_sum)
    quantrature.quantize(model, **settings)
    assert set(hessians) == ({("cuda", "cuda")} if method == "gptq" else set())
    assert set(weights) == {"cpu" if method == "squeezellm" else "cuda"}
    layers = quantized_layers(model)
    for name, layer in quantized_layers(expected).items():
        mine, other = (x.matrix.dequantize("float32").cpu() for x in (layers[name], layer))
        if ON_HOST or method != "gptq":
            assert torch.equal(mine, other), name
        else:  # activations of a GPU round in other ways
            assert (mine == other).float().mean() > 0.9, name


@needs_a_device
def test_statistics_that_are_kept_are_on_the_cpu(model_on_device):
    from quantrature.models import find_linears
    from quantrature.plan import PlanEntry
    from quantrature.quantization.sequential import calibrate, collect
    from sharp_models import TOKENS, sharp_model

    model = model_on_device(sharp_model())
    linears = find_linears(model)
    entries = {linear.name: PlanEntry(3, 16, method="gptq") for linear in linears}
    with torch.no_grad():
        kept = calibrate(model, linears, entries, TOKENS, keep_statistics=True).statistics
        seen = collect(model, linears, {name: ["hessian"] for name in entries}, TOKENS)
    for found in (kept, seen):
        assert found.keys() == entries.keys()
        assert {statistics.hessian.device.type for statistics in found.values()} == {"cpu"}
        together = [next(s for name, s in found.items() if name.endswith(role)) for role in ("q_proj", "v_proj")]
        assert together[0].hessian is together[1].hessian


@needs_a_device
def test_where_a_device_has_no_memory_for_a_factor_the_cpu_finds_it(model_on_device, monkeypatch):
    from sharp_models import TOKENS, sharp_model

    given = []
    gptq = ops.gptq

    def watched(w, h, *args, **kwargs):
        given.append((w.device.type, type(h) is ops.GptqFactor))
        return gptq(w, h, *args, **kwargs)

    def full(*args, **kwargs):
        raise torch.cuda.OutOfMemoryError

    monkeypatch.setattr(ops, "gptq", watched)
    settings = {"bits": 3, "group_size": 16, "method": "gptq", "calibration": TOKENS}
    quantrature.quantize(model_on_device(sharp_model()), **settings)
    assert set(given) == {("cuda", True)}
    given.clear()
    monkeypatch.setattr(ops, "gptq_factor", full)
    quantrature.quantize(model_on_device(sharp_model()), **settings)
    assert set(given) == {("cuda", False)}


@needs_a_device
def test_a_model_is_quantized_on_the_cpu_without_a_backend(model_on_device, monkeypatch):
    from quantrature import methods
    from sharp_models import TOKENS, sharp_model

    monkeypatch.setattr(methods, "cuda_device_count", lambda: (0, "there is none"))
    seen = []
    gptq = ops.gptq

    def watched(w, h, *args, **kwargs):
        seen.append((w.device.type, h.device.type))
        return gptq(w, h, *args, **kwargs)

    monkeypatch.setattr(ops, "gptq", watched)
    model = model_on_device(sharp_model())
    quantrature.quantize(model, bits=3, group_size=16, method="gptq", calibration=TOKENS)
    assert set(seen) == {("cpu", "cpu")}


ANALYSIS = {"bits": 2, "group_size": 16, "nodes": 2, "batch_size": 2}


def places_of_accumulators(monkeypatch):
    """Devices of what is added to what, from now on."""
    found = []
    accumulate = ops.pqi_accumulate

    def watched(acc, grad, weight, not_finite=None):
        found.append((acc.device.type, grad.device.type))
        accumulate(acc, grad, weight, not_finite)

    monkeypatch.setattr(ops, "pqi_accumulate", watched)
    return found


def places_of_images(monkeypatch):
    """Names of ops, and devices of what they quantize and interpolate, from now on."""
    found = set()

    def watch(name, at):
        op = getattr(ops, name)

        def watched(*arrays, **settings):
            found.update((name, arrays[i].device.type) for i in at)
            return op(*arrays, **settings)

        monkeypatch.setattr(ops, name, watched)

    watch("quantize", [0])
    watch("interpolate", [0, 1])
    return found


def same_maps(found, expected):
    assert found.keys() == expected.keys()
    for metric, maps in expected.items():
        for name, values in maps.items():
            mine = found[metric][name]
            assert mine.device.type == "cpu"
            if ON_HOST:
                assert torch.equal(mine, values)
            else:  # the passes of a GPU round in other ways
                torch.testing.assert_close(mine, values, rtol=0.05, atol=float(values.abs().max()) * 1e-3)


@needs_a_device
@pytest.mark.parametrize(
    ("layout", "abs_mode"), [("llama", "after_mean"), ("gpt2", "per_sample"), ("gpt2", "per_node")]
)
def test_gradients_are_added_up_where_the_weights_are(model_on_device, monkeypatch, layout, abs_mode):
    from sharp_models import TOKENS, sharp_model

    metrics = ["pqi", "first_order", "fisher", "activation_error", "error", "magnitude", "kurtosis"]
    metrics = metrics if abs_mode == "after_mean" else ["pqi"]
    settings = ANALYSIS | {"abs_mode": abs_mode, "metrics": metrics}
    expected = quantrature.analyze(sharp_model(layout), TOKENS, **settings)
    model = model_on_device(sharp_model(layout))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    places, images = places_of_accumulators(monkeypatch), places_of_images(monkeypatch)
    found = quantrature.analyze(model, TOKENS, **settings)
    assert images == {("quantize", "cuda"), ("interpolate", "cuda")}
    for mine, other in zip(found.matrices, expected.matrices, strict=True):
        rel = 1e-6 if ON_HOST else 1e-2
        assert mine.scores == pytest.approx(other.scores, rel=rel)
        assert mine.error == pytest.approx(other.error, rel=1e-6)
        assert mine.nbytes == other.nbytes
    of_pass = len(expected.matrices) * len(TOKENS)
    assert len(places) == of_pass * {"after_mean": 3, "per_sample": 3, "per_node": 2}[abs_mode]
    assert set(places) == {("cuda", "cuda")}
    same_maps(found.maps, expected.maps)
    assert found.predicted_loss_change == pytest.approx(expected.predicted_loss_change, rel=1e-12 if ON_HOST else 1e-2)
    for name, p in model.named_parameters():
        assert bool((p == before[name]).all())


@needs_a_device
@pytest.mark.parametrize("way", ["in files", "no backend"])
def test_gradients_are_added_up_on_the_cpu_for_files_and_without_a_backend(model_on_device, monkeypatch, tmp_path, way):
    from quantrature.analysis import path
    from sharp_models import TOKENS, sharp_model

    settings = ANALYSIS | {"metrics": ["pqi"]}
    expected = quantrature.analyze(sharp_model(), TOKENS, **settings)
    if way == "in files":
        settings["map_folder"] = tmp_path
    else:
        monkeypatch.setattr(path, "cuda_device_count", lambda: (0, "there is none"))
    places, images = places_of_accumulators(monkeypatch), places_of_images(monkeypatch)
    found = quantrature.analyze(model_on_device(sharp_model()), TOKENS, **settings)
    assert set(places) == {("cpu", "cpu")}
    assert images == {("quantize", "cpu"), ("interpolate", "cpu")}
    same_maps(found.maps, expected.maps)


@needs_a_device
def test_originals_stay_on_the_cpu_where_a_device_has_little_memory(model_on_device, monkeypatch):
    from sharp_models import TOKENS, sharp_model

    settings = ANALYSIS | {"metrics": ["pqi"]}
    expected = quantrature.analyze(sharp_model(), TOKENS, **settings)
    model = model_on_device(sharp_model())
    needed = sum(5 * linear.numel for linear in quantrature.models.find_linears(model))
    for free, place in ((4 * needed - 1, "cpu"), (4 * needed, "cuda")):
        with monkeypatch.context() as now:
            now.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, free))
            now.setattr(torch.cuda, "memory_reserved", lambda device: 0)
            now.setattr(torch.cuda, "memory_allocated", lambda device: 0)
            places, images = places_of_accumulators(now), places_of_images(now)
            found = quantrature.analyze(model, TOKENS, **settings)
        assert images == {("quantize", place), ("interpolate", place)}
        assert set(places) == {("cuda", "cuda")}
        same_maps(found.maps, expected.maps)


@needs_a_device
def test_images_of_methods_that_do_not_run_there_are_taken_along(model_on_device, monkeypatch):
    from quantrature.analysis import _analyze
    from sharp_models import TOKENS, sharp_model

    monkeypatch.setattr(_analyze, "candidates", lambda group_size: [])  # which would take a minute
    settings = ANALYSIS | {"metrics": ["pqi"], "method": "awq"}
    expected = quantrature.analyze(sharp_model(), TOKENS, **settings)
    model = model_on_device(sharp_model())
    images = places_of_images(monkeypatch)
    found = quantrature.analyze(model, TOKENS, **settings)
    assert images == {("quantize", "cpu"), ("interpolate", "cuda")}
    same_maps(found.maps, expected.maps)


@needs_a_device
@pytest.mark.parametrize("method", ["rtn", "mse", "hqq", "nf4", "fp4", "squeezellm", "qtip", "awq", "gptq"])
def test_every_method_leaves_the_matrix_where_its_weights_are(model_on_device, method):
    from quantrature.methods import METHODS, Statistics, quantize_matrix
    from quantrature.packed import MatrixSpec
    from quantrature.plan import PlanEntry

    there = torch.nn.Module()
    there.register_buffer("weight", torch.from_numpy(numbers(32, 64)).bfloat16())
    there.register_buffer("kept", torch.tensor([7, 70, 700]))
    x = torch.from_numpy(numbers(100, 64, 1))
    given = Statistics("m", x.T @ x / 100, torch.from_numpy(numbers(32, 64, 2) ** 2), x, 100)
    about = METHODS[method]
    entry = PlanEntry(4, 32 if about.group_size is None else about.group_size, method=method)
    expected = quantize_matrix("m", there.weight, entry, there.kept, given)
    there = model_on_device(there)
    found = quantize_matrix("m", there.weight, entry, there.kept, given)
    assert all(tensor.device.type == "cuda" for tensor in MatrixSpec.of(found).tensors(found).values())
    assert MatrixSpec.of(found) == MatrixSpec.of(expected)
    image = found.dequantize("float32")
    assert image.device.type == "cuda"
    assert torch.equal(image.cpu(), expected.dequantize("float32"))


@needs_a_device
def test_an_interrupted_analysis_goes_on_where_the_weights_are(model_on_device, monkeypatch, tmp_path):
    from interruptions import limited_to
    from quantrature.analysis import objective
    from quantrature.analysis.snapshot import Snapshot
    from sharp_models import TOKENS, sharp_model

    settings = ANALYSIS | {"metrics": ["pqi"]}
    whole = quantrature.analyze(model_on_device(sharp_model()), TOKENS, **settings)
    settings["resume_folder"] = tmp_path / "state"
    monkeypatch.setattr(Snapshot, "every", 0.0)
    save = Snapshot.save
    monkeypatch.setattr(Snapshot, "save", lambda self, *state, last=False: save(self, *state, last=True))
    with monkeypatch.context() as interrupted:
        measured = 2 * len(TOKENS) // ANALYSIS["batch_size"]  # at both ends of the path, before the integral
        limited = limited_to(measured + 3, objective.next_token_nll, KeyboardInterrupt)
        interrupted.setattr(objective, "next_token_nll", limited)
        with pytest.raises(KeyboardInterrupt):
            quantrature.analyze(model_on_device(sharp_model()), TOKENS, **settings)
    places = places_of_accumulators(monkeypatch)
    found = quantrature.analyze(model_on_device(sharp_model()), TOKENS, **settings, resume="required")
    assert len(places) == len(found.matrices)
    assert set(places) == {("cuda", "cuda")}
    same_maps(found.maps, whole.maps)


@needs_a_device
@pytest.mark.parametrize(("method", "selection"), [("rtn", "temperature"), ("rtn", "greedy"), ("awq", "temperature")])
def test_requant_ranks_and_quantizes_weights_where_they_are(model_on_device, monkeypatch, method, selection):
    from quantrature.nn import quantized_layers
    from sharp_models import TOKENS, sharp_model

    settings = ANALYSIS | {"outlier_fraction": 0.01, "significant_fraction": 0.005, "temperatures": [1.0]}
    settings |= {"method": method, "selection": selection}
    expected, record = quantrature.requant(sharp_model(), TOKENS, **settings)
    ranked = []
    topk = ops.topk

    def watched(x, k, key="abs"):
        if isinstance(x, list):
            ranked.append({values.device.type for values in x})
        return topk(x, k, key)

    monkeypatch.setattr(ops, "topk", watched)
    places, images = places_of_accumulators(monkeypatch), places_of_images(monkeypatch)
    model, found = quantrature.requant(model_on_device(sharp_model()), TOKENS, **settings)
    assert ranked == [{"cuda"}] * 2
    assert images == {("quantize", "cuda" if method == "rtn" else "cpu"), ("interpolate", "cuda")}
    assert set(places) == {("cuda", "cuda")}
    assert found.stages[-1].kept == record.stages[-1].kept
    if ON_HOST:
        for mine, other in zip(found.stages, record.stages, strict=True):
            assert (mine.kept, mine.measured_loss_change) == (other.kept, other.measured_loss_change)
            assert mine.predicted_loss_change == pytest.approx(other.predicted_loss_change, rel=1e-12)
        layers = quantized_layers(model)
        for name, layer in quantized_layers(expected).items():
            assert layers[name].spec == layer.spec  # with a hash over all tensors
            assert layers[name].device.type == "cuda"


@needs_a_device
def test_maps_on_several_devices_are_ranked_together(model_on_device):
    from quantrature.requantization.matrices import Matrices

    names = ("a", "b")
    maps = {name: torch.from_numpy(abs(numbers(6, 40, seed))) for seed, name in enumerate(names)}
    of = types.SimpleNamespace(
        linears=[types.SimpleNamespace(name=name) for name in names],
        stored={name: types.SimpleNamespace(outliers=None) for name in names},
    )
    expected = Matrices.largest(of, dict(maps), 30)
    there = torch.nn.Module()
    there.register_buffer("a", maps["a"])
    found = Matrices.largest(of, {"a": model_on_device(there).a, "b": maps["b"]}, 30)
    for name in names:
        assert found[name].device.type == "cpu"
        assert torch.equal(found[name], expected[name])


@needs_a_device
@pytest.mark.parametrize("metric", ["pqi", "first_order", "fisher"])
def test_an_analysis_on_a_device_names_the_gradient_that_is_not_finite(model_on_device, metric):
    from sharp_models import TOKENS, sharp_model

    model = model_on_device(sharp_model())
    model.model.layers[1].mlp.up_proj.weight.register_hook(lambda gradient: gradient * np.inf)
    named = r"gradient of model.layers.1.mlp.up_proj is not finite at node t=[\d.]+, calibration sample 0"
    with pytest.raises(QuantratureError, match=named):
        quantrature.analyze(model, TOKENS, **ANALYSIS, metrics=[metric])


@needs_a_device
def test_gradients_of_a_device_that_are_not_finite_are_named_after_the_pass(model_on_device):
    from quantrature.models.finiteness import GradientCheck

    there = torch.nn.Module()
    for name, value in (("good", 3e38), ("bad", np.nan), ("infinite", -np.inf)):
        there.register_buffer(name, torch.full((2, 3), value))
    there.register_buffer("sum", torch.zeros(2, 3))
    there = model_on_device(there)
    check = GradientCheck(["infinite", "good", "bad"])

    def add(name, gradient, t, samples):
        ops.pqi_accumulate(there.sum, gradient, 0.5, check(name, gradient, t, samples))

    for _ in range(4):  # the sum overflows
        add("good", there.good, 0.25, range(1))
        check.settle(0.25, range(1))
    assert there.sum.isinf().all()
    for name in ("good", "bad", "infinite"):
        add(name, getattr(there, name), 0.5, range(2, 4))
    with pytest.raises(QuantratureError, match=r"of bad is not finite at node t=0.5, calibration sample 2, 3"):
        check.settle(0.5, range(2, 4))
    add("good", there.good, 0.5, range(1))
    check.settle(0.5, range(1))
    add("infinite", there.infinite.half(), 0.5, range(1))
    with pytest.raises(QuantratureError, match="of infinite is"):
        check.settle(0.5, range(1))


@pytest.mark.skipif(not ON_HOST, reason="needs kernels that run on the host")
def test_the_benchmark_calls_what_there_is(model_on_device, monkeypatch):
    """Its rows at small sizes, with a clock that only calls; and what a peer that is not installed leaves."""
    source = importlib.util.spec_from_file_location("cuda_bench", ROOT / "bench" / "ops" / "cuda.py")
    bench = importlib.util.module_from_spec(source)
    source.loader.exec_module(bench)

    class Clock:
        seconds = 0.0

        def waiting(self, call):
            call()
            self.seconds += 1e-3
            return self.seconds

        def queued(self, calls):
            return sum(map(self.waiting, calls)) / len(calls)

    def of_torch(dense, copies):
        return [lambda: dense @ dense.T] * copies, dense.nbytes

    def missing(dense, copies):
        raise ImportError("No module named 'missing'")

    monkeypatch.setattr(bench, "PEERS", {"torch's own": of_torch, "missing": missing})
    result = {
        "date": "today",
        "device": "none",
        "streams": bench.stream_rows(Clock(), 4, 512),
        "steps": bench.step_rows(Clock(), 1, 128, 8),
        "gptq": bench.gptq_rows(Clock(), 8, 256, 300),
        "products": bench.product_rows(Clock(), [(64, 256)], 0),
    }
    lines = bench.table(json.loads(json.dumps(result))).splitlines()
    assert [line for line in lines if line.startswith("PQI accumulate in the backward pass: ")] == [
        "PQI accumulate in the backward pass: 50.00% of a step of 2.0 ms, 8 tokens, 0 million weights"
    ]
    assert any(line.startswith("torch's own 4 bits, g64") for line in lines)
    assert not any("missing" in line for line in lines)


def test_the_benchmark_is_skipped_where_there_is_no_gpu():
    if torch.cuda.is_available():
        pytest.skip("there is one")
    done = subprocess.run([sys.executable, "-m", "bench.ops.cuda"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"bench/ops/cuda.py: skipped, torch {torch.__version__} sees no NVIDIA GPU\n"


def test_the_benchmark_of_a_model_runs_on_the_cpu(tmp_path):
    pytest.importorskip("transformers")
    command = [sys.executable, "-m", "bench.ops.cuda_model", ROOT / "python" / "quantrature" / "demo" / "model"]
    sizes = ["--nsamples", "1", "--seqlen", "16", "--steps", "16"]
    done = subprocess.run(
        [*command, "--device", "cpu", *sizes, "--output", tmp_path / "model.json"],
        env=os.environ | {"PYTHONPATH": str(Path(quantrature.__file__).parents[1])},  # in place or installed
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads((tmp_path / "model.json").read_text())
    assert (found["windows"], found["seqlen"], found["device"]) == (1, 16, "CPU")
    assert found["analysis"]["measured"] == pytest.approx(found["analysis"]["predicted"], rel=0.5, abs=0.1)
    assert found["models"][0]["name"] == "dense"
    assert all(row["tokens_per_second"] > 0 and row["loss"] > 0 for row in found["models"])
    assert [row["tokens"] for row in found["steps"]] == [16]
    assert done.stdout.count(" tokens/s, loss ") == len(found["models"])


def test_the_documentation_names_the_kernels():
    declared = r"__global__\s+void(?:\s+__launch_bounds__\([^()]*\))?\s+(\w+)\("
    kernels = set()
    for file in (ROOT / "cuda").rglob("*.cu*"):
        text = re.sub(r"//.*", "", file.read_text())
        kernels |= set(re.findall(declared, text))
        assert len(re.findall(declared, text)) == text.count("__global__"), file
    table = re.findall(r"^\| .* \|$", (ROOT / "docs" / "cuda.md").read_text(), re.MULTILINE)
    named = {name for line in table for name in re.findall(r"`(\w+)`", line.split("|")[2])} - {"topk"}
    assert named == kernels
    assert len(kernels) > 40


@needs_a_gpu
def test_work_is_queued_on_the_current_stream():
    x, out = torch.zeros(1 << 20, device="cuda"), torch.zeros(1 << 20, device="cuda")
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        x.fill_(3)
        ops.interpolate(x, x, 0.5, out=out)
    side.synchronize()
    assert (out == 3).all()


def test_a_missing_backend_says_why():
    command = "import quantrature; print(quantrature.cuda_device_count())"
    for plugin, reason in (
        ("/nowhere/plugin.so", "/nowhere/plugin.so"),
        ("libm.so.6", "another version of quantrature"),
    ):
        environment = os.environ | {"QUANTRATURE_CUDA_PLUGIN": plugin}
        done = subprocess.run(
            [sys.executable, "-c", command], env=environment, capture_output=True, text=True, check=True
        )
        assert done.stdout.startswith("(0, ") and reason in done.stdout
