"""MXQ, SensiBoost and KurtBoost against the published runs on Llama-2-7B, and on small tables."""

import csv
import itertools
import math

import numpy as np
import pytest
import scipy.stats

from quantrature import InvalidArgumentError
from quantrature.allocation import CONFIGURATIONS, Configuration, boost, conspicuous, ladder, mxq, read_table
from quantrature.allocation.table import CostTable, nominal_memory


@pytest.fixture(scope="module")
def llama(shared):
    return read_table(shared / "oracles/fnorm-Llama-2-7b-hf.csv")


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


# Against the publication


def test_nominal_memory_is_the_published_one(llama):
    assert len(llama.matrices) == 224
    assert sorted(llama.configurations) == sorted(CONFIGURATIONS)
    np.testing.assert_array_equal(nominal_memory(llama.params, llama.configurations), llama.memory)


def test_mxq_reaches_the_published_objectives(llama, shared):
    rows = rows_of(shared / "oracles/derived/milp_reproduction.csv")
    assert len(rows) == 9
    for row in rows:
        found = mxq(llama, float(row["budget"]))
        assert found.objective == pytest.approx(float(row["obj_gap0"]), rel=1e-6), row["budget"]
        assert found.memory_mib <= found.budget_mib == pytest.approx(float(row["budget_mb"]))
    found = mxq(llama, 3.25)
    assert found.objective == pytest.approx(4195.6015625, rel=1e-6)
    assert found.memory_mib <= 2509.0


@pytest.mark.parametrize("method", ["sensi", "kurt"])
@pytest.mark.parametrize(("stops", "top_m"), [(2, 0), (2, 2), (3, 1)])
def test_boosts_are_the_published_ones_cell_by_cell(llama, shared, method, stops, top_m):
    rows = rows_of(shared / f"oracles/quant-allot-{method}-boost-{stops}-{top_m}.csv")
    assert len(rows) == 6 * 224
    for budget, cells in itertools.groupby(sorted(rows, key=lambda r: r["bit_budget"]), lambda r: r["bit_budget"]):
        found = boost(llama, f"{method}boost", float(budget), stops, top_m)
        published = {(int(r["layer"]), r["module"]): (int(r["b1"]), int(r["g1"])) for r in cells}
        ours = {m: (c.bits, c.group_size) for m, c in zip(llama.matrices, found.chosen, strict=True)}
        assert ours == published


def test_flagged_layers_are_the_published_ones(llama, shared):
    flagged = {"sensitivity": {}, "kurtosis": {}}
    for row in rows_of(shared / "oracles/derived/flagged_layers.csv"):
        flagged[row["metric"]].setdefault(row["module"], []).append(int(row["layer"]))
    assert boost(llama, "sensiboost", 4.13).flagged == flagged["sensitivity"]
    assert boost(llama, "kurtboost", 4.13).flagged == flagged["kurtosis"]


def test_memory_of_boosts_is_the_published_one(llama, shared):
    checked = 0
    for row in rows_of(shared / "oracles/derived/boost_mem_ppl_table.csv"):
        method, kind, stops, top_m = row["attempt"].split("-")
        if kind != "boost" or (row["attempt"], row["bpp"]) == ("sensi-boost-3-3", "3.13"):  # a known defect of the data
            continue
        found = boost(llama, f"{method}boost", float(row["bpp"]), int(stops), int(top_m))
        base = boost(llama, f"{method}boost", float(row["bpp"]), 0)
        assert 100 * (found.memory_mib / base.memory_mib - 1) == pytest.approx(float(row["inc"]), abs=0.0051)
        checked += 1
    assert checked == 95


# On their own


def test_the_ladder_is_the_published_one():
    stops = [2.13, 2.25, 2.51, 3.13, 3.25, 3.51, 4.13, 4.25, 4.51, 8.13, 8.25, 8.51]
    assert [c.label for c in ladder(CONFIGURATIONS)] == stops
    assert Configuration(4, 128).nominal_bits == 4.126953125
    packed = [c.hqq_bits for c in ladder(CONFIGURATIONS)[3:6]]
    assert packed == pytest.approx([3.376953, 3.753906, 4.507813], abs=5e-7)


def table(layers=8, scores=None, modules=("a", "b")):
    rng = np.random.default_rng(0)
    matrices = tuple((layer, module) for layer in range(layers) for module in modules)
    params = np.full(len(matrices), 1024.0)
    fnorm = rng.uniform(1, 9, len(matrices))[:, None] * np.array([2.0**-c.nominal_bits for c in CONFIGURATIONS])
    scores = rng.uniform(1, 2, len(matrices)) if scores is None else np.repeat(np.asarray(scores, float), len(modules))
    memory = nominal_memory(params, CONFIGURATIONS)
    return CostTable(matrices, CONFIGURATIONS, params, memory, fnorm, scores, scores)


def test_mxq_is_the_best_there_is():
    small = table(layers=2)
    found = mxq(small, 3.3)
    best = math.inf
    for choice in itertools.product(range(12), repeat=4):
        if small.memory[range(4), choice].sum() <= found.budget_mib:
            best = min(best, small.fnorm[range(4), choice].sum())
    assert found.objective == pytest.approx(best)
    assert found.bits_per_weight == pytest.approx(found.memory_mib * 8 * 2**20 / 4096)


@pytest.mark.parametrize("ratio", [True, False])
@pytest.mark.parametrize("layers", [6, 22, 32, 63])
def test_conspicuous_is_the_trimmed_rule_of_scipy(ratio, layers):
    rng = np.random.default_rng(layers)
    for _ in range(20):
        scores = rng.lognormal(sigma=1.5, size=layers)
        d = scores[1:] / scores[:-1] if ratio else np.diff(scores)
        mean = scipy.stats.mstats.trimmed_mean(d, (0.05, 0.05))
        z = np.abs(d - mean) / scipy.stats.mstats.trimmed_std(d, (0.05, 0.05), ddof=1)
        assert conspicuous(scores, ratio) == [i + 1 for i in np.argsort(-z, kind="stable") if z[i] > 3]


def test_too_few_layers_and_equal_ones_have_nothing_conspicuous():
    for scores in ([], [1.0], [1.0, 90.0], [1.0, 9.0, 1.0], [2.0] * 30):
        assert conspicuous(np.array(scores), ratio=True) == []


def test_boosts_are_clipped_and_counted():
    scores = [1.0, 1.1, 1.0, 1.2, 1.1, 1.0, 1.1, 1.0, 1.1, 1.2, 1.0, 1.1, 1.0, 1.1, 1.2, 90.0, 1.1, 1.0, 1.2, 1.1, 60.0]
    found = boost(table(21, scores), "kurtboost", 8.25, stops=3)
    assert set(found.chosen) == {Configuration(8, 64), Configuration(8, 32)}
    assert found.flagged == {"a": [16, 15, 20], "b": [16, 15, 20]}
    assert found.memory_mib > found.budget_mib
    first = boost(table(21, scores), "kurtboost", 3.25, stops=1, top_m=1)
    assert first.flagged == {"a": [16], "b": [16]}
    assert [c.label for c in first.chosen[30:36]] == [3.25, 3.25, 3.51, 3.51, 3.25, 3.25]


def test_a_budget_between_two_stops_is_rounded_down():
    assert set(boost(table(), "kurtboost", 3.4, stops=0).chosen) == {Configuration(3, 64)}
    assert set(boost(table(), "kurtboost", 99, stops=0).chosen) == {Configuration(8, 32)}


# Tables


HEADER = "layer,module,nbit1,gsize1,nbit2,gsize2,fnorm,memmb,params,kurtosis,sensitivity"
ROWS = ["0,a,4,64,8,128,1.5,0.1,1024,3,0.5", "0,a,3,64,8,128,2.5,0.05,1024,3,0.5"]


@pytest.fixture
def written(tmp_path):
    def write(*rows, header=HEADER):
        path = tmp_path / "table.csv"
        path.write_text("\n".join([header, *rows]) + "\n")
        return path

    return write


def test_a_table_is_read(written):
    found = read_table(written(*ROWS))
    assert found.matrices == ((0, "a"),)
    assert found.configurations == (Configuration(3, 64), Configuration(4, 64))
    assert found.fnorm.tolist() == [[2.5, 1.5]]
    assert found.memory.tolist() == [[0.05, 0.1]]
    assert mxq(found, 9999).chosen == (Configuration(4, 64),)
    bare = read_table(written("0,a,4,64,8,128,1024", header="layer,module,nbit1,gsize1,nbit2,gsize2,params"))
    assert bare.memory[0, 0] == 1024 * Configuration(4, 64).nominal_bits / 8 / 2**20
    for call, name in ((lambda: mxq(bare, 5), "fnorm"), (lambda: boost(bare, "kurtboost", 5), "kurtosis")):
        with pytest.raises(InvalidArgumentError, match=f"needs the column {name}: got none for a of layer 0"):
            call()


@pytest.mark.parametrize(
    ("rows", "header", "message"),
    [
        (ROWS, HEADER.replace("params", "weights"), "must have the column params: got layer, module"),
        ([], HEADER, "must have rows: got none"),
        ([ROWS[0], "0,a,x,64,8,128,1,1,1024,3,1"], HEADER, "line 3: a number is missing or invalid"),
        ([ROWS[0], "0,a,3,64"], HEADER, "line 3: a number is missing or invalid"),
        ([ROWS[0], "0,a,3,64,8,128,nan,1,1024,3,1"], HEADER, "line 3: a number is out of range"),
        ([ROWS[0], "0,a,3,0,8,128,1,1,1024,3,1"], HEADER, "line 3: a number is out of range"),
        ([ROWS[0], ROWS[0]], HEADER, "line 3 repeats a matrix and its setting"),
        ([*ROWS, "1,a,4,64,8,128,1,1,1024,3,1"], HEADER, "every matrix in all 2 settings: got 1 for a of layer 1"),
    ],
)
def test_a_bad_table_is_refused(written, rows, header, message):
    with pytest.raises(InvalidArgumentError, match=message):
        read_table(written(*rows, header=header))


def test_a_table_that_is_not_there(tmp_path):
    with pytest.raises(InvalidArgumentError, match=r"cannot read .*none.csv: No such file"):
        read_table(tmp_path / "none.csv")
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InvalidArgumentError, match=r"cannot read .*binary.csv: .*decode"):
        read_table(tmp_path / "binary.csv")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda t: mxq(t, 2), r"avg_bits must be at least 2\.1270 for these matrices and settings: got avg_bits=2"),
        (
            lambda t: boost(t, "kurtboost", 2),
            r"kurtboost needs a budget of at least 2\.13 bits per weight: got 2\.0000",
        ),
        (lambda t: boost(t, "kurtboost", 4, stops=-1), "must be at least 0: got stops=-1, top_m=0"),
        (lambda t: boost(t, "kurtboost", 4, top_m=-1), "must be at least 0: got stops=2, top_m=-1"),
        (
            lambda t: boost(table(4, [1, 1, 0, 1]), "sensiboost", 4),
            r"every sensitivity must be above 0, because ratios are computed: got 0\.0 for a of layer 2",
        ),
    ],
)
def test_what_cannot_be_is_refused(call, message):
    with pytest.raises(InvalidArgumentError, match=message):
        call(table())
