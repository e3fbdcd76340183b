"""libFuzzer, through Atheris, looks for documents that fail the tests of ``tests/python/contracts/test_fuzz.py``.

Those tests say how a document is drawn from bytes and what a parser may do with it; here the bytes are chosen by which
branches of the parsers they reach: ``python tests/fuzz/fuzz_documents.py -runs=20000 [CORPUS]``.
"""

import random
import sys
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "python" / "contracts"))
with atheris.instrument_imports(
    include=[
        f"quantrature.{name}"
        for name in ("analysis.sensitivity", "checkpoint", "files", "packed", "plan", "requantization.record")
    ]
):
    import quantrature.checkpoint
    import quantrature.packed  # noqa: F401
import test_fuzz

TESTS = [
    test_fuzz.test_plans,
    test_fuzz.test_descriptions_of_matrices,
    test_fuzz.test_files_of_bytes,
    test_fuzz.test_records,
    test_fuzz.test_analyses,
    test_fuzz.test_configurations,
]


def one_input(data):
    """The first byte chooses the test."""
    if data:
        TESTS[data[0] % len(TESTS)].hypothesis.fuzz_one_input(data[1:])


def half_are_new(data, max_size, seed):
    """Half of the inputs are drawn anew: small changes to a few bytes seldom make a document that gets far."""
    chance = random.Random(seed)
    return chance.randbytes(max_size) if chance.random() < 0.5 else atheris.Mutate(data, max_size)


atheris.Setup(sys.argv, one_input, custom_mutator=half_are_new)
atheris.Fuzz()
