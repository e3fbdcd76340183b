import importlib
import json
import os
import pkgutil
import re
import subprocess
import sys

import pytest

import quantrature
from fresh_python import run_python
from quantrature import evaluate, models
from quantrature.cli import VERBS, main
from quantrature.methods import METHODS
from quantrature.text import DEFAULT_SEQLEN
from tiny_models import byte_tokenizer, tiny_model

TEXT = "It was the best of times, it was the worst of times. " * 12


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two models that differ, a text, and an argument list that is complete."""
    root = tmp_path_factory.mktemp("cli")
    for name, seed in (("model", 0), ("reference", 1)):
        tiny_model("llama", seed=seed).save_pretrained(root / name)
        byte_tokenizer().save_pretrained(root / name)
    (root / "text.txt").write_text(TEXT)
    return root


def run(capfd, *arguments):
    status = main([str(argument) for argument in arguments])
    return status, *capfd.readouterr()


def test_help_comes_without_torch():
    for arguments in (["--help"], ["eval", "--help"], ["list", "methods"], ["--version"]):
        code = (
            "import sys\n"
            "for name in ('torch', 'transformers', 'datasets'): sys.modules[name] = None\n"
            "from quantrature.cli import main\n"
            f"sys.exit(main({arguments}))"
        )
        done = run_python(code)
        assert done.returncode == 0, done.stderr
        assert done.stdout


def test_every_verb_has_help(capfd):
    status, out, err = run(capfd, "--help")
    assert (status, err) == (0, "")
    for verb in VERBS:
        status, of_verb, err = run(capfd, verb, "-h")
        assert (status, err) == (0, "")
        assert verb in out
        assert f"quantrature {verb}" in of_verb
    assert run(capfd) == (0, out, "")


def test_the_module_is_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "quantrature", "--version"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        capture_output=True,
        text=True,
    )
    assert done.stdout == f"quantrature {quantrature.__version__}\n"


def test_eval_prints_one_json_object(capfd, folders):
    status, out, err = run(capfd, "eval", folders / "model", "--text", folders / "text.txt", "--seqlen", 32, "--json")
    assert (status, err) == (0, "")
    expected = evaluate.perplexity(
        models.load_model(folders / "model"), folders / "text.txt", 32, tokenizer=byte_tokenizer()
    )
    assert json.loads(out) == {
        "perplexity": expected.perplexity,
        "nll": expected.nll,
        "tokens": expected.tokens,
        "nll_standard_error": expected.standard_error,
        "bos": "none",
    }


def test_eval_with_a_reference(capfd, folders):
    arguments = ("eval", folders / "model", "--text", folders / "text.txt", "--reference", folders / "reference")
    arguments += ("--max_tokens", 320, "--batch-size", 2)
    status, out, err = run(capfd, *arguments, "--json")
    assert (status, err) == (0, "")
    found = json.loads(out)
    expected = evaluate.divergence(
        models.load_model(folders / "model"),
        models.load_model(folders / "reference"),
        folders / "text.txt",
        tokenizer=byte_tokenizer(),
        max_tokens=320,
        batch_size=2,
    )
    assert found["tokens"] == 5 * 63
    assert found["kld_mean"] == expected.mean > 0
    assert [found[f"kld_{name}"] for name in ("median", "p99", "max")] == [
        expected.median,
        expected.p99,
        expected.maximum,
    ]
    assert found["same_top1"] == expected.same_top1
    assert found["reference_perplexity"] == expected.reference.perplexity
    assert found["loss_change"] == expected.loss_change
    status, out, err = run(capfd, *arguments)
    assert (status, err) == (0, "")
    assert out.startswith(f"{folders / 'model'} on {folders / 'text.txt'}\n")
    assert f"{expected.model.perplexity:.4f}" in out
    assert f"{expected.mean:.6f} ± " in out


def test_eval_runs_in_another_dtype_and_with_overlap(capfd, folders):
    arguments = ("eval", folders / "model", "--text", folders / "text.txt", "--json")
    exact, half = (json.loads(run(capfd, *arguments, *more)[1]) for more in ((), ("--dtype", "bfloat16")))
    assert 0 < abs(exact["nll"] - half["nll"]) < 0.05
    overlapping = json.loads(run(capfd, *arguments, "--seqlen", 64, "--stride", 32, "--bos", "text")[1])
    assert overlapping["tokens"] == len(TEXT)


def test_a_number_that_there_is_not_is_null(capfd, folders):
    _, out, _ = run(capfd, "eval", folders / "model", "--text", folders / "text.txt", "--max-tokens", 64, "--json")
    assert json.loads(out)["nll_standard_error"] is None
    _, out, _ = run(capfd, "eval", folders / "model", "--text", folders / "text.txt", "--max-tokens", 64)
    assert "nan" not in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["eval", "/nowhere", "--text", "TEXT"], "there is no such folder: /nowhere"),
        (["eval", "MODEL", "--text", "no.txt"], "[eval] source must be an existing file: there is no file no.txt"),
        (["eval", "MODEL", "--text", "TEXT", "--seqlen", "65"], "context length, 64: got seqlen=65"),
        (["eval", "MODEL", "--text", "TEXT", "--max-tokens", "9"], "it has 9 tokens, but seqlen=64 needs 64"),
        (["eval", "MODEL", "--text", "TEXT", "--dtype", "int8"], "[eval] dtype must be one of auto, float32"),
        (
            ["eval", "MODEL", "--text", "TEXT", "--stride", "8", "--reference", "MODEL"],
            "[eval] --stride cannot be combined with --reference",
        ),
        (["list", "nothing"], "[list] kind must be one of methods, strategies, metrics, objectives"),
    ],
)
def test_a_failure_is_one_line(capfd, folders, arguments, message):
    places = {"MODEL": folders / "model", "TEXT": folders / "text.txt"}
    status, out, err = run(capfd, *(places.get(argument, argument) for argument in arguments), "--json")
    assert (status, out) == (1, "")
    assert err.startswith("quantrature: error: ")
    assert message in err
    prefix = re.match(r"quantrature: error: \[(.*?)\]", err)
    assert prefix is None or prefix[1] == arguments[0]
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "No such command 'nothing'"),
        (["eval", "a", "--text", "b", "--nothing"], "No such option"),
        (["demo", "a"], "Got unexpected extra argument"),
        (["eval", "a", "--text", "b", "--seqlen", "x"], "Invalid value for '--seqlen'"),
    ],
)
def test_wrong_usage_is_one_line_and_status_2(capfd, arguments, message):
    status, out, err = run(capfd, *arguments)
    assert (status, out) == (2, "")
    assert err.startswith("quantrature: error: ")
    assert message in err
    assert err.count("\n") == 1


def test_a_traceback_is_there_for_those_who_want_it(capfd, monkeypatch):
    monkeypatch.setattr("quantrature.cli._doctor.num_threads", lambda: 1 // 0)
    status, _, err = run(capfd, "doctor")
    assert status == 1
    assert err == "quantrature: error: ZeroDivisionError: integer division or modulo by zero" + (
        " (set QUANTRATURE_DEBUG=1 for the traceback)\n"
    )
    monkeypatch.setenv("QUANTRATURE_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        main(["doctor"])


def test_an_interrupt_has_its_status(monkeypatch):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr("quantrature.cli._doctor.num_threads", interrupted)
    assert main(["doctor"]) == 130


def test_notes_and_prints_of_libraries_stay_off_stdout(capfd, folders, monkeypatch):
    config = json.loads((folders / "model" / "config.json").read_text())
    from quantrature.models import loading

    def chatty(*arguments, **settings):
        print("loading!")
        loading._log.warning("a note")
        return original(*arguments, **settings)

    original = models.load_model
    monkeypatch.setattr(models, "load_model", chatty)
    status, out, err = run(capfd, "eval", folders / "model", "--text", folders / "text.txt", "--json")
    assert status == 0
    assert json.loads(out)["tokens"] == len(TEXT) // config["max_position_embeddings"] * 63
    assert err == "loading!\nquantrature: note: a note\n"


def test_doctor_says_what_is_there(capfd, monkeypatch):
    status, out, err = run(capfd, "doctor", "--json")
    assert (status, err) == (0, "")
    found = json.loads(out)
    assert found["quantrature"] == quantrature.__version__
    assert found["packages"]["torch"].startswith("2.")
    assert found["kernels"]["available"] == quantrature.available_targets()
    assert found["kernels"]["in_use"] == quantrature.target()
    assert found["threads"] == quantrature.num_threads()
    assert found["cuda"]["devices"] > 0 or found["cuda"]["why_not"].startswith("off: ")
    monkeypatch.setitem(sys.modules, "transformers", None)
    status, out, err = run(capfd, "doctor")
    assert (status, err) == (0, "")
    assert quantrature.target() in out
    assert "CUDA" in out


def test_doctor_says_why_simd_is_off(capfd, monkeypatch):
    code = (
        "from quantrature.cli import _doctor, main; _doctor.LOADED = (); raise SystemExit(main(['doctor', '--json']))"
    )
    forced = json.loads(run_python(code, QUANTRATURE_TARGET="reference").stdout)["kernels"]
    if len(forced["available"]) > 1:
        assert forced["why_not_simd"] == "SIMD is off: QUANTRATURE_TARGET=reference"
    refused = run_python(code, QUANTRATURE_TARGET="AVX99")
    assert refused.returncode == 1
    assert "QUANTRATURE_TARGET=AVX99" in refused.stderr
    monkeypatch.setattr("quantrature.cli._doctor.available_targets", lambda: ["reference"])
    _, out, _ = run(capfd, "doctor", "--json")
    assert "made without Highway" in json.loads(out)["kernels"]["why_not_simd"]


def test_doctor_shows_packages_that_are_missing_or_broken(capfd, monkeypatch, tmp_path):
    from quantrature.cli import _doctor

    (tmp_path / "broken_package.py").write_text("raise OSError('libbroken.so:\\n cannot open')\n")
    (tmp_path / "needy_package.py").write_text("import no_such_package\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(_doctor, "LOADED", ("broken_package", "needy_package", "no_such_package"))
    monkeypatch.setattr(_doctor, "INSTALLED", ("no_such_package_either",))
    _, out, _ = run(capfd, "doctor", "--json")
    assert json.loads(out)["packages"] == {
        "broken_package": "does not load: OSError: libbroken.so: cannot open",
        "needy_package": "does not load: No module named 'no_such_package'",
        "no_such_package": None,
        "no_such_package_either": None,
    }


def test_list_has_every_table_of_names_that_the_package_offers(capfd):
    """Whatever a public package offers as a mapping from names to a line about each, uppercase in its ``__all__``."""
    from quantrature.cli import _list

    offered = set()
    for found in pkgutil.walk_packages(quantrature.__path__, "quantrature."):
        if found.ispkg and not any(part.startswith("_") for part in found.name.split(".")):
            package = importlib.import_module(found.name)
            offered |= {
                (found.name, name)
                for name in getattr(package, "__all__", ())
                if name.isupper() and isinstance(getattr(package, name), dict)
                if not isinstance(next(iter(getattr(package, name).values())), (type, tuple))
            }
    assert offered == set(_list.KINDS.values())
    status, out, _ = run(capfd, "list", "--json")
    assert status == 0
    for kind, (module, name) in _list.KINDS.items():
        assert json.loads(out)[kind].keys() == getattr(importlib.import_module(module), name).keys()
    assert json.loads(run(capfd, "list", "metrics", "--json")[1]).keys() == {"metrics"}
    assert "rounds to nearest" in run(capfd, "list", "methods")[1]


def test_what_needs_torch_says_how_to_get_it(folders):
    done = run_python(
        "import sys\nsys.modules['torch'] = None\nfrom quantrature.cli import main\n"
        f"sys.exit(main(['eval', {str(folders / 'model')!r}, '--text', 'x']))"
    )
    assert done.returncode == 1
    assert done.stderr == (
        "quantrature: error: this command needs torch, which is not installed: pip install 'quantrature[hf]'\n"
    )


def test_help_has_panels_and_shows_the_defaults_of_methods(capfd, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    _, out, _ = run(capfd, "quantize", "--help")
    titles = re.findall(r"─ ([^─]+) ─", out)
    assert titles[:2] == ["Arguments", "Options"]
    assert {"Calibration text and integrals", "Settings of methods", "ReQuant", "Memory", "Resuming", "Output"} <= set(
        titles
    )
    calibrated = [method for method in METHODS.values() if method.needs]
    most = max(set(m.nsamples for m in calibrated), key=[m.nsamples for m in calibrated].count)
    others = [f"{m.nsamples} for {name}" for name, m in METHODS.items() if m.needs and m.nsamples != most]
    assert f"[default: ({most}; {', '.join(others)})]" in out
    shorter = sorted(name for name, m in METHODS.items() if m.needs and m.seqlen != DEFAULT_SEQLEN)
    assert f"({DEFAULT_SEQLEN}, 512 for {' and '.join(shorter)}; or the model's context" in out
    assert {METHODS[name].seqlen for name in shorter} == {512}
    gptq = METHODS["gptq"].options
    assert f"[default: ({gptq['damp_percent']})]" in out
    for name in ("desc_act", "static_groups"):
        assert f"[default: ({'' if gptq[name] else 'no-'}{name.replace('_', '-')})]" in out


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("quantrature qua", "quantize"),
        ("quantrature plan diff --js", "--json"),
        ("quantrature plan --stra", "--strategy"),
    ],
)
def test_shells_complete_verbs_and_options(words, expected):
    environment = {
        **os.environ,
        "_QUANTRATURE_COMPLETE": "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split()) - 1),
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
    }
    code = "import sys; from quantrature.cli import main; sys.exit(main([]))"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert expected in done.stdout.split(), done
