"""Plans in the words of other tools, and the verbs for plans that are there."""

import copy
import json
import os
import re

import pytest
import torch
import transformers

from fresh_python import run_python
from quantrature import InvalidArgumentError, Plan, PlanEntry, models
from quantrature.allocation import measured_loss_changes
from quantrature.analysis import analyze
from quantrature.cli import main
from quantrature.exports import plans as formats
from tiny_models import byte_tokenizer, tiny_config, tiny_model

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


def setting_of(entry):
    return None if entry.keeps else (entry.bits, entry.group_size, entry.sym)


def gptq_setting(found, module):
    """What GPTQModel and vLLM take for a module: the first pattern that matches from its beginning."""
    for pattern, override in found["dynamic"].items():
        if re.match(pattern[2:], module):
            mine = {**found, **override}
            return None if pattern.startswith("-:") else (mine["bits"], mine["group_size"], mine["sym"])
    return found["bits"], found["group_size"], found["sym"]


def test_gptq_dynamic_overrides_what_differs_from_most():
    found = formats.export_plan(PLAN, "gptq-dynamic")
    assert (found["bits"], found["group_size"], found["sym"]) == (4, 32, False)
    for name, entry in PLAN:
        assert gptq_setting(found, name) == setting_of(entry)
    assert len(found["dynamic"]) == 3  # gate and up are one
    assert gptq_setting(found, "model.layers.10.mlpXdown_proj") == (4, 32, False)
    assert gptq_setting(found, f"{MLP}.gate_up_proj") == (2, 64, False)
    assert gptq_setting(found, f"{ATTENTION}.qkv_proj") == (4, 32, False)
    assert gptq_setting(found, f"{MLP}.gate_up_proj_norm") == (4, 32, False)


SERVED = Plan(
    {
        **{f"{ATTENTION}.{part}_proj": PlanEntry(8, 128, sym=True) for part in "qkv"},
        f"{ATTENTION}.o_proj": PlanEntry(4, 64, sym=True),
        **{f"{MLP}.{part}_proj": PlanEntry(16) for part in ("gate", "up")},
        f"{MLP}.down_proj": PlanEntry(4, 64, sym=True),
    }
)


def test_vllm_finds_the_settings_of_fused_matrices():
    found = formats.export_plan(SERVED, "gptq-vllm")
    names = {f"{ATTENTION}.qkv_proj": (8, 128, True), f"{MLP}.gate_up_proj": None, f"{MLP}.down_proj": (4, 64, True)}
    assert {name: gptq_setting(found, name) for name in names} == names
    for name, entry in SERVED:
        assert gptq_setting(found, name) == setting_of(entry)


EXPERTS = "model.layers.3.mlp.experts"


def experts_plan(entry, other=None):
    return Plan(
        {
            **{f"{ATTENTION}.{part}_proj": PlanEntry(4, 64, sym=True) for part in "qkvo"},
            **{f"{EXPERTS}.gate_up_proj.{i}": entry for i in range(12)},
            **{f"{EXPERTS}.down_proj.{i}": other or entry for i in range(12)},
        }
    )


def dense_layers(count):
    return {f"model.layers.{100 + i}.mlp.down_proj": PlanEntry(4, 64, sym=True) for i in range(count)}


def test_fused_experts_have_the_names_of_the_other_tools():
    entry, other = PlanEntry(8, 32, sym=True), PlanEntry(4, 32, sym=True)
    found = formats.export_plan(experts_plan(entry), "gptq-vllm")
    for name in (EXPERTS, f"{EXPERTS}.3.gate_proj", f"{EXPERTS}.3.up_proj", f"{EXPERTS}.11.down_proj"):
        assert gptq_setting(found, name) == (8, 32, True), name
    assert gptq_setting(found, f"{ATTENTION}.qkv_proj") == gptq_setting(found, f"{ATTENTION}.o_proj") == (4, 64, True)
    found = formats.export_plan(Plan({**experts_plan(entry).entries, **dense_layers(30)}), "gptq-vllm")
    assert (found["bits"], found["group_size"]) == (4, 64)
    assert gptq_setting(found, EXPERTS) == gptq_setting(found, f"{EXPERTS}.3.gate_proj") == (8, 32, True)
    for name in (
        f"{EXPERTS}_shared",
        EXPERTS.replace("3", "13"),
        f"{EXPERTS.replace('experts', 'shared_expert')}.up_proj",
    ):
        assert gptq_setting(found, name) == (4, 64, True), name
    with pytest.raises(
        InvalidArgumentError,
        match=r"gptq-vllm .*'model.layers.3.mlp.experts.down_proj.0': it must have the same setting",
    ):
        formats.export_plan(experts_plan(entry, other), "gptq-vllm")
    for form in ("gptq-dynamic", "auto-round", "compressed-tensors"):
        found = formats.export_plan(experts_plan(entry, other), form)
        for i in (0, 1, 11):
            for part, expected in (("gate_proj", entry), ("up_proj", entry), ("down_proj", other)):
                name = f"{EXPERTS}.{i}.{part}"
                if form == "gptq-dynamic":
                    assert gptq_setting(found, name) == setting_of(expected)
                elif form == "auto-round":
                    assert (found[name]["bits"], found[name]["group_size"]) == (expected.bits, 32)
                else:
                    groups = [
                        g for g in found["config_groups"].values() if any(re.match(t[3:], name) for t in g["targets"])
                    ]
                    assert [g["weights"]["num_bits"] for g in groups] == [expected.bits]
    kept = formats.export_plan(experts_plan(PlanEntry(16)), "compressed-tensors")
    assert f"{EXPERTS}.3.up_proj" in kept["ignore"]


@pytest.fixture(scope="module")
def served_model():
    """A model that has the matrices of PLAN and SERVED in sizes that the other tools take."""
    config = tiny_config("llama")
    config.num_hidden_layers, config.hidden_size, config.intermediate_size, config.head_dim = 11, 128, 128, 32
    with torch.device("meta"):
        return transformers.LlamaForCausalLM(config)


@pytest.mark.parametrize(
    "plan",
    [
        PLAN.replace(f"{MLP}.down_proj", group_size=-1, bits=5),
        SERVED,
        Plan({"lm_head": PlanEntry(8, -1, sym=True), f"{MLP}.up_proj": PlanEntry(2, 64)}),
    ],
    ids=["mixed", "served", "with the output embedding"],
)
def test_compressed_tensors_applies_every_entry(plan, served_model):
    quantization = pytest.importorskip("compressed_tensors.quantization")
    model = copy.deepcopy(served_model)
    found = formats.export_plan(plan, "compressed-tensors")
    quantization.apply_quantization_config(model, quantization.QuantizationConfig(**found), show_progress=False)
    for name, module in model.named_modules():
        entry = plan.entries.get(name, PlanEntry(16))
        scheme = getattr(module, "quantization_scheme", None)
        if entry.keeps:
            assert scheme is None, name
            continue
        weights = scheme.weights
        assert (weights.num_bits, weights.symmetric, weights.type) == (entry.bits, entry.sym, "int")
        assert (weights.strategy, weights.group_size) == (
            ("channel", None) if entry.group_size == -1 else ("group", entry.group_size)
        )
        assert scheme.input_activations is None
    assert len(found["config_groups"]) == len({setting_of(entry) for _, entry in plan} - {None})


@pytest.mark.slow  # importing it takes seconds
def test_auto_round_applies_every_entry(tmp_path):
    pytest.importorskip("auto_round")
    plans = {"mixed": PLAN, "served": SERVED}
    wanted = {name: formats.export_plan(plan, "auto-round") for name, plan in plans.items()}
    (tmp_path / "wanted.json").write_text(json.dumps(wanted))
    done = run_python(
        "import json, torch\nfrom transformers import LlamaConfig, LlamaForCausalLM\n"
        "from auto_round.compressors.utils import set_layer_config\n"
        "torch.set_default_device('meta')\n"
        "model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=11, hidden_size=128, intermediate_size=128, "
        "num_attention_heads=4, num_key_value_heads=4, vocab_size=64))\n"
        "found = {}\n"
        f"for name, wanted in json.load(open({str(tmp_path / 'wanted.json')!r})).items():\n"
        "    layers, _, regex = set_layer_config(model, dict(wanted), 'W3A16', 'float16', (torch.nn.Linear,), ())\n"
        "    assert not regex, regex\n"
        "    found[name] = {layer: [layers[layer][key] for key in ('bits', 'group_size', 'sym')] for layer in wanted}\n"
        "print(json.dumps(found))"
    )
    assert done.returncode == 0, done.stderr
    for name, found in json.loads(done.stdout.splitlines()[-1]).items():
        for module, entry in plans[name]:
            assert found[module][0] == entry.bits
            assert entry.keeps or tuple(found[module]) == setting_of(entry)


def test_gptqmodel_applies_every_entry():
    gptqmodel = pytest.importorskip("gptqmodel.quantization.config")
    for plan, form in ((PLAN, "gptq-dynamic"), (SERVED, "gptq-vllm")):
        found = formats.export_plan(plan, form)
        config = gptqmodel.QuantizeConfig(**found)
        for name, entry in plan:
            override = config.dynamic_get(name)
            mine = {**found, **(override or {})}
            assert (None if override is False else (mine["bits"], mine["group_size"], mine["sym"])) == setting_of(entry)


def test_gguf_has_the_tensors_and_the_types():
    gguf = pytest.importorskip("gguf")
    known = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 12)
    plan = Plan({name: PlanEntry(4, 64) for name, _ in PLAN})
    lines = formats.export_plan(plan, "llama.cpp").splitlines()
    for (name, _), line in zip(plan, lines, strict=True):
        assert line == f"--tensor-type {known.get_name(name)}.weight=q4_k"
    for bits, types in formats.LLAMA_TYPES.items():
        for kind, stored in types.items():
            block, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind.upper()]]
            assert 8 * nbytes / block == stored and int(kind[1]) == bits


def test_auto_round_names_every_matrix():
    found = formats.export_plan(PLAN, "auto-round")
    assert list(found) == list(PLAN.entries)
    assert found[f"{ATTENTION}.o_proj"] == {"bits": 16}
    assert found[f"{MLP}.down_proj"] == {"bits": 8, "group_size": 32, "sym": True, "data_type": "int"}


def test_llama_cpp_takes_types_of_the_same_size():
    assert formats.export_plan(PLAN, "llama.cpp").splitlines() == [
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
    assert formats.export_plan(Plan({f"{MLP}.up_proj": entry}), "llama.cpp").endswith(f"={kind}\n")


@pytest.mark.parametrize(
    ("form", "entry", "message"),
    [
        (
            "gptq",
            PlanEntry(4),
            "format must be one of gptq-dynamic, gptq-vllm, compressed-tensors, auto-round, llama.cpp: got 'gp",
        ),
        ("gptq-dynamic", PlanEntry(4, outlier_fraction=0.005), "outlier_fraction must be 0: got 0.005"),
        ("compressed-tensors", PlanEntry(4, outlier_fraction=0.005), "outlier_fraction must be 0: got 0.005"),
        ("auto-round", PlanEntry(4, outlier_fraction=0.005), "outlier_fraction must be 0: got 0.005"),
        ("llama.cpp", PlanEntry(4, outlier_fraction=0.005), "outlier_fraction must be 0: got 0.005"),
        *(
            (form, PlanEntry(4, size, method=solver), f"method must be one with evenly spaced values: got {solver}")
            for form in formats.FORMATS
            for solver, size in (("nf4", 64), ("fp4", 64), ("squeezellm", -1), ("qtip", -1))
        ),
        ("gptq-dynamic", PlanEntry(4, meta_bits=8), "meta_bits must be null: got 8"),
        ("compressed-tensors", PlanEntry(4, meta_bits=8), "meta_bits must be null: got 8"),
        ("auto-round", PlanEntry(4, meta_bits=8), "meta_bits must be null: got 8"),
        ("gptq-vllm", PlanEntry(4, outlier_fraction=0.005), "outlier_fraction must be 0: got 0.005"),
        ("gptq-vllm", PlanEntry(4, 64), "sym must be true: got False"),
        ("gptq-vllm", PlanEntry(3, 64, sym=True), "bits must be one of 4, 8: got 3"),
        ("gptq-vllm", PlanEntry(4, 16, sym=True), "group_size must be one of -1, 32, 64, 128: got 16"),
        ("compressed-tensors", PlanEntry(1, 64, sym=True), "bits must be one of 2, 3, 4, 5, 6, 7, 8: got 1"),
        ("gptq-dynamic", PlanEntry(5), "bits must be one of 2, 3, 4, 8: got 5"),
        ("auto-round", PlanEntry(7), "bits must be one of 2, 3, 4, 8: got 7"),
        ("gptq-dynamic", PlanEntry(4, 48), "group_size must be one of -1, 16, 32, 64, 128, 256, 512, 1024: got 48"),
        ("auto-round", PlanEntry(4, 48), "group_size must be one of -1, 16, 32, 64, 128, 256, 512, 1024: got 48"),
        ("llama.cpp", PlanEntry(7), "bits must be one of 2, 3, 4, 5, 6, 8: got 7"),
        (
            "llama.cpp",
            PlanEntry(4, 128),
            "group_size must give one of the sizes of 4-bit types (q4_k 4.5, q4_0 4.5, q4_1 5 bits per weight): "
            "got 128, 4.25 bits per weight",
        ),
    ],
)
def test_what_a_format_cannot_express_is_refused_by_entry(form, entry, message):
    with pytest.raises(InvalidArgumentError) as refused:
        formats.export_plan(Plan({f"{MLP}.up_proj": PlanEntry(4, 32, sym=True), f"{MLP}.down_proj": entry}), form)
    assert message in str(refused.value)
    if form in formats.FORMATS:
        assert f"[export] {form} cannot express entry '{MLP}.down_proj': " in str(refused.value)


def test_other_refusals():
    with pytest.raises(InvalidArgumentError, match="gptq-dynamic needs an entry that is quantized: got none"):
        formats.export_plan(Plan({"a": PlanEntry(16)}), "gptq-dynamic")
    for form in ("gptq-dynamic", "gptq-vllm", "auto-round"):
        with pytest.raises(InvalidArgumentError, match=f"{form} .*'lm_head': only matrices inside the blocks can be"):
            formats.export_plan(Plan({"lm_head": PlanEntry(8, -1, sym=True)}), form)
    parts = {f"{MLP}.gate_proj": PlanEntry(4, 64, sym=True), f"{MLP}.up_proj": PlanEntry(16)}
    with pytest.raises(
        InvalidArgumentError, match=r"'model.layers.10.mlp.up_proj': it must have the same setting as .*gate_proj, with"
    ):
        formats.export_plan(Plan(parts), "gptq-vllm")
    for name in ("transformer.h.0.attn.c_attn", "model.layers.0.block_sparse_moe.experts.3.w1"):
        with pytest.raises(InvalidArgumentError, match=r"its tensor name in GGUF is only known for"):
            formats.export_plan(Plan({name: PlanEntry(4)}), "llama.cpp")


@pytest.mark.parametrize("form", sorted(set(formats.FORMATS) - {"gptq-vllm"}))
def test_what_engines_fuse_and_the_plan_does_not_is_said(form, caplog):
    formats.export_plan(PLAN, form)
    assert not caplog.records
    formats.export_plan(PLAN.replace(f"{MLP}.up_proj", bits=3), form)
    assert [f"{MLP}.gate_proj, {MLP}.up_proj have different settings" in r.message for r in caplog.records] == [
        True
    ] * (form != "llama.cpp")


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
    assert str(PlanEntry(3)) == "b3g64 rtn"
    assert str(PlanEntry(3, -1, True, "mse", 8, 0.005)) == "b3g-1 mse sym, meta 8, outlier_fraction 0.005"


# The verbs


def run(capfd, *arguments):
    status = main([str(argument) for argument in arguments])
    return status, *capfd.readouterr()


def test_plan_diff(capfd, tmp_path):
    a, b = tmp_path / "a.json", tmp_path / "b.json"
    predicted = Plan({"m": PlanEntry(3, predicted_loss_change=0.5), "n": PlanEntry(4, predicted_loss_change=0.25)})
    Plan(predicted.entries, {"bytes": 1000, "bits_per_weight": 3.5}).save(a)
    Plan(predicted.replace("m", bits=2, outlier_fraction=0.01).entries, {"bytes": 900, "bits_per_weight": 3.25}).save(b)
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
    assert "m b3g64 rtn → b2g64 rtn, outlier_fraction 0.01" in words
    assert "bytes 1,000 → 900" in words
    PLAN.save(b)
    status, out, err = run(capfd, "plan", "diff", a, b)
    assert "missing → b4g32 rtn" in " ".join(out.split())
    assert "bytes" not in out
    status, out, err = run(capfd, "plan", "diff", a, tmp_path / "none.json")
    assert status == 1
    assert "[plan diff] cannot read" in err


def test_plan_export(capfd, tmp_path):
    PLAN.save(tmp_path / "plan.json")
    status, out, err = run(capfd, "plan", "export", tmp_path / "plan.json", "auto-round")
    assert (status, err) == (0, "")
    assert json.loads(out) == formats.export_plan(PLAN, "auto-round")
    status, _, err = run(capfd, "plan", "export", tmp_path / "plan.json", "llama.cpp", "-o", tmp_path / "types.txt")
    assert (status, err) == (0, "")
    assert (tmp_path / "types.txt").read_text() == formats.export_plan(PLAN, "llama.cpp")
    status, _, err = run(capfd, "plan", "export", tmp_path / "plan.json", "llama.cpp", "-o", "/nowhere/types.txt")
    assert status == 1
    assert "[plan export] cannot write /nowhere/types.txt: No such file" in err
    status, out, _ = run(capfd, "list", "formats")
    assert all(name in out for name in formats.FORMATS)


def test_words_of_the_verb_plan_leave_folders_of_that_name(capfd, tmp_path, monkeypatch):
    tiny_model("llama").save_pretrained(tmp_path / "diff")
    monkeypatch.chdir(tmp_path)
    capfd.readouterr()
    status, out, err = run(capfd, "plan", f".{os.sep}diff", "--strategy", "uniform", "--avg-bits", 5, "--json")
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
    assert "must predict the loss change of every entry, as pqi plans do: got one without" in err
