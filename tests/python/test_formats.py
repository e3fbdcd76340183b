"""Plans in the words of other tools, and the verbs for plans that are there."""

import json
import os
import re

import pytest

from quantrature import InvalidArgumentError, Plan, PlanEntry, formats, models
from quantrature.allocation import measured_loss_changes
from quantrature.analysis import analyze
from quantrature.cli import main
from tiny_models import byte_tokenizer, tiny_model

ATTENTION, MLP = "model.layers.0.self_attn", "model.layers.10.mlp"
PLAN = Plan(
    {
        f"{ATTENTION}.q_proj": PlanEntry(4, 32),
        f"{ATTENTION}.k_proj": PlanEntry(4, 32),
        f"{ATTENTION}.v_proj": PlanEntry(4, 32),
        f"{ATTENTION}.o_proj": PlanEntry(16),
        f"{MLP}.gate_proj": PlanEntry(2, 64),
        f"{MLP}.up_proj": PlanEntry(2, 64),
        f"{MLP}.down_proj": PlanEntry(8, 32, sym=True),
    }
)


def test_every_format_has_a_writer():
    assert set(formats.FORMATS) == set(formats._WRITERS)


def test_gptq_dynamic_overrides_what_differs_from_most():
    found = formats.export(PLAN, "gptq-dynamic")
    assert (found["bits"], found["group_size"], found["sym"]) == (4, 32, False)

    def of(module):
        """What GPTQModel takes for a module: the first pattern that matches from its beginning."""
        for pattern, override in found["dynamic"].items():
            if re.match(pattern[2:], module):
                return None if pattern.startswith("-:") else {**found, **override}
        return found

    for name, entry in PLAN:
        setting = of(name)
        if entry.keeps:
            assert setting is None
        else:
            assert (setting["bits"], setting["group_size"], setting["sym"]) == (entry.bits, entry.group_size, entry.sym)
    assert len(found["dynamic"]) == 4
    assert of("model.layers.10.mlpXdown_proj") is found


def test_compressed_tensors_has_a_group_for_each_setting():
    plan = PLAN.replace(f"{MLP}.down_proj", group_size=-1, bits=5)
    found = formats.export(plan, "compressed-tensors")
    assert found["ignore"] == [f"{ATTENTION}.o_proj", "lm_head"]
    seen = {}
    for group in found["config_groups"].values():
        for target in group["targets"]:
            assert target.startswith("re:")
            for name, _ in plan:
                if re.match(target.removeprefix("re:"), name):
                    assert name not in seen
                    seen[name] = group["weights"]
    assert set(seen) == {name for name, entry in plan if not entry.keeps}
    for name, weights in seen.items():
        entry = plan.entries[name]
        assert (weights["num_bits"], weights["symmetric"], weights["type"]) == (entry.bits, entry.sym, "int")
        assert (weights["strategy"], weights["group_size"]) == (
            ("channel", None) if entry.group_size == -1 else ("group", entry.group_size)
        )
    assert len(found["config_groups"]) == 3


def test_auto_round_names_every_matrix():
    found = formats.export(PLAN, "auto-round")
    assert list(found) == list(PLAN.entries)
    assert found[f"{ATTENTION}.o_proj"] == {"bits": 16}
    assert found[f"{MLP}.down_proj"] == {"bits": 8, "group_size": 32, "sym": True, "data_type": "int"}


def test_llama_cpp_takes_types_of_the_same_size():
    assert formats.export(PLAN, "llama.cpp").splitlines() == [
        "--tensor-type blk.0.attn_q.weight=q4_1",
        "--tensor-type blk.0.attn_k.weight=q4_1",
        "--tensor-type blk.0.attn_v.weight=q4_1",
        "--tensor-type blk.0.attn_output.weight=f16",
        "--tensor-type blk.10.ffn_gate.weight=q2_k",
        "--tensor-type blk.10.ffn_up.weight=q2_k",
        "--tensor-type blk.10.ffn_down.weight=q8_0",
    ]


@pytest.mark.parametrize(
    ("entry", "kind"),
    [
        (PlanEntry(3, 64), "q3_k"),
        (PlanEntry(4, 64), "q4_k"),
        (PlanEntry(4, 32, sym=True), "q4_0"),
        (PlanEntry(4, 32, meta_bits=6), "q4_k"),
        (PlanEntry(5, 64), "q5_k"),
        (PlanEntry(5, 32, sym=True), "q5_0"),
        (PlanEntry(5, 32), "q5_1"),
        (PlanEntry(6, 64), "q6_k"),
        (PlanEntry(8, 32, sym=True), "q8_0"),
    ],
)
def test_types_of_ggml(entry, kind):
    assert formats.export(Plan({f"{MLP}.up_proj": entry}), "llama.cpp").endswith(f"={kind}\n")


@pytest.mark.parametrize(
    ("form", "entry", "message"),
    [
        (
            "gptq",
            PlanEntry(4),
            "format must be one of gptq-dynamic, compressed-tensors, auto-round, llama.cpp: got 'gp",
        ),
        ("gptq-dynamic", PlanEntry(4, outliers=0.005), "outliers must be 0: got 0.005"),
        ("compressed-tensors", PlanEntry(4, outliers=0.005), "outliers must be 0: got 0.005"),
        ("auto-round", PlanEntry(4, outliers=0.005), "outliers must be 0: got 0.005"),
        ("llama.cpp", PlanEntry(4, outliers=0.005), "outliers must be 0: got 0.005"),
        *(
            (form, PlanEntry(4, size, solver=solver), f"solver must be one with a uniform grid: got {solver}")
            for form in formats.FORMATS
            for solver, size in (("nf4", 64), ("fp4", 64), ("squeezellm", -1), ("qtip", -1))
        ),
        ("gptq-dynamic", PlanEntry(4, meta_bits=8), "meta_bits must be null: got 8"),
        ("compressed-tensors", PlanEntry(4, meta_bits=8), "meta_bits must be null: got 8"),
        ("auto-round", PlanEntry(4, meta_bits=8), "meta_bits must be null: got 8"),
        ("gptq-dynamic", PlanEntry(5), "bits must be one of 2, 3, 4, 8: got 5"),
        ("auto-round", PlanEntry(7), "bits must be one of 2, 3, 4, 8: got 7"),
        ("gptq-dynamic", PlanEntry(4, 48), "group_size must be one of -1, 16, 32, 64, 128, 256, 512, 1024: got 48"),
        ("auto-round", PlanEntry(4, 48), "group_size must be one of -1, 16, 32, 64, 128, 256, 512, 1024: got 48"),
        ("llama.cpp", PlanEntry(7), "bits must be one of 2, 3, 4, 5, 6, 8: got 7"),
        (
            "llama.cpp",
            PlanEntry(4, 128),
            "group_size must give one of the sizes of 4-bit types (q4_k 4.5, q4_0 4.5, q4_1 5 bits a weight): "
            "got 128, 4.25 bits a weight",
        ),
    ],
)
def test_what_a_format_cannot_express_is_refused_by_entry(form, entry, message):
    with pytest.raises(InvalidArgumentError) as refused:
        formats.export(Plan({f"{MLP}.up_proj": PlanEntry(4, 64), f"{MLP}.down_proj": entry}), form)
    assert message in str(refused.value)
    if form in formats.FORMATS:
        assert f"[export] {form} cannot express entry '{MLP}.down_proj': " in str(refused.value)


def test_other_refusals():
    with pytest.raises(InvalidArgumentError, match="gptq-dynamic needs an entry that is quantized: got none"):
        formats.export(Plan({"a": PlanEntry(16)}), "gptq-dynamic")
    for name in ("transformer.h.0.attn.c_attn", "model.layers.0.block_sparse_moe.experts.3.w1"):
        with pytest.raises(InvalidArgumentError, match=r"which tensor of a GGUF file it is is known for models like"):
            formats.export(Plan({name: PlanEntry(4)}), "llama.cpp")


@pytest.mark.parametrize("form", sorted(formats.FORMATS))
def test_what_engines_fuse_and_the_plan_does_not_is_said(form, caplog):
    formats.export(PLAN, form)
    assert not caplog.records
    formats.export(PLAN.replace(f"{MLP}.up_proj", bits=3), form)
    assert [f"{MLP}.gate_proj, {MLP}.up_proj are fused" in r.message for r in caplog.records] == [True] * (
        form != "llama.cpp"
    )


# Differences


def test_plans_differ_in_how_matrices_are_stored():
    other = PLAN.replace(f"{MLP}.up_proj", bits=3).replace(f"{MLP}.down_proj", reason="else", predicted_loss_change=1.0)
    assert PLAN.diff(PLAN) == {}
    assert PLAN.diff(other) == {f"{MLP}.up_proj": (PlanEntry(2, 64), PlanEntry(3, 64))}
    less = Plan({name: entry for name, entry in PLAN if "attn" in name} | {"x": PlanEntry(2)})
    assert PLAN.diff(less) == {name: (entry, None) for name, entry in PLAN if "mlp" in name} | {
        "x": (None, PlanEntry(2))
    }


def test_entries_in_short():
    assert str(PlanEntry(16)) == "kept"
    assert str(PlanEntry(3)) == "b3g64 minmax"
    assert str(PlanEntry(3, -1, True, "mse", 8, 0.005)) == "b3g-1 mse sym, meta 8, outliers 0.005"


# The verbs


def run(capfd, *arguments):
    status = main([str(argument) for argument in arguments])
    return status, *capfd.readouterr()


def test_plan_diff(capfd, tmp_path):
    a, b = tmp_path / "a.json", tmp_path / "b.json"
    predicted = Plan({"m": PlanEntry(3, predicted_loss_change=0.5), "n": PlanEntry(4, predicted_loss_change=0.25)})
    Plan(predicted.entries, {"bytes": 1000, "bits_per_weight": 3.5}).save(a)
    Plan(predicted.replace("m", bits=2, outliers=0.01).entries, {"bytes": 900, "bits_per_weight": 3.25}).save(b)
    status, out, err = run(capfd, "plan", "diff", a, b, "--json")
    assert (status, err) == (0, "")
    found = json.loads(out)
    assert list(found["entries"]) == ["m"]
    assert (found["entries"]["m"]["a"]["bits"], found["entries"]["m"]["b"]["bits"]) == (3, 2)
    assert found["bytes"] == {"a": 1000, "b": 900}
    assert found["loss_change"] == {"a": 0.75, "b": 0.75}
    status, out, err = run(capfd, "plan", "diff", a, b)
    assert (status, err) == (0, "")
    words = " ".join(out.split())
    assert "1 of 2 matrices differ" in words
    assert "m b3g64 minmax → b2g64 minmax, outliers 0.01" in words
    assert "bytes 1,000 → 900" in words
    PLAN.save(b)
    status, out, err = run(capfd, "plan", "diff", a, b)
    assert "not there → b4g32 minmax" in " ".join(out.split())
    assert "bytes" not in out
    status, out, err = run(capfd, "plan", "diff", a, tmp_path / "none.json")
    assert status == 1
    assert "[plan] cannot read" in err


def test_plan_export(capfd, tmp_path):
    PLAN.save(tmp_path / "plan.json")
    status, out, err = run(capfd, "plan", "export", tmp_path / "plan.json", "auto-round")
    assert (status, err) == (0, "")
    assert json.loads(out) == formats.export(PLAN, "auto-round")
    status, _, err = run(capfd, "plan", "export", tmp_path / "plan.json", "llama.cpp", "-o", tmp_path / "types.txt")
    assert (status, err) == (0, "")
    assert (tmp_path / "types.txt").read_text() == formats.export(PLAN, "llama.cpp")
    status, _, err = run(capfd, "plan", "export", tmp_path / "plan.json", "llama.cpp", "-o", "/nowhere/types.txt")
    assert status == 1
    assert "[export] cannot write /nowhere/types.txt: No such file" in err
    status, out, _ = run(capfd, "list", "formats")
    assert all(name in out for name in formats.FORMATS)


def test_words_of_the_verb_plan_leave_folders_of_that_name(capfd, tmp_path, monkeypatch):
    tiny_model("llama").save_pretrained(tmp_path / "diff")
    monkeypatch.chdir(tmp_path)
    capfd.readouterr()
    status, out, err = run(capfd, "plan", f".{os.sep}diff", "--method", "uniform", "--avg-bits", 5, "--json")
    assert (status, err) == (0, "")
    assert len(json.loads(out)["entries"]) == 14
    assert run(capfd, "plan", "diff", "--json")[0] == 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, an analysis of it, a plan, and the text of all three."""
    root = tmp_path_factory.mktemp("validate")
    model = tiny_model("llama")
    model.save_pretrained(root / "model")
    byte_tokenizer().save_pretrained(root / "model")
    (root / "text.txt").write_text("It was the spring of hope, it was the winter of despair. " * 20)
    text = {"nsamples": 2, "seqlen": 32}
    tokenizer = models.load_tokenizer(root / "model")
    analyze(
        model, str(root / "text.txt"), tokenizer=tokenizer, metrics=["pqi"], bits=[2, 3], group_size=16, nodes=2, **text
    ).save(root / "sens")
    return root


def test_plan_validate(capfd, folder, tmp_path):
    made, validated = tmp_path / "plan.json", tmp_path / "validated.json"
    assert run(capfd, "plan", folder / "sens", "--avg-bits", 4.5, "-o", made)[0] == 0
    text = ("--calibration", folder / "text.txt", "--nsamples", 2, "--seqlen", 32)
    arguments = ("plan", "validate", made, folder / "model", *text)
    status, out, err = run(capfd, *arguments, "--json")
    assert (status, err) == (0, "")
    found = json.loads(out)
    plan = Plan.load(made)
    assert found["predicted_loss_change"] == plan.predicted_loss_change
    model, tokenizer = models.load_model(folder / "model"), models.load_tokenizer(folder / "model")
    expected = measured_loss_changes(
        model, str(folder / "text.txt"), [plan], tokenizer=tokenizer, nsamples=2, seqlen=32, batch_size=8
    )
    assert found["measured_loss_change"] == expected[0]
    more = ("--sensitivity", folder / "sens", "--count", 3, "-o", validated)
    status, out, err = run(capfd, *arguments, *more)
    assert (status, err) == (0, "")
    assert "3 random plans" in " ".join(out.split())
    stored = Plan.load(validated)
    assert stored.entries == plan.entries
    assert stored.allocation["validation"]["plans"] == 3
    assert stored.allocation["validation"]["measured_loss_change"] == expected[0]
    PLAN.save(tmp_path / "bare.json")
    status, _, err = run(capfd, "plan", "validate", tmp_path / "bare.json", folder / "model", *text)
    assert status == 1
    assert "must predict the loss change of every entry: got one without" in err
