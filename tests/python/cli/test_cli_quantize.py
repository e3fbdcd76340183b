"""The verbs that analyze, quantize, inspect and verify, on a tiny model."""

import json

import pytest
import torch

from quantrature import Plan, PlanEntry, Requantization, Sensitivity, checkpoint, models, quantization
from quantrature.cli import main
from quantrature.files.remote_code import REMOTE_CODE
from quantrature.nn import quantized_layers
from tiny_models import byte_tokenizer, tiny_model

TEXT = "It was the age of wisdom, it was the age of foolishness. " * 30


ANALYZE = ("analyze", "MODEL", "--calibration", "TEXT", "-o", "NEW")
FEW = ("--nsamples", "2", "--seqlen", "32")
REQUANT = ("quantize", "MODEL", "--bits", "3", "--requant", "--calibration", "TEXT", "-o", "NEW", *FEW)
FROM = ("--source", "MODEL", "--calibration", "TEXT", *FEW)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, a text and a quantized model."""
    root = tmp_path_factory.mktemp("verbs")
    tiny_model("llama").save_pretrained(root / "model")
    byte_tokenizer().save_pretrained(root / "model")
    (root / "text.txt").write_text(TEXT)
    assert main(["quantize", str(root / "model"), "--bits", "3", "--group-size", "16", "-o", str(root / "out")]) == 0
    return root


def run(capfd, *arguments):
    status = main([str(argument) for argument in arguments])
    return status, *capfd.readouterr()


def run_json(capfd, *arguments):
    status, out, err = run(capfd, *arguments, "--json")
    assert (status, err) == (0, ""), err
    return json.loads(out)


def test_analyze_writes_and_prints(capfd, folder, tmp_path):
    settings = ("--calibration", folder / "text.txt", "--nsamples", 2, "--seqlen", 32, "--bits", "2,4", "--nodes", 2)
    found = run_json(capfd, "analyze", folder / "model", "-o", tmp_path / "sens", *settings, "--group-size", 16)
    assert set(found) >= {"predicted_loss_change", "measured_loss_change", "gradient_evaluations", "modules"}
    assert found["gradient_evaluations"] == 4
    assert [proof["setting"] for proof in found["proofs"]] == ["b2g16", "b4g16"]
    assert found["settings"]["nsamples"] == 2
    assert Sensitivity.load(tmp_path / "sens").to_json() == found
    status, out, err = run(capfd, "analyze", folder / "model", "-o", tmp_path / "again", *settings)
    assert (status, err) == (0, "")
    for words in ("predicted loss change", "measured loss change", "relative difference", "written to"):
        assert words in " ".join(out.split())


def test_analyze_on_devices_with_limits(capfd, folder):
    pytest.importorskip("accelerate")
    settings = ("--calibration", folder / "text.txt", "--nsamples", 2, "--seqlen", 32, "--bits", 2, "--nodes", 2)
    found = run_json(capfd, "analyze", folder / "model", *settings, "--device-map", "auto", "--max-memory", "cpu=1GiB")
    plain = run_json(capfd, "analyze", folder / "model", *settings)
    assert found["predicted_loss_change"] == pytest.approx(plain["predicted_loss_change"], rel=1e-5)


def test_analyze_says_what_it_would_take(capfd, folder, tmp_path):
    cost = run_json(
        capfd,
        "analyze",
        folder / "model",
        "-o",
        tmp_path / "sens",
        "--calibration",
        folder / "text.txt",
        "--nsamples",
        2,
        "--seqlen",
        32,
        "--dry-run",
    )
    linears = models.find_linears(models.load_model(folder / "model"))
    assert cost["bytes"] == 4 * sum(linear.numel for linear in linears)
    assert cost["seconds"] > 0
    assert cost["memory_bytes"] > cost["bytes"]
    assert list(tmp_path.iterdir()) == []


def test_quantize_writes_what_it_says(capfd, folder, tmp_path):
    out = tmp_path / "out"
    said = run_json(
        capfd,
        "quantize",
        folder / "model",
        "--bits",
        4,
        "--group-size",
        16,
        "--method",
        "hqq",
        "--outlier-fraction",
        0.01,
        "--ignore",
        "re:.*o_proj",
        "-o",
        out,
    )
    found = run_json(capfd, "inspect", out)
    assert {key: found[key] for key in ("bits_per_weight", "bytes")} == {
        key: said[key] for key in ("bits_per_weight", "bytes")
    }
    assert said["modules"] == len(found["modules"])
    assert not any("o_proj" in name for name in found["modules"])
    assert all(m["bits"] == 4 and m["outliers"] > 0 for m in found["modules"].values())
    plan = Plan.load(out / "plan.json")
    assert {entry.method for _, entry in plan} == {"hqq"}
    assert models.load_tokenizer(out)("hello") == models.load_tokenizer(folder / "model")("hello")
    assert set(quantized_layers(models.load_model(out))) == set(found["modules"])


CALIBRATION = ("--nsamples", 2, "--seqlen", 32, "--nodes", 2)


def test_quantize_looks_for_the_matrices_once(capfd, folder, tmp_path, monkeypatch):
    searches = []
    find = quantization.model.find_linears
    monkeypatch.setattr(quantization.model, "find_linears", lambda *a, **k: searches.append(1) or find(*a, **k))
    assert run(capfd, "quantize", folder / "model", "--bits", "4", "-o", tmp_path / "new")[0] == 0
    assert len(searches) == 1


def test_quantize_with_requant(capfd, folder, tmp_path):
    arguments = ("quantize", folder / "model", "--bits", 2, "--group-size", 16, "--method", "mse", "--requant")
    budgets = (
        "--outlier-fraction",
        0.02,
        "--significant-fraction",
        0.01,
        "--calibration",
        folder / "text.txt",
        *CALIBRATION,
    )
    cost = run_json(capfd, *arguments, *budgets, "--dry-run")
    said = run_json(capfd, *arguments, *budgets, "-o", tmp_path / "out")
    assert cost["bytes"] == pytest.approx(said["bytes"], rel=0.05)  # some matrices keep nothing
    found = checkpoint.inspect(tmp_path / "out")
    record = Requantization.load(tmp_path / "out" / "requant.json")
    assert said["bytes"] == found.bytes == record.nbytes
    assert said["bits_per_weight"] == found.bits_per_weight
    assert said["paper_bits_per_weight"] == record.paper_bits_per_weight
    assert [stage["name"] for stage in said["stages"]] == ["quantized", "outliers", "detach 1", "detach 2"]
    assert said["outliers"] + said["significant"] == sum(m["outliers"] for m in found.modules.values())
    assert not (tmp_path / "out" / "plan.json").exists()
    assert run_json(capfd, "verify", tmp_path / "out", "--source", folder / "model")["ok"]
    status, out, _ = run(capfd, *arguments, *budgets, "-o", tmp_path / "again")
    assert status == 0
    for words in ("as the paper counts", "kept exactly", "detach 2", "gradient evaluations"):
        assert words in " ".join(out.split())


def test_requant_leaves_the_dtype_of_the_rest(capfd, folder, tmp_path):
    models.load_model(folder / "model", "bfloat16").save_pretrained(tmp_path / "half")
    byte_tokenizer().save_pretrained(tmp_path / "half")
    capfd.readouterr()  # transformers' bar
    arguments = (
        "--bits",
        2,
        "--requant",
        "--outlier-fraction",
        0.01,
        "--calibration",
        folder / "text.txt",
        *CALIBRATION,
    )
    run_json(capfd, "quantize", tmp_path / "half", *arguments, "-o", tmp_path / "out")
    loaded = models.load_model(tmp_path / "out")
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert loaded.model.layers[0].mlp.up_proj.outlier_values.dtype == torch.bfloat16
    assert run_json(capfd, "verify", tmp_path / "out", "--source", tmp_path / "half")["ok"]


def test_requant_improves_a_folder(capfd, folder, tmp_path):
    before = checkpoint.inspect(folder / "out").bytes
    arguments = ("--source", folder / "model", "--calibration", folder / "text.txt", *CALIBRATION)
    target = ("--target-size", f"{1.2 * before}B", "-o", tmp_path / "better")
    said = run_json(capfd, "requant", folder / "out", *arguments, *target)
    assert before < said["bytes"] <= 1.2 * before
    assert said["bytes"] == checkpoint.inspect(tmp_path / "better").bytes
    assert run_json(capfd, "verify", tmp_path / "better", "--source", folder / "model")["ok"]
    again = ("--significant-fraction", 0.01, "--overwrite")
    status, out, err = run(capfd, "requant", tmp_path / "better", *arguments, *again)
    assert (status, err) == (0, "")
    assert "improved" in out
    assert checkpoint.inspect(tmp_path / "better").bytes > said["bytes"]
    assert [path.name for path in tmp_path.iterdir()] == ["better"]


def test_quantize_by_a_plan(capfd, folder, tmp_path):
    names = [linear.name for linear in models.find_linears(tiny_model("llama"))]
    plan = Plan.uniform(names, PlanEntry(4, 16)).replace(names[0], bits=16).replace(names[1], bits=2)
    plan.save(tmp_path / "plan.json")
    run_json(capfd, "quantize", folder / "model", "--plan", tmp_path / "plan.json", "-o", tmp_path / "out")
    found = checkpoint.inspect(tmp_path / "out").modules
    assert names[0] not in found
    assert found[names[1]]["bits"] == 2
    assert found[names[2]]["bits"] == 4
    assert Plan.load(tmp_path / "out" / "plan.json").entries == plan.entries


def test_quantize_says_what_it_would_take(capfd, folder, tmp_path):
    arguments = ("quantize", folder / "model", "--bits", 3, "--group-size", 16, "--outlier-fraction", 0.01)
    cost = run_json(capfd, *arguments, "--dry-run")
    said = run_json(capfd, *arguments, "-o", tmp_path / "out")
    assert {key: cost[key] for key in ("bits_per_weight", "bytes", "other_bytes")} == {
        key: said[key] for key in ("bits_per_weight", "bytes", "other_bytes")
    }
    assert cost["seconds"] > 0
    status, out, _ = run(capfd, *arguments, "--dry-run")
    assert status == 0
    assert "bits per weight" in out


def test_inspect_prints_a_line_a_matrix(capfd, folder):
    status, out, err = run(capfd, "inspect", folder / "out")
    assert (status, err) == (0, "")
    assert out.count("b3g16") == len(checkpoint.inspect(folder / "out").modules)
    assert "other tensors" in out


def test_verify_accepts_the_source_and_no_other(capfd, folder, tmp_path):
    found = run_json(capfd, "verify", folder / "out", "--source", folder / "model")
    assert found["ok"]
    assert found["failures"] == found["changed"] == []
    assert all(0 < matrix["relative_error"] < 0.5 for matrix in found["modules"].values())
    tiny_model("llama", seed=3).save_pretrained(tmp_path / "other")
    status, out, err = run(capfd, "verify", folder / "out", "--source", tmp_path / "other", "--json")
    assert status == 1
    assert not json.loads(out)["ok"]
    assert "was not made from" in err


def test_a_quantized_model_is_evaluated_against_its_source(capfd, folder):
    found = run_json(
        capfd, "eval", folder / "out", "--text", folder / "text.txt", "--seqlen", 32, "--reference", folder / "model"
    )
    assert found["kld_mean"] > 0
    assert found["perplexity"] != found["reference_perplexity"]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("quantize", "MODEL", "--bits", "3"), "-o must name a folder"),
        (("quantize", "MODEL", "-o", "NEW"), "either bits or plan"),
        (("quantize", "MODEL", "--bits", "9", "-o", "NEW"), "bits must be 1 to 8"),
        (
            ("quantize", "MODEL", "--bits", "3", "-o", "OUT"),
            "is not empty; set overwrite to replace it",
        ),
        (("quantize", "MODEL", "--plan", "NONE.json", "-o", "NEW"), "cannot read"),
        (
            ("quantize", "OUT", "--bits", "3", "-o", "NEW"),
            "out is quantized already, by quantrature: give the original",
        ),
        (("quantize", "NOWHERE/x", "--bits", "3", "-o", "NEW"), "there is no such folder"),
        (("analyze", "MODEL", "-o", "NEW"), "--calibration must name"),
        (("analyze", "MODEL", "--calibration", "TEXT"), "-o must name a folder"),
        (("analyze", "MODEL", "--calibration", "TEXT", "-o", "OUT"), "exists and is not empty"),
        (("analyze", "MODEL", "--calibration", "TEXT", "-o", "NEW", "--bits", "x"), "--bits must be numbers"),
        ((*ANALYZE, "--max-memory", "cpu=1GiB"), "--max-memory needs --device-map"),
        ((*ANALYZE, "--device-map", "auto", "--max-memory", "1GiB"), "--max-memory must be DEVICE=SIZE: got '1GiB'"),
        ((*ANALYZE, "--device-map", "auto", "--max-memory", "cpu=x"), "--max-memory must be a size such as"),
        (("analyze", "MODEL", "--calibration", "TEXT", "-o", "NEW", "--nodes", "0"), "nodes must be at least 1"),
        (
            ("quantize", "MODEL", "--bits", "3", "--outlier-fraction", "1.01", "-o", "NEW"),
            "must be a fraction between 0 and 1",
        ),
        (("quantize", "MODEL", "--bits", "3", "--requant", "-o", "NEW"), "--requant needs a calibration text"),
        (
            ("quantize", "MODEL", "--bits", "3", "--significant-fraction", "0.01", "-o", "NEW"),
            "--significant-fraction needs --requant",
        ),
        ((*REQUANT, "--compute-dtype", "int8"), "--compute-dtype must be float32, bfloat16 or float16: got int8"),
        ((*REQUANT, "--selection", "magic"), "selection must be one of temperature, greedy"),
        (
            ("requant", "OUT", *FROM, "--significant-fraction", "1.5", "-o", "NEW"),
            "--significant-fraction must be a fraction between 0 and 1",
        ),
        (("requant", "OUT", *FROM, "--significant-fraction", "0.01"), "-o must name a folder to write; to replace DIR"),
        (("requant", "OUT", *FROM, "-o", "NEW"), "give exactly one of"),
        (("requant", "OUT", *FROM, "-o", "NEW", "--target-size", "x"), "--target-size must be a size such as"),
        (("requant", "OUT", *FROM, "-o", "NEW", "--avg-bits", "1"), "the budget must have room for"),
        (("requant", "MODEL", *FROM, "-o", "NEW", "--avg-bits", "4"), "holds no matrix quantized by quantrature"),
        (("inspect", "NOWHERE/x"), "there is no such folder"),
        (("verify", "MODEL", "--source", "MODEL"), "holds no quantized matrix"),
    ],
)
def test_a_failure_is_one_line(capfd, folder, tmp_path, arguments, complaint):
    places = {
        "MODEL": folder / "model",
        "TEXT": folder / "text.txt",
        "OUT": folder / "out",
        "NEW": tmp_path / "new",
        "NONE.json": tmp_path / "none.json",
        "NOWHERE/x": tmp_path / "nowhere" / "x",
    }
    status, out, err = run(capfd, *(places.get(argument, argument) for argument in arguments))
    assert status != 0
    assert out == ""
    assert err.startswith("quantrature: error: ")
    assert err.count("\n") == 1
    assert complaint in err
    assert list(tmp_path.iterdir()) == []


def test_methods_that_read_no_text_say_so(capfd, folder, tmp_path):
    status, _, err = run(
        capfd, "quantize", folder / "model", "--bits", 3, "--calibration", folder / "text.txt", "-o", tmp_path / "out"
    )
    assert status == 0
    assert "does not use the calibration text" in err


def test_the_result_is_the_same_from_python(folder):
    import quantrature

    expected = quantrature.quantize(tiny_model("llama"), bits=3, group_size=16)
    loaded = models.load_model(folder / "out")
    for name, layer in quantized_layers(expected).items():
        assert torch.equal(loaded.get_submodule(name).codes, layer.codes)


def test_code_of_its_own_is_written_where_it_is_asked_for(capfd, folder, tmp_path):
    run_json(capfd, "quantize", folder / "model", "--bits", 4, "--auto-map", "-o", tmp_path / "out")
    written = (tmp_path / "out" / f"{REMOTE_CODE}.py").read_text()
    assert "class LlamaForCausalLM(transformers.LlamaForCausalLM)" in written
    named = json.loads((tmp_path / "out" / "config.json").read_text())["auto_map"]
    assert named["AutoModelForCausalLM"] == f"{REMOTE_CODE}.LlamaForCausalLM"


def test_quantize_to_a_budget(capfd, folder, tmp_path):
    text = ("--calibration", folder / "text.txt", "--seqlen", 32)
    wish = ("--avg-bits", 4.5, "--effort", "fast", "--method", "rtn", "--group-size", 16)
    found = run_json(capfd, "quantize", folder / "model", "-o", tmp_path / "small", *text, *wish)
    assert found["bits_per_weight"] <= 4.5
    assert found["held_out_windows"] >= 1
    assert found["predicted_divergence"] > 0
    plan = Plan.load(tmp_path / "small" / "plan.json")
    assert plan.allocation["budget"] == {"avg_bits": 4.5}
    status, out, err = run(capfd, "quantize", folder / "model", "-o", tmp_path / "again", *text, *wish)
    assert status == 0, err
    for words in ("predicted divergence", "measured divergence", "windows held out", "written to"):
        assert words in " ".join(out.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--bits", 3), "--bits does not go with --avg-bits: remove one of them"),
        (("--target-size", "1MB"), "give one budget: got --avg-bits and --target-size"),
        (("--requant",), "--requant does not go with --avg-bits"),
        (("--nsamples", 4), "--nsamples does not go with --avg-bits"),
        (("--dry-run",), "--dry-run does not go with --avg-bits"),
        (("--effort", "all"), "effort must be one of fast, default, best: got 'all'"),
    ],
)
def test_what_does_not_go_with_a_budget_is_refused(capfd, folder, tmp_path, arguments, message):
    base = ("quantize", folder / "model", "--avg-bits", 4, "--calibration", folder / "text.txt", "-o", tmp_path / "new")
    status, _, err = run(capfd, *base, *arguments)
    assert status != 0
    assert message in err
    assert not (tmp_path / "new").exists()
