"""The Python, shell and JSON blocks of README.md and of the documentation run, page by page, in order.

Each page has a temporary folder with the names that the pages use: ``my-model`` has two of the six layers of the model
of ``quantrature demo``, ``calibration.txt`` and ``eval.txt`` are short texts. A block that cannot run here has a
comment before it, which readers do not see: ``<!-- skip: next "the reason" -->``.
"""

import contextlib
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import SkipTest

import pytest

pytest.importorskip("transformers")  # the environments that test wheels have only what the ops need
sybil = pytest.importorskip("sybil")

from sybil.evaluators.python import PythonEvaluator  # noqa: E402
from sybil.parsers.myst import CodeBlockParser, SkipParser  # noqa: E402

ROOT = Path(__file__).resolve().parents[3]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
WITHOUT_SKIPS = 80
"""At least so many shell and Python blocks run: a mistake in the parsers must not skip them all."""

SHOWN = {"text"}
"""Languages of blocks that are there to be read: what commands print."""
LAYERS = 2
CHARACTERS = {"calibration": 2000, "evaluation": 4000}


def run_shell(example):
    """Run the lines of a block: commands of quantrature in this process, others by bash."""
    for line in example.parsed.replace("\\\n", " ").splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        command, _, file = line.partition(" > ")
        if line.startswith("quantrature ") and not re.search(r"[|<>;&$]", command.partition("#")[0]):
            from quantrature.cli import main

            out, err = io.StringIO(), io.StringIO()
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                status = main(shlex.split(command, comments=True)[1:])
            assert status == 0, f"{line}\n{out.getvalue()}{err.getvalue()}"
            if file:
                Path(file.strip()).write_text(out.getvalue())
        else:
            done = subprocess.run(["bash", "-euo", "pipefail", "-c", line], capture_output=True, text=True)
            assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"


def run_json(example):
    json.loads(example.parsed)


PARSERS = [
    CodeBlockParser("python", PythonEvaluator()),
    CodeBlockParser("sh", run_shell),
    CodeBlockParser("json", run_json),
    SkipParser(),
]


def parsed(page):
    return sybil.Sybil(parsers=PARSERS).parse(page)


def name_of(page):
    return str(page.relative_to(ROOT))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The folder whose content every page finds."""
    from quantrature.demo import text
    from quantrature.demo.tour import MODEL
    from quantrature.models import load_model, load_tokenizer

    folder = tmp_path_factory.mktemp("files")
    model = load_model(MODEL)
    model.model.layers = model.model.layers[:LAYERS]
    model.config.num_hidden_layers = LAYERS
    model.config.layer_types = None
    model.save_pretrained(folder / "my-model")
    load_tokenizer(MODEL).save_pretrained(folder / "my-model")
    (folder / "calibration.txt").write_text(text.calibration_text()[: CHARACTERS["calibration"]])
    (folder / "eval.txt").write_text(text.evaluation_text()[: CHARACTERS["evaluation"]])
    return folder


@pytest.fixture
def command_on_path(tmp_path, monkeypatch):
    """`quantrature` and `python` for lines that bash runs, whether the package is installed or not."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, call in {"quantrature": "-m quantrature", "python": ""}.items():
        script = folder / name
        script.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {call} "$@"\n')
        script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(part for part in sys.path if part))


WITH_CODE = [page for page in PAGES if any(True for _ in parsed(page))]


@pytest.mark.parametrize("page", WITH_CODE, ids=name_of)
@pytest.mark.filterwarnings("default")  # the pages show what users do, with the packages that users have
def test_code_of_a_page_runs(page, files, tmp_path, monkeypatch, command_on_path):
    if "peft" in page.read_text():
        pytest.importorskip("peft")
    work = tmp_path / "work"
    shutil.copytree(files, work)
    monkeypatch.chdir(work)
    for example in parsed(page):
        try:
            example.evaluate()
        except SkipTest:
            continue
        except Exception as error:
            raise AssertionError(f"{name_of(page)}, line {example.line}: {error}") from error


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_block_has_a_language_that_is_run(page):
    """Or one that is there to be read; directives of Sphinx are written in braces."""
    inside = False
    for number, line in enumerate(page.read_text().splitlines(), 1):
        fence = re.match(r"\s*```+(.*)$", line)
        if fence and inside:
            inside = False
        elif fence:
            inside = True
            language = fence.group(1)
            known = {"python", "sh", "json", *SHOWN}
            assert language in known or language.startswith("{"), f"{name_of(page)}, line {number}: {language!r}"


def test_most_blocks_run_and_skips_have_reasons():
    skipped = [reason for page in PAGES for reason in re.findall(r"<!-- skip:(.*)-->", page.read_text())]
    assert all(re.fullmatch(r' (next|start) "[^"]{10,}" | end ', reason) for reason in skipped), skipped
    blocks = sum(len(re.findall(r"^```(python|sh)$", page.read_text(), re.M)) for page in PAGES)
    assert blocks - len(skipped) >= WITHOUT_SKIPS
