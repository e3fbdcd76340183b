import dataclasses
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pairwise import pairwise
from quantrature import InvalidArgumentError, ops


def weights(*shape, seed=0):
    return (np.random.default_rng(seed).standard_t(4, shape) * 0.02).astype(np.float32)


def groups_of(w, group_size, axis):
    """The groups of grid.hpp, one after the other, and the positions of their numbers in w read row by row."""
    positions = np.arange(w.size).reshape(np.atleast_2d(w).shape)
    if axis == 0:
        view = positions.reshape(len(positions) if group_size == -1 else group_size, -1)
        rows = list(view.T)
    else:
        step = positions.shape[1] if group_size == -1 else group_size
        rows = [row[i : i + step] for row in positions for i in range(0, len(row), step)]
    return [(w.reshape(-1)[at], at) for at in rows]


def minmax_line(x, bits, sym):
    """Inverse step, zero and scale by the formulas of grid.hpp."""
    top, lo, hi = np.float32(2**bits - 1), x.min(), x.max()
    if sym:
        m = max(abs(lo), abs(hi))
        zero = np.float32(2 ** (bits - 1) if bits > 1 else 0.5)
        return (top / (2 * m), zero, 2 * m / top) if m > 0 else (np.float32(0), zero, np.float32(bits > 1))
    if lo == hi:
        return (np.float32(0), np.float32(-1), lo) if lo else (np.float32(0), np.float32(0), np.float32(1))
    inv = top / (hi - lo)
    return inv, -lo * inv, 1 / inv


def codes_on(x, line, bits):
    return np.clip(np.rint(x * line[0] + line[1]), 0, 2**bits - 1).astype(np.uint8)


def expected_minmax(w, bits, group_size, axis, sym):
    codes = np.empty(w.size, np.uint8)
    lines = []
    for x, at in groups_of(w, group_size, axis):
        line = minmax_line(x, bits, sym)
        codes[at] = codes_on(x, line, bits)
        lines.append(line)
    _, zero, scale = np.array(lines, np.float32).T
    return codes.reshape(w.shape), scale, zero


def values_of(q):
    """The numbers of q, computed in NumPy from its parts."""

    def numbers(part):
        if isinstance(part, ops.QuantizedTensor):
            return values_of(part).reshape(-1)
        return np.asarray(part).astype(np.float32).reshape(-1)

    codes = np.asarray(q.unpack()).astype(np.float32)
    out = np.empty(codes.size, np.float32)
    half = np.float32(2 ** (q.bits - 1) if q.bits > 1 else 0.5)
    scale = numbers(q.scale)
    zero = np.full_like(scale, half) if q.zero is None else numbers(q.zero)
    for g, (x, at) in enumerate(groups_of(codes, q.group_size, q.axis)):
        out[at] = (x - zero[g]) * scale[g]
    return out.reshape(q.shape)


@pytest.mark.parametrize(
    ("shape", "group_size", "bits", "sym"),
    pairwise(
        [(1,), (100,), (1, 64), (3, 7), (5, 200), (4, 257), (2, 5000)],
        [-1, 1, 2, 3, 16, 63, 64, 128, 1000],
        range(1, 9),
        [False, True],
    ),
)
def test_minmax_is_the_formula(shape, group_size, bits, sym, every_target):
    w = weights(*shape)
    codes, scale, zero = expected_minmax(w, bits, group_size, 1, sym)
    for _ in every_target():
        q = ops.quantize(w, bits, group_size, sym=sym, scale_dtype="float32")
        np.testing.assert_array_equal(q.unpack(), codes)
        np.testing.assert_array_equal(q.scale.reshape(-1), scale)
        assert (q.zero is None) == sym
        if not sym:
            np.testing.assert_array_equal(q.zero.reshape(-1), zero)
        np.testing.assert_array_equal(q.dequantize(), values_of(q))
    assert (q.shape, q.bits, q.group_size, q.axis, q.dtype) == (shape, bits, group_size, 1, "float32")


def rounded(x, dtype):
    """x in the numbers of a scale dtype, as float32: the nearest, but for e8m0 the next power of two."""
    if dtype == "e8m0":
        return np.exp2(np.ceil(np.log2(x.astype(np.float64)))).astype(np.float32)
    return torch.from_numpy(x).to(getattr(torch, dtype)).float().numpy()


@pytest.mark.parametrize(
    ("bits", "group_size", "zero", "dtype"),
    pairwise([1, 2, 3, 4, 8], [32, 50, -1], ["float", "integer", "sym"], ["float32", "float16", "bfloat16", "e8m0"]),
)
def test_codes_are_those_of_rounded_scales_and_zeros(bits, group_size, zero, dtype, every_target):
    if zero == "float" and dtype in ("e8m0", "float32"):  # refused; and what test_minmax_is_the_formula has
        zero = "integer"
    w, sym, top = weights(7, 200), zero == "sym", np.float32(2**bits - 1)
    w[2] = np.abs(w[2]) + 1  # a range without zero
    for _ in every_target():
        q = ops.quantize(
            torch.from_numpy(w), bits, group_size, sym=sym, scale_dtype=dtype, zero="float" if sym else zero
        )
        scale = q.scale.float().numpy().reshape(-1)
        codes = q.unpack().numpy().reshape(-1)
        for g, (x, at) in enumerate(groups_of(w, group_size, 1)):
            lo, hi = (min(x.min(), 0), max(x.max(), 0)) if zero == "integer" else (x.min(), x.max())
            step = 2 * np.abs(x).max() / top if sym else 1 / (top / np.float32(hi - lo))
            expected = rounded(np.float32([step]), dtype)[0]
            assert scale[g] == expected
            inv = 1 / expected
            if sym:
                at_zero = np.float32(2 ** (bits - 1) if bits > 1 else 0.5)
            else:
                at_zero = -np.float32(lo) * inv
                at_zero = np.clip(np.rint(at_zero), 0, top) if zero == "integer" else rounded(at_zero[None], dtype)[0]
                assert q.zero.float().reshape(-1)[g] == at_zero
            np.testing.assert_array_equal(codes[at], codes_on(x, (inv, at_zero), bits))
        np.testing.assert_array_equal(q.dequantize("float32").numpy(), values_of(widened(q)))
        assert q.scale.dtype == (torch.bfloat16 if dtype == "e8m0" else getattr(torch, dtype))


def test_bfloat16_for_numpy_arrays_names_the_package_that_it_needs(monkeypatch):
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    with pytest.raises(InvalidArgumentError, match="bfloat16 results for NumPy arrays need the package ml_dtypes"):
        ops.quantize(W, 4, scale_dtype="bfloat16")


def widened(q):
    return dataclasses.replace(q, scale=q.scale.float(), zero=None if q.zero is None else q.zero.float())


@pytest.mark.parametrize("solver", ["mse", "hqq"])
@pytest.mark.parametrize("bits", [2, 4])
def test_solvers_find_integer_zeros_that_are_no_worse_than_minmax(solver, bits):
    w = weights(16, 256)

    def error(solver):
        q = ops.quantize(w, bits, 64, solver=solver, zero="integer")
        assert (q.zero == np.clip(np.rint(q.zero), 0, 2**bits - 1)).all()
        return np.square(q.dequantize() - w).sum()

    assert error(solver) <= error("minmax")


@pytest.mark.parametrize(
    ("shape", "group_size"), [((8, 6), 8), ((8, 6), -1), ((128, 40), 64), ((6, 70), 4), ((60,), 5)]
)
@pytest.mark.parametrize("bits", [1, 3, 4, 8])
def test_axis_0_is_the_view_of_hqq(shape, group_size, bits, every_target):
    w = weights(*shape, seed=1)
    codes, scale, zero = expected_minmax(w, bits, group_size, 0, False)
    rows = group_size if group_size > 0 else shape[0]
    for _ in every_target():
        q = ops.quantize(w, bits, group_size, axis=0, scale_dtype="float32")
        np.testing.assert_array_equal(q.unpack(), codes)
        np.testing.assert_array_equal(q.scale, scale)
        np.testing.assert_array_equal(q.zero, zero)
        np.testing.assert_array_equal(q.dequantize(), values_of(q))
        assert q.codes.shape == (rows, ops.row_bytes(w.size // rows, bits))


@settings(max_examples=80, deadline=None)
@given(
    hnp.arrays(
        np.float32, hnp.array_shapes(min_dims=1, max_dims=2, max_side=90), elements=st.floats(-1e3, 1e3, width=32)
    ),
    st.integers(1, 8),
    st.one_of(st.just(-1), st.integers(1, 100)),
)
def test_anything_comes_back_within_half_a_step(w, bits, group_size):
    q = ops.quantize(w, bits, group_size, scale_dtype="float32")
    back = q.dequantize()
    for g, (x, at) in enumerate(groups_of(w, group_size, 1)):
        scale = abs(q.scale.reshape(-1)[g])
        # The zero is a float32 of up to max/step: its own rounding grows with the offset of the group.
        bound = 0.501 * (x.max() - x.min()) / (2**bits - 1) + 4e-7 * np.abs(x).max() * (2 + bits) + 1e-30
        assert np.abs(back.reshape(-1)[at] - x).max() <= max(bound, 0), (x, scale)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("axis", [0, 1])
def test_torch_dtypes_are_widened_and_rounded(dtype, axis, every_target):
    w = torch.from_numpy(weights(64, 130)).to(dtype)
    wide = ops.quantize(w.float(), 4, axis=axis)
    for _ in every_target():
        q = ops.quantize(w, 4, axis=axis)
        assert q.dtype == str(dtype).removeprefix("torch.")
        for part in ("codes", "scale", "zero"):
            assert isinstance(getattr(q, part), torch.Tensor)
            assert torch.equal(getattr(q, part), getattr(wide, part))
        assert q.dequantize().dtype == dtype
        assert torch.equal(q.dequantize(), wide.dequantize().to(dtype))
        assert torch.equal(q.dequantize("bfloat16"), wide.dequantize().to(torch.bfloat16))


def test_numpy_float16():
    w = weights(3, 100).astype(np.float16)
    q = ops.quantize(w, 3)
    assert q.dtype == "float16"
    assert q.dequantize().dtype == np.float16
    np.testing.assert_array_equal(q.dequantize(), values_of(q).astype(np.float16))


@pytest.mark.parametrize(("cols", "bits", "sym"), pairwise([1, 10, 64, 200], [1, 2, 3, 4, 8], [False, True]))
def test_mse_has_the_least_squared_error(bits, sym, cols, every_target):
    w = weights(3, cols, seed=2)
    for _ in every_target():
        q = ops.quantize(w, bits, 64, sym=sym, solver="mse", scale_dtype="float32")
        back = q.dequantize().reshape(-1).astype(np.float64)
        for x, at in groups_of(w, 64, 1):
            errors = []
            for i in range(80):
                line = minmax_line(np.array([x.min(), x.max()]) * (np.float32(100 - i) / np.float32(100)), bits, sym)
                codes = codes_on(x, line, bits).astype(np.float64)
                errors.append(((x - (codes - line[1]) * np.float64(line[2])) ** 2).sum())
            assert ((back[at] - x) ** 2).sum() <= min(errors) * (1 + 1e-4) + 1e-14


def solved_by_hqq(groups, bits, round_zero):
    """Codes, scale and zero of groups in rows, by section 2 of the dossier: the loop over the whole matrix."""
    x, top = groups.astype(np.float32), np.float32(2**bits - 1)
    s = np.minimum(top / (x.max(1) - x.min(1)), np.float32(2e4))[:, None]
    z = -x.min(1)[:, None] * s
    z = np.rint(z) if round_zero else z
    best, beta = 1e4, 10.0
    for _ in range(20):
        d = x - (np.clip(np.rint(x * s + z), 0, top) - z) / s
        with np.errstate(divide="ignore"):
            e = np.sign(d) * np.maximum(0, np.abs(d) - np.abs(d) ** np.float32(-0.3) / np.float32(beta))
        z = (np.clip(np.rint(x * s + z), 0, top) - (x - e) * s).mean(1, keepdims=True, dtype=np.float32)
        beta *= 1.01
        error = float(np.abs(d).mean())
        if error >= best:
            break
        best = error
    return np.clip(np.rint(x * s + z), 0, top).astype(np.uint8), (1 / s)[:, 0], z[:, 0]


@pytest.mark.parametrize(("group_size", "bits", "spread"), pairwise([32, 50, 64, 100], [1, 2, 3, 4, 8], [0.02, 3.0]))
def test_hqq_is_the_loop_over_the_whole_matrix(bits, group_size, spread, every_target):
    w = weights(20, group_size * 4, seed=bits) * np.float32(spread / 0.02)
    for round_zero in (None, bits != 4):
        codes, scale, zero = solved_by_hqq(
            w.reshape(-1, group_size), bits, bits == 4 if round_zero is None else round_zero
        )
        for _ in every_target():
            q = ops.quantize(w, bits, group_size, solver="hqq", round_zero=round_zero, scale_dtype="float32")
            wrong = np.count_nonzero(q.unpack().reshape(codes.shape) != codes)
            assert wrong <= 1 + codes.size // 2000
            np.testing.assert_allclose(q.scale.reshape(-1), scale, rtol=1e-6)
            np.testing.assert_allclose(q.zero.reshape(-1), zero, rtol=1e-4, atol=2.1 / group_size)


@pytest.mark.parametrize(("bits", "group_size", "axis"), pairwise([2, 3, 4, 8], [32, 64, 128], [0, 1]))
def test_hqq_finds_the_codes_of_the_hqq_package(bits, group_size, axis, every_target, shared):
    oracle = np.load(shared / "oracles" / "derived" / "hqq_cpu_fp32_oracle.npz")
    key = f"b{bits}g{group_size}a{axis}"
    for _ in every_target():
        q = ops.quantize(oracle["W"], bits, group_size, axis=axis, solver="hqq", scale_dtype="float32")
        assert np.count_nonzero(q.unpack().reshape(-1) != oracle[f"{key}_q"].reshape(-1)) <= 8
        np.testing.assert_allclose(q.scale.reshape(-1), oracle[f"{key}_scale"].reshape(-1), rtol=1e-6)


def test_results_do_not_depend_on_target_or_threads(every_target):
    import quantrature

    w = weights(37, 4099, seed=5)
    kept, threads = [], quantrature.num_threads()
    for _ in every_target():
        for count in (1, 3):
            quantrature.set_num_threads(count)
            for solver in ("minmax", "mse", "hqq"):
                q = ops.quantize(w, 3, 96, solver=solver, scale_dtype="float32")
                kept.append((solver, q.codes.tobytes(), q.scale.tobytes(), q.zero.tobytes(), q.dequantize().tobytes()))
    quantrature.set_num_threads(threads)
    assert len(set(kept)) == 3


@pytest.mark.parametrize("solver", ["minmax", "mse", "hqq"])
@pytest.mark.parametrize("bits", [1, 4, 8])
def test_constant_groups_come_back_exactly(solver, bits, every_target):
    w = np.repeat(np.array([[0.75], [-0.3], [0.0], [-0.0], [1e-3]], np.float32), 100, axis=1)
    for _ in every_target():
        q = ops.quantize(w, bits, solver=solver, scale_dtype="float32")
        np.testing.assert_array_equal(q.dequantize(), w)
        assert not q.unpack().any()
        assert q.zero[:, 0].tolist() == [-1, -1, 0, 0, -1]
        assert q.scale[:, 1].tolist() == [np.float32(0.75), np.float32(-0.3), 1, 1, np.float32(1e-3)]
        if solver != "hqq":
            zeros = ops.quantize(np.zeros((2, 70), np.float32), bits, sym=True, solver=solver)
            assert not zeros.dequantize().any()


def test_one_number():
    for bits in range(1, 9):
        q = ops.quantize(np.array([0.3], np.float32), bits, scale_dtype="float32")
        assert q.dequantize().tolist() == [np.float32(0.3)]


def test_tiny_and_huge_numbers(every_target):
    for scale in (1e-44, 1e-38, 1e-31, 1e-20, 1e20, 1e37):
        w = (np.random.default_rng(0).uniform(-1, 1, (3, 130)) * scale).astype(np.float32)
        for _ in every_target():
            for sym in (False, True):
                q = ops.quantize(w, 8, sym=sym)
                assert np.abs(q.dequantize() - w).max() <= max(0.6 * 2 * scale / 255, 2.0**-99)


def test_excluded_positions_do_not_stretch_the_grid(library, every_target):
    w = weights(4, 100, seed=3)
    tame = w.copy()
    rows, cols = np.array([0, 0, 1, 3, 3]), np.array([5, 99, 64, 0, 1])
    w[rows, cols] = [100, -100, 0.5, 7, 8]
    exclude = SimpleNamespace(row_offsets=np.array([0, 2, 3, 3, 5]), columns=cols.astype(np.uint16))
    for g in range(2):
        for row in range(4):
            part = slice(64 * g, min(64 * g + 64, 100))
            out = cols[(rows == row) & (cols // 64 == g)]
            rest = np.setdiff1d(np.arange(100)[part], out)
            tame[row, out] = np.clip(w[row, out], w[row, rest].min(), w[row, rest].max())
    for _ in every_target():
        for solver in ("minmax", "mse", "hqq"):
            got = ops.quantize(library(w), 3, solver=solver, exclude=exclude)
            expected = ops.quantize(library(tame), 3, solver=solver)
            for a, b in ((got.codes, expected.codes), (got.scale, expected.scale), (got.zero, expected.zero)):
                np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    wide = ops.quantize(
        w.reshape(8, 50), 3, 4, axis=0, exclude=SimpleNamespace(row_offsets=np.arange(9), columns=[7] * 8)
    )
    assert wide.unpack().shape == (8, 50)


def test_a_group_of_excluded_positions_alone_is_zero():
    w = np.full((1, 4), 9, np.float32)
    q = ops.quantize(w, 4, 2, exclude=SimpleNamespace(row_offsets=[0, 2], columns=[0, 1]))
    assert q.dequantize().tolist() == [[0, 0, 9, 9]]


def test_meta_quantization(library):
    w = weights(64, 256)
    q = ops.quantize(library(w), 3, 64, meta_bits=8, meta_group=128)
    for part in (q.scale, q.zero):
        assert isinstance(part, ops.QuantizedTensor)
        assert (part.shape, part.bits, part.group_size, part.dtype) == ((256,), 8, 128, "float32")
    plain = ops.quantize(w, 3, 64, scale_dtype="float32")
    np.testing.assert_array_equal(np.asarray(q.codes), plain.codes)
    np.testing.assert_array_equal(np.asarray(q.dequantize()), values_of(q))
    assert np.abs(np.asarray(q.dequantize()) - w).max() < 2 * np.abs(plain.dequantize() - w).max()
    # Zeros are grouped as the scales are: twice the 16 + 16 bits of MXQ's count, which has one pair for all zeros.
    assert q.scale.scale.dtype in (torch.float16, np.float16)
    second = 2 * 32 / (64 * 128) if q.zero.zero.dtype in (torch.float16, np.float16) else None
    assert second is None or q.bits_per_weight == 3 + 16 / 64 + second


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"bits": 4}, 4 + 32 / 64),
        ({"bits": 3, "sym": True}, 3 + 16 / 64),
        ({"bits": 2, "scale_dtype": "float32"}, 2 + 64 / 64),
        ({"bits": 8, "group_size": -1}, 8 + 32 / 256),
    ],
)
def test_bits_per_weight_counts_what_is_stored(arguments, expected):
    q = ops.quantize(weights(64, 256) + np.float32(0.001), **arguments)
    assert q.bits_per_weight == expected
    assert q.nbytes == expected * 64 * 256 / 8


def test_scales_take_the_narrowest_dtype_that_holds_them():
    w = weights(4, 64)
    assert ops.quantize(w, 4).scale.dtype == np.float16
    assert ops.quantize(w * np.float32(1e-4), 4).scale.dtype == np.float32
    assert ops.quantize(w * np.float32(1e9), 4).scale.dtype == np.float32
    assert ops.quantize(w + 1000, 4).zero.dtype == np.float32
    assert ops.quantize(w + 1000, 4).scale.dtype == np.float32
    assert ops.quantize(w * np.float32(1e-4), 4, scale_dtype="float16").scale.dtype == np.float16
    zeros = ops.quantize(np.zeros((2, 2), np.float32), 1, sym=True)
    assert zeros.scale.dtype == np.float16


def test_out_is_written_in_place(library):
    w = weights(5, 70)
    q = ops.quantize(library(w), 4)
    out = library(np.zeros((5, 70), np.float32))
    assert ops.dequantize(q, out=out) is out
    np.testing.assert_array_equal(np.asarray(out), values_of(q))


W = weights(4, 64)
NAN = W.copy()
NAN[2, 5] = np.nan
INFINITE = W.copy()
INFINITE[0, 63] = -np.inf
WIDE = np.array([[3e38, -3e38]], np.float32)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.quantize(W, 0), r"\[quantize\] bits must be 1 to 8: got bits=0"),
        (lambda: ops.quantize(W, 9), r"\[quantize\] bits must be 1 to 8: got bits=9"),
        (lambda: ops.quantize(W, 2.5), r"\[quantize\] bits must be an integer: got bits=2.5"),
        (lambda: ops.quantize(W, 4, 0), r"\[quantize\] group_size must be -1 or at least 1: got group_size=0"),
        (lambda: ops.quantize(W, 4, -2), r"\[quantize\] group_size must be -1 or at least 1: got group_size=-2"),
        (lambda: ops.quantize(W, 4, axis=2), r"\[quantize\] axis must be 0 or 1: got axis=2"),
        (
            lambda: ops.quantize(W, 4, 60, axis=0),
            r"\[quantize\] group_size must divide the size on axis 0: got group_size=60",
        ),
        (
            lambda: ops.quantize(W, 4, solver="best"),
            r"\[quantize\] solver must be one of minmax, mse, hqq, hqq-scale-free: got solver='best'",
        ),
        (
            lambda: ops.quantize(W, 4, solver="hqq", sym=True),
            r"\[quantize\] solver hqq fits the zero, which sym has not",
        ),
        (lambda: ops.quantize(W, 4, sym=True, round_zero=True), r"\[quantize\] round_zero goes without sym"),
        (lambda: ops.quantize(W, 4, meta_bits=9), r"\[quantize\] meta_bits must be None or 1 to 8: got meta_bits=9"),
        (lambda: ops.quantize(W, 4, meta_bits=8, meta_group=0), r"\[quantize\] meta_group must be -1 or at least 1"),
        (lambda: ops.quantize(W, 4, scale_dtype="int8"), r"\[quantize\] scale_dtype must be one of auto, float32"),
        (lambda: ops.quantize(W, 4, zero="int"), r"\[quantize\] zero must be one of float, integer: got zero='int'"),
        (lambda: ops.quantize(W, 4, zero="integer", sym=True), r"\[quantize\] zero must be float with sym"),
        (lambda: ops.quantize(W, 4, scale_dtype="e8m0"), r"\[quantize\] scale_dtype e8m0 needs sym or zero integer"),
        (lambda: ops.quantize(W, 4, zero="integer", meta_bits=8), r"\[quantize\] meta_bits must be None with zero"),
        (
            lambda: ops.quantize(W * 1e9, 4, scale_dtype="float16"),
            r"\[quantize\] scale_dtype float16 must hold every scale",
        ),
        (lambda: ops.quantize(NAN, 4), r"\[quantize\] w must be finite: got value=nan, row=2, col=5"),
        (lambda: ops.quantize(INFINITE, 4, axis=0), r"\[quantize\] w must be finite: got value=-inf, row=0, col=63"),
        (lambda: ops.quantize(WIDE, 4), r"\[quantize\] the range of a group must be finite in float32"),
        (lambda: ops.quantize(WIDE, 4, sym=True), r"\[quantize\] the range of a group must be finite in float32"),
        (lambda: ops.quantize(W.astype(np.float64), 4), r"\[quantize\] w must be float32 or float16 or bfloat16"),
        (lambda: ops.quantize(W[:, ::2], 4), r"\[quantize\] w must be contiguous"),
        (lambda: ops.quantize(W[:0], 4), r"\[quantize\] w must not be empty"),
        (
            lambda: ops.quantize(W, 4, exclude=[1]),
            r"\[quantize\] exclude must have row_offsets and columns: got builtins.list",
        ),
        (
            lambda: ops.quantize(W, 4, exclude=SimpleNamespace(row_offsets=[0, 1], columns=[0])),
            r"\[quantize\] exclude must have one row_offset more than w has rows",
        ),
        (
            lambda: ops.quantize(W, 4, exclude=SimpleNamespace(row_offsets=[0, 1, 1, 1, 2], columns=[0])),
            r"\[quantize\] exclude must have as many columns as its last row_offset says",
        ),
        (
            lambda: ops.quantize(W, 4, exclude=SimpleNamespace(row_offsets=[0, 0, 0, 0, 1], columns=[64])),
            r"\[quantize\] exclude must lie within w: got row=3, col=64",
        ),
        (
            lambda: ops.quantize(W, 4, exclude=SimpleNamespace(row_offsets=[0, 2, 1, 1, 1], columns=[1])),
            r"\[quantize\] exclude must",
        ),
        (lambda: ops.dequantize(ops.quantize(W, 4), "float64"), r"\[dequantize\] dtype must be float32 or float16"),
        (
            lambda: ops.dequantize(ops.quantize(W, 4), out=np.zeros((64, 4), np.float32)),
            r"\[dequantize\] out must have the shape of q: got shape=\(64, 4\), expected \(4, 64\)",
        ),
        (
            lambda: ops.dequantize(ops.quantize(W, 4), "float16", np.zeros((4, 64), np.float32)),
            r"\[dequantize\] out must be float16: got dtype=float32",
        ),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(InvalidArgumentError, match=message):
        call()


def changed(**fields):
    from dataclasses import replace

    return replace(ops.quantize(W, 4), **fields)


@pytest.mark.parametrize(
    ("q", "message"),
    [
        (changed(bits=0), r"\[dequantize\] bits must be 1 to 8: got bits=0"),
        (changed(bits=5), r"\[dequantize\] codes must hold all packed rows: got codes_size=128, expected=160"),
        (changed(group_size=0), r"\[dequantize\] group_size must be -1 or at least 1"),
        (changed(group_size=32), r"\[dequantize\] scale and zero must hold one number for each group"),
        (changed(sym=True), r"\[dequantize\] zero must be None if and only if q is sym"),
        (
            changed(zero=np.zeros((3, 1), np.float16)),
            r"\[dequantize\] scale and zero must hold one number for each group",
        ),
        (changed(axis=3), r"\[dequantize\] axis must be 0 or 1: got axis=3"),
    ],
)
def test_parts_that_do_not_go_together_are_refused(q, message):
    with pytest.raises(InvalidArgumentError, match=message):
        q.dequantize()


def test_out_must_be_writable():
    out = np.zeros((4, 64), np.float32)
    out.flags.writeable = False
    with pytest.raises(InvalidArgumentError, match=r"\[dequantize\] out must be writable"):
        ops.dequantize(ops.quantize(W, 4), out=out)
