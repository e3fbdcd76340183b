"""Export targets: what they hold is exact, what they cannot hold is refused by name, and nothing is half-written."""

import importlib
import json
import math
import pkgutil
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import quantrature as qtr
from pairwise import pairwise
from quantrature import InvalidArgumentError, Plan, PlanEntry, QuantratureError, checkpoint, exports
from quantrature.cli import main
from quantrature.exports import TARGETS, Setting, Target
from quantrature.exports.bitstream import pack_words, unpack_words
from quantrature.exports.grid import Grid
from quantrature.models import find_linears, load_model
from quantrature.models.folding import folds_of
from quantrature.packed import MatrixSpec, QuantizedMatrix
from tiny_models import VOCABULARY, byte_tokenizer

WIDE = {"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "head_dim": 32}
WIDE |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64, "pad_token_id": None}
MIXTURE = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
CONFIGS = {
    "llama": ("LlamaConfig", WIDE),
    "llama-tied": ("LlamaConfig", {**WIDE, "tie_word_embeddings": True}),
    "qwen2": ("Qwen2Config", WIDE),
    "qwen3-moe": ("Qwen3MoeConfig", {**WIDE, **MIXTURE}),
    "mixtral": ("MixtralConfig", {**WIDE, "num_local_experts": 3, "num_experts_per_tok": 2}),
    "gpt-oss": ("GptOssConfig", {**WIDE, "num_local_experts": 3, "num_experts_per_tok": 2}),
    "gpt2": ("GPT2Config", {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 1, "n_head": 2, "n_positions": 64}),
}
Q = "model.layers.0.self_attn.q_proj"
IN_SAFETENSORS = ["compressed-tensors", "mlx"]
"""Targets that write safetensors files; test_exports_gguf.py has the tests of the other one."""


def wide_model(name="llama", dtype=torch.float32):
    torch.manual_seed(0)
    kind, settings = CONFIGS[name]
    config = getattr(transformers, kind)(**settings)
    return transformers.AutoModelForCausalLM.from_config(config).to(dtype).eval()


def quantized_folder(folder, name="llama", **settings):
    """Write a quantized model; the settings are those of ``quantize``."""
    model = qtr.quantize(wide_model(name), **settings)
    checkpoint.save(model, folder, tokenizer=byte_tokenizer())
    return folder


def of_entry(folder, entry, name="llama", others=None):
    """Write a model whose every matrix in a block has the entry, but for some others."""
    names = [linear.name for linear in find_linears(wide_model(name))]
    return quantized_folder(folder, name, plan=Plan({**Plan.uniform(names, entry).entries, **(others or {})}))


def weights_of(model):
    return {name: tensor for name, tensor in model.state_dict().items() if name not in model.all_tied_weights_keys}


def check_exact(folder, target, out):
    """Export, and compare every tensor that is read back with the quantized model; returns the result."""
    found = qtr.export(folder, target, out)
    assert {matrix.result for matrix in found.matrices} == {"exact"}
    wanted = weights_of(load_model(folder).dequantize(torch.float32))
    read = weights_of(exports.load(out))
    assert set(read) == set(wanted)
    for name, tensor in wanted.items():
        assert torch.equal(read[name], tensor), name
    stored = {name: t.nbytes for path in out.glob("*.safetensors") for name, t in load_file(path).items()}
    assert sum(stored.values()) == found.bytes + found.other_bytes
    for matrix in found.matrices:
        assert TARGETS[target].nbytes(matrix.setting) == matrix.nbytes, matrix
    return found


# --- the parts


@pytest.mark.parametrize(("bits", "cols"), pairwise(range(1, 9), (1, 7, 32, 45, 128)))
def test_words_are_one_little_endian_stream_per_row(bits, cols):
    codes = np.random.default_rng(cols).integers(0, 1 << bits, (5, cols)).astype(np.uint8)
    words = pack_words(codes, bits)
    assert words.shape == (5, math.ceil(cols * bits / 32)) and words.dtype == np.uint32
    for row, of_row in zip(codes.tolist(), words.tolist(), strict=True):
        stream = sum(code << i * bits for i, code in enumerate(row))
        assert sum(word << 32 * k for k, word in enumerate(of_row)) == stream
    assert np.array_equal(unpack_words(words, bits, cols), codes)
    with pytest.raises(ValueError, match=f"codes of {bits} bits for {cols + 32} columns do not take words of shape"):
        unpack_words(words, bits, cols + 32)


def some_weight():
    return torch.randn(6, 96, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("bits", "group_size", "sym", "meta_bits"), pairwise((1, 2, 3, 5, 8), (32, 40, 96, -1), (False, True), (None, 8))
)
def test_a_grid_has_the_values_of_the_stored_form(bits, group_size, sym, meta_bits):
    found = qtr.ops.quantize(some_weight(), bits, group_size, sym=sym, meta_bits=meta_bits)
    grid = Grid.of(found)
    wanted = found.dequantize("float32").numpy()
    assert np.array_equal(grid.values(), wanted)
    assert np.array_equal(grid.in_groups_of(8).values(), wanted)
    assert np.array_equal(grid.rows(np.array([4, 0])).values(), wanted[[4, 0]])
    if bits > 1 or not sym:
        wide = grid.in_bits(8)
        assert wide.bits == 8 and np.array_equal(wide.values(), wanted)


def test_a_refit_has_whole_zero_points_and_the_nearest_codes():
    w = some_weight()
    w[1] += 7  # a range without zero
    grid, w = Grid.of(qtr.ops.quantize(w, 4, 32)), w.numpy()
    found = grid.refit(w)
    assert set(found.zeros.ravel()) <= set(range(16)) and not set(grid.zeros.ravel()) <= set(range(16))
    top = 15 - found.zeros
    assert (found.scale[1] * top[1] > w[1].reshape(3, 32).max(1) - found.scale[1]).all()
    assert (found.scale == found.scale.astype(np.float16)).all() and grid.scale_dtype == "float16"
    assert (found.scale[[0, 2, 3, 4, 5]] == grid.scale[[0, 2, 3, 4, 5]]).all()
    every = (np.arange(16)[:, None, None] - found.spread(found.zeros)) * found.spread(found.scale)
    best = np.abs(every - w).min(axis=0)
    assert np.allclose(np.abs(found.values() - w), best, atol=1e-6)


def test_every_target_of_the_package_is_listed(capsys):
    named = {}
    for module in pkgutil.iter_modules(exports.__path__, "quantrature.exports."):
        values = vars(importlib.import_module(module.name)).values()
        named |= {value.name: value for value in values if isinstance(value, Target)}
    assert named == TARGETS
    assert main(["list", "targets", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"targets": {name: str(t) for name, t in TARGETS.items()}}


# --- exact exports


@pytest.mark.parametrize(
    ("bits", "group_size", "sym", "zero", "scale_dtype"),
    pairwise((1, 2, 3, 4, 5, 6, 7, 8), (32, 64, 128, -1), (False, True), ("float", "integer"), ("float16", "bfloat16")),
)
def test_mlx_is_exact(bits, group_size, sym, zero, scale_dtype, tmp_path):
    entry = PlanEntry(bits, group_size, sym=sym, zero="float" if sym else zero, scale_dtype=scale_dtype)
    folder = of_entry(tmp_path / "q", entry, others={"model.embed_tokens": PlanEntry(8, 64), "lm_head": entry})
    found = check_exact(folder, "mlx", tmp_path / "out")
    about = json.loads((tmp_path / "out" / "config.json").read_text())["quantization"]
    assert about[Q] == {"bits": 8 if bits == 7 else bits, "group_size": 32 if group_size == 32 else 64}
    assert len([key for key in about if isinstance(about[key], dict)]) == len(found.matrices) == 9


@pytest.mark.parametrize(
    ("bits", "group_size", "sym", "scale_dtype"),
    pairwise((2, 3, 4, 5, 6, 7, 8), (16, 32, 64, -1), (False, True), ("float16", "bfloat16", "float32")),
)
def test_compressed_tensors_is_exact(bits, group_size, sym, scale_dtype, tmp_path):
    entry = PlanEntry(bits, group_size, sym=sym, zero="float" if sym else "integer", scale_dtype=scale_dtype)
    folder = of_entry(tmp_path / "q", entry)
    check_exact(folder, "compressed-tensors", tmp_path / "out")
    about = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert "lm_head" in about["ignore"] and "model.embed_tokens" in about["ignore"]
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.quantization import QuantizationConfig

    config = QuantizationConfig.model_validate({k: v for k, v in about.items() if k != "quant_method"})
    assert {group.weights.num_bits for group in config.config_groups.values()} == {bits}


def test_the_table_of_a_tied_output_is_ignored_too(tmp_path):
    """vLLM and transformers look for the output embedding by its name."""
    folder = quantized_folder(tmp_path / "q", "llama-tied", bits=4, group_size=32, sym=True)
    check_exact(folder, "compressed-tensors", tmp_path / "out")
    about = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert about["ignore"] == ["model.embed_tokens", "lm_head"]


def test_experts_with_and_without_zero_points_are_stacked(tmp_path):
    expert = "model.layers.0.mlp.experts.down_proj.1"
    folder = of_entry(tmp_path / "q", PlanEntry(4, 32, sym=True), "qwen3-moe", {expert: PlanEntry(4, 32)})
    qtr.export(folder, "mlx", tmp_path / "out")
    assert not exports.verify(tmp_path / "out", folder).failures
    scales = load_file(tmp_path / "out" / "model.safetensors")["model.layers.0.mlp.switch_mlp.down_proj.scales"]
    read, wanted = exports.load(tmp_path / "out"), load_model(folder).dequantize(torch.float32)
    assert scales.dtype == torch.float32
    assert torch.equal(*(m.model.layers[0].mlp.experts.down_proj for m in (read, wanted)))


@pytest.mark.parametrize("target", IN_SAFETENSORS)
def test_groups_that_do_not_divide_the_row_are_divided_themselves(target, tmp_path):
    """128 columns in groups of 96 are groups of 96 and 32: both are groups of 32, with the same parameters."""
    folder = of_entry(tmp_path / "q", PlanEntry(3, 96, sym=True))
    found = check_exact(folder, target, tmp_path / "out")
    assert {matrix.setting.shape[1]: matrix.setting.group for matrix in found.matrices} == {64: 64, 128: 32}


@pytest.mark.parametrize("name", ["llama-tied", "qwen2", "qwen3-moe", "mixtral"])
def test_mlx_holds_tied_tables_biases_and_experts(name, tmp_path):
    folder = quantized_folder(tmp_path / "q", name, bits=4, group_size=32, embedding_bits=8)
    found = check_exact(folder, "mlx", tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    names = {matrix.name for matrix in found.matrices}
    assert ("lm_head" in names) == (name != "llama-tied") and "model.embed_tokens.scales" in tensors
    if name == "qwen2":
        assert f"{Q}.bias" in tensors and f"{Q}.biases" in tensors
    if name == "mixtral":
        assert tensors["model.layers.0.block_sparse_moe.switch_mlp.gate_proj.weight"].shape == (3, 128, 8)
        assert "model.layers.0.block_sparse_moe.experts.2.w2" in names
    if name == "qwen3-moe":
        assert tensors["model.layers.0.mlp.switch_mlp.down_proj.scales"].shape == (3, 64, 1)


def test_quantized_scales_are_expanded(tmp_path):
    folder = quantized_folder(tmp_path / "q", bits=3, group_size=32, meta_bits=8)
    found = qtr.export(folder, "mlx", tmp_path / "out")
    # Scales times zero points, in float32, are not always exact.
    assert {matrix.result for matrix in found.matrices} <= {"exact", "rounded"}
    assert all(0 <= matrix.error < 1e-12 for matrix in found.matrices)
    read, wanted = exports.load(tmp_path / "out"), load_model(folder).dequantize(torch.float32)
    assert torch.allclose(read.get_submodule(Q).weight, wanted.get_submodule(Q).weight, rtol=0, atol=1e-8)


def test_files_of_the_tokenizer_go_along(tmp_path):
    folder = quantized_folder(tmp_path / "q", bits=4, group_size=32)
    (folder / "additional_chat_templates").mkdir()
    kept = ("chat_template.jinja", "additional_chat_templates/tools.jinja", "preprocessor_config.json")
    for name in kept:
        (folder / name).write_text("{}")
    (folder / "requant.json").write_text("{}")
    qtr.export(folder, "mlx", tmp_path / "out")
    assert all((tmp_path / "out" / name).is_file() for name in (*kept, "tokenizer.json", "generation_config.json"))
    assert not (tmp_path / "out" / "requant.json").exists() and not (tmp_path / "out" / "README.md").exists()


def test_a_model_in_memory_is_exported_as_its_folder_is(tmp_path):
    model = qtr.quantize(wide_model(), bits=4, group_size=64)
    checkpoint.save(model, tmp_path / "q", tokenizer=byte_tokenizer())
    a, b = qtr.export(model, "mlx", tmp_path / "a"), qtr.export(tmp_path / "q", "mlx", tmp_path / "b")
    assert a == b
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()
    assert {p.name for p in (tmp_path / "b").iterdir()} - {p.name for p in (tmp_path / "a").iterdir()} == {
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_a_model_that_was_never_saved_names_its_class(tmp_path):
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**WIDE)).bfloat16()
    assert model.config.architectures is None
    qtr.export(qtr.quantize(model, bits=4, group_size=32), "mlx", tmp_path / "out")
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text())
    assert (config["architectures"], config["dtype"]) == (["LlamaForCausalLM"], "bfloat16")
    assert type(exports.load(tmp_path / "out")) is transformers.LlamaForCausalLM
    path.write_text(json.dumps(config | {"architectures": ["Unknown"]}))
    with pytest.raises(
        InvalidArgumentError, match=r"architectures in .*config.json must name a class of transf.*Unknown"
    ):
        exports.load(tmp_path / "out")


def test_weights_outside_the_model_are_carried_along(tmp_path):
    """Layers for multi-token prediction, which transformers ignores."""
    wide_model("llama").save_pretrained(tmp_path / "source")
    path = tmp_path / "source" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_nextn_predict_layers": 1}))
    extra = {"model.layers.1.eh_proj.weight": torch.randn(4, 4)}
    file = tmp_path / "source" / "model.safetensors"
    save_file(load_file(file) | extra, file, {"format": "pt"})
    checkpoint.save(qtr.quantize(load_model(tmp_path / "source"), bits=4, group_size=32), tmp_path / "q")
    qtr.export(tmp_path / "q", "mlx", tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(tensors["model.layers.1.eh_proj.weight"], extra["model.layers.1.eh_proj.weight"])
    assert not exports.verify(tmp_path / "out", tmp_path / "source").failures


def test_the_configuration_has_the_names_that_other_engines_read(tmp_path):
    folder = quantized_folder(tmp_path / "q", "qwen3-moe", bits=4, group_size=32)
    path = folder / "config.json"
    rope = {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e4, "partial_rotary_factor": 1.0}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rope_parameters": rope}))
    qtr.export(folder, "mlx", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_experts"] == config["num_local_experts"] == 3
    assert (config["rope_theta"], config["partial_rotary_factor"]) == (5e4, 1.0)
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}
    assert exports.load(tmp_path / "out").config.rope_parameters["rope_theta"] == 5e4


# --- what targets cannot hold


REFUSED = [
    ("mlx", PlanEntry(4, 64, outlier_fraction=0.01), "outliers; quantize it as b4g64 with outlier_fraction 0"),
    ("mlx", PlanEntry(4, 64, method="nf4"), r"a codebook \(b4g64 nf4\); quantize it as b4g64 with rtn, mse or gptq"),
    ("mlx", PlanEntry(4, 16), "needs whole groups of 32, 64 or 128, but it has b4g16; quantize it as b4g32"),
    ("mlx", PlanEntry(4, 48), "needs whole groups of 32, 64 or 128, but it has b4g48; quantize it as b4g32"),
    ("compressed-tensors", PlanEntry(1, 32), "holds 2 to 8 bits, but it has b1g32; quantize it as b2g32"),
    ("compressed-tensors", PlanEntry(4, 24, sym=True), "needs groups that divide the 64 columns, .* as b4g64"),
    ("compressed-tensors", PlanEntry(4, 64), 'whole numbers; quantize it with zero="integer", or symm.* allow_refit'),
]


@pytest.mark.parametrize(("target", "entry", "reason"), REFUSED)
def test_what_a_target_cannot_hold_is_refused_by_name(target, entry, reason, tmp_path, capsys):
    folder = of_entry(tmp_path / "q", PlanEntry(4, 32, sym=True), others={Q: entry})
    with pytest.raises(InvalidArgumentError, match=rf"\[export\] {Q}: {target} .*{reason}"):
        qtr.export(folder, target, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))
    assert main(["export", str(folder), "--to", target, "-o", str(tmp_path / "out")]) == 1
    assert f"quantrature: error: [export] {Q}: {target}" in capsys.readouterr().err


def test_settings_that_no_quantized_folder_here_has_are_refused():
    trellis = Setting((64, 64), 2, -1, kind="trellis", form="b2L16 3inst")
    assert "cannot hold trellis codes (b2L16 3inst); quantize it as b2g64" in TARGETS["mlx"].fit(trellis).reason
    narrow = Setting((64, 48), 4, 16, form="b4g16")
    assert "needs columns that are a multiple of 32, but it has 48" in TARGETS["mlx"].fit(narrow).reason
    table = Setting((64, 64), 8, 64, sym=True, embedding=True)
    assert "keep it unquantized" in TARGETS["compressed-tensors"].fit(table).reason


def test_a_scale_that_is_not_folded_is_refused():
    q = qtr.ops.quantize(torch.randn(8, 64), 4, 32)
    matrix = QuantizedMatrix(q, input_scale=torch.ones(64))
    setting = Setting.of(MatrixSpec.of(matrix), matrix)
    assert "an input_scale that is not folded; quantize it as b4g32" in TARGETS["mlx"].fit(setting).reason


def test_the_experts_of_a_layer_must_be_alike(tmp_path):
    names = [linear.name for linear in find_linears(wide_model("qwen3-moe"))]
    expert = "model.layers.0.mlp.experts.down_proj.1"
    plan = Plan({**Plan.uniform(names, PlanEntry(4, 32)).entries, expert: PlanEntry(3, 32)})
    folder = quantized_folder(tmp_path / "q", "qwen3-moe", plan=plan)
    with pytest.raises(InvalidArgumentError, match=r"experts\.1\.down_proj must have the same .*experts\.0\.down_proj"):
        qtr.export(folder, "mlx", tmp_path / "out")
    plan = Plan({**plan.entries, expert: PlanEntry(16)})
    folder = quantized_folder(tmp_path / "q2", "qwen3-moe", plan=plan)
    with pytest.raises(InvalidArgumentError, match=r"experts\.down_proj must have all experts quantized.* 2 of 3"):
        qtr.export(folder, "mlx", tmp_path / "out")


@pytest.mark.parametrize(("name", "what"), [("gpt2", "is a Conv1D"), ("gpt-oss", "not a matrix of its own")])
def test_matrices_that_checkpoints_store_otherwise_are_refused(name, what, tmp_path):
    folder = quantized_folder(tmp_path / "q", name, bits=4, group_size=32)
    with pytest.raises(InvalidArgumentError, match=what):
        qtr.export(folder, "mlx", tmp_path / "out")


def test_matrices_that_vllm_fuses_are_named_if_they_differ(tmp_path, caplog):
    folder = of_entry(tmp_path / "q", PlanEntry(4, 32, sym=True), others={Q: PlanEntry(3, 32, sym=True)})
    qtr.export(folder, "compressed-tensors", tmp_path / "out")
    assert f"{Q}, model.layers.0.self_attn.k_proj" in caplog.text and "vLLM fuses them" in caplog.text


# --- refits


def test_a_refit_reports_what_it_adds_and_uses_the_original_weights(tmp_path):
    model = wide_model()
    model.save_pretrained(tmp_path / "source")
    original = model.get_submodule(Q).weight.detach().clone()
    folder = of_entry(tmp_path / "q", PlanEntry(3, 32))
    quantized = load_model(folder).get_submodule(Q).dequantize()
    errors = {}
    for name, source in {"alone": None, "with source": tmp_path / "source"}.items():
        found = qtr.export(folder, "compressed-tensors", tmp_path / name, allow_refit=True, source=source)
        assert found.count("refit") == len(found.matrices) == len(found.inexact) == 7
        weight = exports.load(tmp_path / name).get_submodule(Q).weight.detach()
        errors[name] = float((weight - original).square().sum() / original.square().sum())
        before = float((quantized - original).square().sum() / original.square().sum())
        reported = next(matrix.error for matrix in found.matrices if matrix.name == Q)
        added = (
            errors[name] - before if source else float((weight - quantized).square().sum() / quantized.square().sum())
        )
        assert reported == pytest.approx(added, rel=1e-3)
    assert errors["with source"] < errors["alone"]


def test_the_source_must_have_the_matrices(tmp_path):
    folder = of_entry(tmp_path / "q", PlanEntry(3, 32))
    wide_model("qwen3-moe").save_pretrained(tmp_path / "other")
    with pytest.raises(
        InvalidArgumentError, match=r"source must have model.layers.0.mlp.gate_proj of shape \(128, 64\)"
    ):
        qtr.export(folder, "compressed-tensors", tmp_path / "out", allow_refit=True, source=tmp_path / "other")


def test_rounding_beyond_float16_needs_the_word(tmp_path, monkeypatch):
    folder = of_entry(tmp_path / "q", PlanEntry(4, 32))
    encode = TARGETS["mlx"].encode

    def coarse(grid, setting):
        found = dict(encode(grid, setting))
        return found | {"scales": found["scales"].bfloat16().float()}

    monkeypatch.setitem(TARGETS, "mlx", replace(TARGETS["mlx"], encode=coarse))
    with pytest.raises(InvalidArgumentError, match="loses .* of its squared norm, because mlx rounds .* 7 matrices"):
        qtr.export(folder, "mlx", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert qtr.export(folder, "mlx", tmp_path / "out", allow_refit=True).count("rounded") == 7


# --- arguments and files


def test_arguments_are_checked_before_anything_is_written(tmp_path):
    folder = quantized_folder(tmp_path / "q", bits=4, group_size=32)
    with pytest.raises(InvalidArgumentError, match="to must be one of mlx.*: got 'mxl'; did you mean 'mlx'"):
        qtr.export(folder, "mxl", tmp_path / "out")
    with pytest.raises(InvalidArgumentError, match="exists and is not empty"):
        qtr.export(tmp_path / "none", "mlx", folder)
    wide_model().save_pretrained(tmp_path / "dense")
    for given in (tmp_path / "dense", tmp_path / "none", "some/model"):
        with pytest.raises(InvalidArgumentError, match="model must be a folder that quantrature wrote"):
            qtr.export(given, "mlx", tmp_path / "out")
    with pytest.raises(InvalidArgumentError, match="must have quantized matrices: got a dense model"):
        qtr.export(wide_model(), "mlx", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "q"]


def test_an_error_leaves_no_folder(tmp_path, monkeypatch):
    folder = quantized_folder(tmp_path / "q", bits=4, group_size=32)

    def failing(*_):
        raise OSError("no")

    monkeypatch.setattr("quantrature.exports.safetensors_folder.shutil.copyfile", failing)
    with pytest.raises(OSError, match="no"):
        qtr.export(folder, "mlx", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["q"]


def test_large_models_are_written_in_shards(tmp_path, monkeypatch):
    folder = quantized_folder(tmp_path / "q", bits=4, group_size=32)
    monkeypatch.setattr("quantrature.exports.safetensors_folder.MAX_SHARD_SIZE", "20KB")
    check_exact(folder, "mlx", tmp_path / "out")
    assert len(list((tmp_path / "out").glob("model-0*.safetensors"))) > 3


# --- reading back


@pytest.fixture(params=sorted(TARGETS))
def exported(request, tmp_path):
    """A source, a quantized and an exported folder."""
    if request.param == "gguf":
        pytest.importorskip("gguf")
    wide_model(dtype=torch.bfloat16).save_pretrained(tmp_path / "source")
    byte_tokenizer().save_pretrained(tmp_path / "source")
    model = qtr.quantize(load_model(tmp_path / "source"), bits=4, group_size=32, sym=True)
    checkpoint.save(model, tmp_path / "q", tokenizer=byte_tokenizer())
    qtr.export(tmp_path / "q", request.param, tmp_path / "out")
    return tmp_path


def run(*arguments):
    return main([str(argument) for argument in arguments])


def test_eval_and_verify_take_exported_folders(exported, capsys):
    (exported / "text.txt").write_text("It was the best of times, it was the worst of times. " * 9)
    how = ("--text", exported / "text.txt", "--seqlen", 32, "--json", "--reference", exported / "q")
    assert run("eval", exported / "out", *how) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["kld_max"] == pytest.approx(0, abs=1e-5) and found["same_top1"] == 1
    for source, worst in {"source": 0.2, "q": 0.0}.items():
        assert run("verify", exported / "out", "--source", exported / source, "--json") == 0
        found = json.loads(capsys.readouterr().out)
        assert found["ok"] and len(found["modules"]) == 7
        assert max(m["relative_error"] for m in found["modules"].values()) <= worst
    assert run("verify", exported / "out", "--source", exported / "q") == 0
    assert f"{Q}" in capsys.readouterr().out
    assert run("eval", exported / "out", *how, "--device-map", "cpu") == 1
    assert "--device-map cannot be used with an exported folder" in capsys.readouterr().err


@pytest.mark.parametrize("exported", IN_SAFETENSORS, indirect=True)
def test_verify_finds_what_differs(exported, capsys):
    path = exported / "out" / "model.safetensors"
    tensors = load_file(path)
    scale = next(name for name in tensors if name.startswith(f"{Q}.") and name.endswith(("scales", "weight_scale")))
    wrong = tensors | {scale: torch.full_like(tensors[scale], math.nan)}
    wrong["model.norm.weight"] = tensors["model.norm.weight"] + 1
    del wrong["lm_head.weight"]
    save_file(wrong, path)
    config = exported / "out" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"rms_norm_eps": 0.1}))
    found = exports.verify(exported / "out", exported / "source")
    assert set(found.failures) == {Q, "model.norm.weight", "lm_head.weight", "config.json: rms_norm_eps"}
    assert run("verify", exported / "out", "--source", exported / "source") == 1
    assert "was not made from" in capsys.readouterr().err
    wide_model("qwen3-moe").save_pretrained(exported / "other")
    with pytest.raises(QuantratureError, match=r"mlp.down_proj, of shape .* no such matrix"):
        exports.verify(exported / "out", exported / "other")


def test_folded_scales_are_in_the_original_weights_of_a_refit(tmp_path):
    source = wide_model()
    with torch.no_grad():
        source.model.layers[0].input_layernorm.weight[:4] *= 50  # channels that awq scales
    source.save_pretrained(tmp_path / "source")
    windows = torch.randint(0, 256, (6, 24), generator=torch.Generator().manual_seed(0))
    model = qtr.quantize(
        load_model(tmp_path / "source"), bits=6, group_size=32, method="awq", calibration=windows, batch_size=6
    )
    fold = next(fold for fold in folds_of(model) if Q in fold.consumers)
    assert fold.scale.max() > 1.5 * fold.scale.min()
    qtr.export(model, "compressed-tensors", tmp_path / "out", allow_refit=True, source=tmp_path / "source")
    quantized, written = model.get_submodule(Q).dequantize(), exports.load(tmp_path / "out").get_submodule(Q).weight
    assert (written.detach() - quantized).norm() < 0.05 * quantized.norm()
    assert f"{fold.producer}.weight" in exports.verify(tmp_path / "out", tmp_path / "source").changed


@pytest.mark.parametrize("exported", IN_SAFETENSORS, indirect=True)
def test_damaged_folders_are_named(exported):
    path = exported / "out" / "model.safetensors"
    tensors = load_file(path)
    scale = next(name for name in tensors if name.endswith(("q_proj.weight_scale", "q_proj.biases")))
    save_file({name: tensor for name, tensor in tensors.items() if name != scale}, path)
    with pytest.raises(QuantratureError, match=rf"out is damaged, or not of the target .*: it lacks '{scale}'"):
        exports.load(exported / "out")
    save_file(tensors | {scale: torch.ones(3, 5)}, path)
    with pytest.raises(QuantratureError, match="out is damaged"):
        exports.load(exported / "out")
    save_file(tensors, path)
    config = exported / "out" / "config.json"
    about = json.loads(config.read_text())
    if "quantization" in about:
        about["quantization"][Q]["bits"] = 5
    else:
        about["quantization_config"]["config_groups"]["group_0"]["targets"].remove(f"re:^{re.escape(Q)}$")
    config.write_text(json.dumps(about))
    with pytest.raises(QuantratureError, match=f"has no group for the quantized matrix {Q}|codes of 5 bits for 64 col"):
        exports.load(exported / "out")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(QuantratureError, match="truncated or corrupted"):
        exports.load(exported / "out")
    with pytest.raises(InvalidArgumentError, match="folder must be one that quantrature export wrote, for mlx"):
        exports.load(exported / "source")
    assert exports.target_of(exported / "source") is None and exports.target_of("some/model") is None


def test_the_verb_prints_what_is_not_exact(tmp_path, capsys):
    folder = of_entry(tmp_path / "q", PlanEntry(4, 32, sym=True), others={Q: PlanEntry(4, 32)})
    arguments = ("export", folder, "--to", "compressed-tensors", "--allow-refit", "-o")
    assert run(*arguments, tmp_path / "a") == 0
    said = capsys.readouterr().out
    assert "7: 6 exact, 1 refit" in said and f"{Q}" in said and "refit, relative squared error +" in said
    assert run(*arguments, tmp_path / "b", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["matrices"][Q]["result"] == "refit" and found["bytes"] == sum(
        matrix["nbytes"] for matrix in found["matrices"].values()
    )
