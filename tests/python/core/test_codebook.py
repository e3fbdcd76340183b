"""Codes of tables: nearest entries, scales, what is stored; against NumPy and bitsandbytes."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from quantrature import InvalidArgumentError, ops

RNG = np.random.default_rng(0)


def nearest(x, table):
    """By distance in float64; of equally near entries the lower, of equal ones the first."""
    table = np.asarray(table, np.float64)
    order = np.argsort(table, kind="stable")
    return order[np.abs(np.asarray(x, np.float64)[..., None] - table[order]).argmin(axis=-1)].astype(np.uint8)


def in_groups(x, group_size):
    rows, cols = x.shape
    group = cols if group_size == -1 else group_size
    padded = np.zeros((rows, -(-cols // group) * group), np.float32)
    padded[:, :cols] = x
    return padded.reshape(rows, -1, group)


def test_nf4_is_made_of_quantiles_of_the_normal_distribution():
    # Dettmers et al., arXiv 2305.14314, appendix E: 2^b + 1 quantiles of each half, the ends at 1 - (1/32 + 1/30) / 2.
    end = 1 - (1 / 32 + 1 / 30) / 2
    above = norm.ppf(np.linspace(end, 0.5, 9)[:-1])
    below = -norm.ppf(np.linspace(end, 0.5, 8)[:-1])
    derived = np.sort(np.concatenate([above, [0], below])) / above.max()
    np.testing.assert_allclose(ops.CODEBOOKS["nf4"], derived, atol=1e-6)


@pytest.mark.parametrize("name", ["nf4", "fp4"])
@pytest.mark.parametrize("group_size", [-1, 1, 17, 64, 500])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_named_tables_against_numpy(name, group_size, dtype):
    w = RNG.standard_normal((7, 200)).astype(dtype)
    w[2, :64] = 0
    q = ops.quantize(w, 4, group_size, codebook=name, scale_dtype="float32")
    groups = in_groups(w.astype(np.float32), group_size)
    scale = np.abs(groups).max(axis=-1)
    np.testing.assert_array_equal(q.scale, scale)
    with np.errstate(divide="ignore"):
        inv = np.where(scale == 0, np.float32(0), np.float32(1) / scale)
    table = np.array(ops.CODEBOOKS[name], np.float32)
    codes = nearest((groups * inv[..., None]).reshape(7, -1)[:, :200], table)
    np.testing.assert_array_equal(q.unpack(), codes)
    expected = table[codes] * np.repeat(scale, groups.shape[-1], axis=1)[:, :200]
    np.testing.assert_array_equal(q.dequantize("float32"), expected)
    np.testing.assert_array_equal(q.dequantize(), expected.astype(dtype))
    assert q.nbytes == q.codes.nbytes + q.scale.nbytes
    assert q.name == name


@settings(max_examples=150, deadline=None)
@given(
    st.integers(1, 8),
    st.integers(1, 5),
    st.integers(1, 70),
    st.booleans(),
    st.sampled_from([None, -1, 1, 8, 33]),
    st.sampled_from(["float32", "float16"]),
    st.integers(0, 2**32 - 1),
)
def test_any_table_against_numpy(bits, rows, cols, per_row, group_size, table_dtype, seed):
    rng = np.random.default_rng(seed)
    w = rng.integers(-8, 9, (rows, cols)).astype(np.float32) / 4  # many ties
    table = (rng.integers(-16, 17, (rows, 1 << bits)) / 8).astype(table_dtype)
    table = table if per_row else table[0].copy()
    q = ops.quantize(w, bits, group_size, codebook=table, scale_dtype="float32")
    inv = scale = np.ones((rows, cols), np.float32)
    if group_size is not None:
        groups = in_groups(w, group_size)
        scale = np.repeat(np.abs(groups).max(axis=-1), groups.shape[-1], axis=1)[:, :cols]
        with np.errstate(divide="ignore"):
            inv = np.where(scale == 0, np.float32(0), np.float32(1) / scale)
    for row in range(rows):
        of_row = table[row] if per_row else table
        codes = nearest(w[row] * inv[row], of_row)
        np.testing.assert_array_equal(q.unpack()[row], codes)
        expected = of_row[codes].astype(np.float32) * scale[row]
        np.testing.assert_array_equal(q.dequantize()[row], expected)
    assert q.nbytes == sum(part.nbytes for part in (q.codes, table, q.scale) if part is not None)
    assert q.bits_per_weight == 8 * q.nbytes / (rows * cols)


@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_the_same_values_as_bitsandbytes(name):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    w = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    packed, state = bitsandbytes.functional.quantize_4bit(w, blocksize=64, quant_type=name)
    theirs = torch.stack([packed.flatten() >> 4, packed.flatten() & 15], 1).view(64, 256)
    q = ops.quantize(w, 4, 64, codebook=name, scale_dtype="float32")
    assert torch.equal(q.table, state.code.float())
    assert torch.equal(q.scale.flatten(), state.absmax.float())
    if name == "nf4":  # their codes of the two zeros of fp4 depend on how a sort takes equals
        assert torch.equal(q.unpack(), theirs)
    assert torch.equal(q.dequantize(), bitsandbytes.functional.dequantize_4bit(packed, state))


def test_libraries_are_kept(library):
    w = library(RNG.standard_normal((3, 40)).astype(np.float32))
    for codebook in ("nf4", library(np.linspace(-1, 1, 16, dtype=np.float32))):
        q = ops.quantize(w, 4, 16, codebook=codebook)
        for part in (q.codes, q.table, q.scale, q.dequantize(), q.unpack()):
            assert type(part) is type(w)


def test_a_vector_is_one_row():
    w = RNG.standard_normal(100).astype(np.float32)
    q = ops.quantize(w, 4, 32, codebook="nf4")
    assert q.shape == (100,)
    np.testing.assert_array_equal(q.dequantize(), ops.quantize(w[None], 4, 32, codebook="nf4").dequantize()[0])


def test_scales_are_stored_as_asked():
    w = RNG.standard_normal((8, 128)).astype(np.float32)
    assert ops.quantize(w, 4, 64, codebook="nf4").scale.dtype == np.float16
    assert ops.quantize(w * 1e-7, 4, 64, codebook="nf4").scale.dtype == np.float32
    q = ops.quantize(w, 4, 16, codebook="nf4", meta_bits=8)
    assert isinstance(q.scale, ops.QuantizedTensor)
    plain = ops.quantize(w, 4, 16, codebook="nf4", scale_dtype="float32")
    np.testing.assert_array_equal(q.unpack(), plain.unpack())
    scale = q.scale.dequantize("float32").reshape(8, 8)
    np.testing.assert_allclose(scale, plain.scale, rtol=0.05)
    np.testing.assert_array_equal(q.dequantize(), q.table[q.unpack()] * np.repeat(scale, 16, axis=1))
    assert q.nbytes < ops.quantize(w, 4, 16, codebook="nf4").nbytes


def test_excluded_weights_do_not_scale():
    w = RNG.standard_normal((4, 64)).astype(np.float32)
    w[1, 3] = 100
    _, outliers = ops.extract_outliers(w, count=1)
    q = ops.quantize(w, 4, 32, codebook="nf4", exclude=outliers, scale_dtype="float32")
    without = w.copy()
    without[1, 3] = 0
    other = ops.quantize(without, 4, 32, codebook="nf4", scale_dtype="float32")
    np.testing.assert_array_equal(q.scale, other.scale)
    assert q.unpack()[1, 3] == 15
    differs = q.unpack() != other.unpack()
    assert differs.sum() == 1


@pytest.mark.parametrize("rows", [slice(0, 1), slice(2, 5), slice(None)])
def test_rows(rows):
    w = RNG.standard_normal((6, 40)).astype(np.float32)
    tables = RNG.standard_normal((6, 8)).astype(np.float16)
    for q in (
        ops.quantize(w, 4, 16, codebook="nf4"),
        ops.quantize(w, 4, 16, codebook="nf4", meta_bits=6),
        ops.quantize(w, 3, None, codebook=tables),
    ):
        np.testing.assert_array_equal(q.dequantize("float32", rows), q.dequantize("float32")[rows])
    with pytest.raises(InvalidArgumentError, match="rows must be a slice"):
        ops.quantize(w, 4, 16, codebook="nf4").dequantize("float32", slice(0, 0))
    with pytest.raises(InvalidArgumentError, match=r"rows need a matrix: got shape=\(40,\)"):
        ops.quantize(w[0], 4, 16, codebook="nf4").dequantize("float32", slice(0, 1))


def test_dequantize_writes_where_it_is_told():
    w = RNG.standard_normal((6, 40)).astype(np.float32)
    q, out = ops.quantize(w, 4, 16, codebook="nf4"), np.empty((6, 40), np.float16)
    assert ops.dequantize(q, out=out) is out
    np.testing.assert_array_equal(out, q.dequantize("float16"))


W = RNG.standard_normal((3, 32)).astype(np.float32)
TABLE = np.linspace(-1, 1, 16, dtype=np.float32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"codebook": "nf5"}, r"\[codebook\] codebook must be nf4, fp4 or an array: got codebook='nf5'"),
        ({"codebook": "nf4", "bits": 3}, r"bits must be those of the codebook, of 16 entries: got bits=3"),
        ({"codebook": TABLE[:7].copy()}, r"bits must be those of the codebook, of 7 entries: got bits=4"),
        ({"codebook": TABLE.astype(np.float64)}, r"\[codebook\] codebook must be float32 or float16"),
        ({"codebook": TABLE[::2], "bits": 3}, r"\[codebook\] codebook must be contiguous"),
        ({"codebook": torch.tensor(TABLE)}, r"\[codebook\] codebook must be of the same library as w: got torch"),
        ({"codebook": np.stack([TABLE, TABLE])}, r"one row, or one for each row of w: got rows=2, expected=3"),
        ({"codebook": np.full(16, np.nan, np.float32)}, r"table must be finite: got value=nan, row=0, entry=0"),
        ({"codebook": "nf4", "sym": True}, r"a codebook cannot be combined with sym, axis, solver, round_zero or zero"),
        ({"codebook": "nf4", "axis": 0}, r"a codebook cannot be combined with sym, axis, solver, round_zero or zero"),
        (
            {"codebook": "nf4", "solver": "hqq"},
            r"a codebook cannot be combined with sym, axis, solver, round_zero or zero",
        ),
        ({"codebook": "nf4", "group_size": 0}, r"group_size must be -1 or at least 1: got group_size=0"),
        ({"group_size": None}, r"group_size must be an integer: got group_size=None"),
        ({"codebook": "nf4", "scale_dtype": "float16", "w": W * 1e6}, r"scale_dtype float16 must hold every scale"),
        ({"codebook": "nf4", "w": np.where(W[1, 5] == W, np.inf, W)}, r"w must be finite: got value=inf, row=1, col=5"),
    ],
)
def test_bad_input_is_named(arguments, message):
    with pytest.raises(InvalidArgumentError, match=message):
        ops.quantize(**{"w": W, "bits": 4, **arguments})


def test_parts_that_do_not_fit_are_named():
    from dataclasses import replace

    q = ops.quantize(W, 4, 16, codebook="nf4")
    with pytest.raises(InvalidArgumentError, match="scale must hold one number for each group"):
        replace(q, scale=q.scale[:1]).dequantize()
    with pytest.raises(InvalidArgumentError, match="scale must be there if and only if there are groups"):
        replace(q, scale=None).dequantize()
    with pytest.raises(InvalidArgumentError, match="dtype must be float32 or float16 or bfloat16: got dtype=int8"):
        q.dequantize("int8")
