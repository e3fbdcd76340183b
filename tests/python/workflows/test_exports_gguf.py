"""The export target gguf: files hold the quantized values bit for bit; what llama.cpp does not have is refused."""

import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

import quantrature as qtr
from quantrature import InvalidArgumentError, Plan, PlanEntry, QuantratureError, checkpoint, exports
from quantrature.cli import main
from quantrature.exports import TARGETS, Setting
from quantrature.exports.gguf_file import ARCHITECTURES, Architecture
from quantrature.exports.gguf_tokenizer import SPLITS, GgufTokenizer
from quantrature.models import find_linears, load_model
from quantrature.ops import GGUF_TYPES
from quantrature.packed.gguf import bits_of
from tiny_models import VOCABULARY, byte_tokenizer

gguf = pytest.importorskip("gguf")

ROWS = VOCABULARY + 6  # some models have more rows than tokens, and Qwen2 adds a token to every tokenizer
WIDE = {"vocab_size": ROWS, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "head_dim": 64}
WIDE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": None}
CONFIGS = {
    "llama": ("LlamaConfig", {**WIDE, "attention_bias": True}),
    "llama-tied": ("LlamaConfig", {**WIDE, "tie_word_embeddings": True}),
    "mistral": ("MistralConfig", {**WIDE, "sliding_window": None}),
    "qwen2": ("Qwen2Config", WIDE),
    "qwen3": ("Qwen3Config", WIDE),
    "gemma3": ("Gemma3TextConfig", {**WIDE, "query_pre_attn_scalar": 64, "sliding_window": 32}),
    "gpt-neox": ("GPTNeoXConfig", {"vocab_size": ROWS, "hidden_size": 64, "num_hidden_layers": 1}),
}
Q = "model.layers.0.self_attn.q_proj"
GRIDS = [
    *(PlanEntry(bits, group_size, sym=True) for bits in (4, 5, 8) for group_size in (32, 64, -1)),
    *(PlanEntry(bits, group_size) for bits in (4, 5) for group_size in (32, 96)),
]
BLOCKS = [PlanEntry(bits_of(name), 32, method="gguf", options={"type": name}) for name in GGUF_TYPES]


def model_of(name="llama", dtype=torch.bfloat16, **more):
    torch.manual_seed(0)
    kind, settings = CONFIGS[name]
    config = getattr(transformers, kind)(**{**settings, **more})
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.to(dtype).eval()


def quantized(folder, entries, name="llama", others=None, dtype=torch.bfloat16, tokenizer=None, **more):
    """Write a model whose matrices get the entries in turn, but for some others; returns the folder."""
    model = model_of(name, dtype, **more)
    linears = [linear.name for linear in find_linears(model)]
    plan = {linear: entries[i % len(entries)] for i, linear in enumerate(linears)} | (others or {})
    windows = torch.randint(0, 256, (4, 32), generator=torch.Generator().manual_seed(0))
    calibrated = any(entry.method == "gguf" for entry in plan.values())
    qtr.quantize(model, plan=Plan(plan), calibration=windows if calibrated else None)
    checkpoint.save(model, folder, tokenizer=tokenizer or byte_tokenizer())
    return folder


def weights_of(model):
    return {name: tensor for name, tensor in model.state_dict().items() if name not in model.all_tied_weights_keys}


def check_kept(folder, out, dtype=torch.bfloat16):
    """Export, and compare every tensor that is read back with the quantized model; returns the result."""
    found = qtr.export(folder, "gguf", out)
    rounded = {f"{matrix.name}.weight" for matrix in found.matrices if matrix.result == "rounded"}
    wanted, read = weights_of(load_model(folder).dequantize(torch.float32)), weights_of(exports.load(out))
    assert set(read) == set(wanted)
    for name, tensor in wanted.items():
        if name in rounded:
            assert torch.allclose(read[name], tensor, rtol=0, atol=2.0**-11 * float(tensor.abs().max())), name
        else:
            assert torch.equal(read[name], tensor), name
    for matrix in found.matrices:
        assert TARGETS["gguf"].nbytes(matrix.setting) == matrix.nbytes, matrix
    assert not exports.verify(out, folder).failures
    return found


# --- values


def test_every_type_and_every_grid_in_one_file(tmp_path):
    folder = quantized(tmp_path / "q", [*BLOCKS, *GRIDS[:3]], others={"model.embed_tokens": PlanEntry(8, 64, sym=True)})
    found = check_kept(folder, tmp_path / "out")
    assert {matrix.result for matrix in found.matrices} == {"exact"} and len(found.matrices) == 15
    assert {matrix.setting.form for matrix in found.matrices} == set(GGUF_TYPES)
    stored = {t.name: t for t in gguf.GGUFReader(tmp_path / "out" / "model.gguf").tensors}
    assert stored["token_embd.weight"].tensor_type.name == "Q8_0"
    assert stored["output.weight"].tensor_type.name == "BF16"
    assert stored["blk.0.attn_norm.weight"].tensor_type.name == stored["blk.0.attn_q.bias"].tensor_type.name == "F32"
    quantized_model = load_model(folder)
    for matrix in found.matrices:
        layer = quantized_model.get_submodule(matrix.name)
        theirs = stored[ARCHITECTURES["llama"].to_gguf(f"{matrix.name}.weight")]
        values = torch.from_numpy(gguf.dequantize(theirs.data, theirs.tensor_type))
        wanted = layer.dequantize()
        if matrix.name.endswith(("q_proj", "k_proj")):
            heads = 4 if matrix.name.endswith("q_proj") else 2
            wanted = wanted.view(heads, 2, 32, 256).transpose(1, 2).reshape(wanted.shape)
        assert torch.equal(values, wanted.float()), matrix.name
        if matrix.setting.kind == "gguf" and not matrix.name.endswith(("q_proj", "k_proj")):
            assert np.array_equal(theirs.data, layer.matrix.dense.data.numpy())


@pytest.mark.parametrize("name", ["llama-tied", "mistral", "qwen2", "qwen3", "gemma3"])
def test_architectures_and_grids(name, tmp_path):
    folder = quantized(tmp_path / "q", GRIDS, name)
    found = check_kept(folder, tmp_path / "out")
    results = {(matrix.setting.form, matrix.result) for matrix in found.matrices}
    assert {
        ("Q4_0", "exact"),
        ("Q5_0", "exact"),
        ("Q8_0", "exact"),
        ("Q4_1", "rounded"),
        ("Q5_1", "rounded"),
    } == results
    assert all(0 < matrix.error < 1e-6 for matrix in found.inexact)
    reader = gguf.GGUFReader(tmp_path / "out" / "model.gguf")
    assert ("output.weight" in {t.name for t in reader.tensors}) == (name not in ("llama-tied", "gemma3"))
    # transformers does not read the head dimension of Qwen3 from the file.
    given = {"config": transformers.AutoConfig.from_pretrained(tmp_path / "out")} if name == "qwen3" else {}
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", gguf_file="model.gguf", dtype=torch.float32, **given
    )
    ours = exports.load(tmp_path / "out")
    for key, tensor in weights_of(ours).items():
        assert torch.equal(theirs.state_dict()[key], tensor), key


def test_an_embedding_beside_blocks_is_held(tmp_path):
    model = model_of("llama-tied")
    windows = torch.randint(0, 256, (4, 32), generator=torch.Generator().manual_seed(0))
    qtr.quantize(model, bits=4, method="gguf", embedding_bits=8, calibration=windows)
    checkpoint.save(model, tmp_path / "q", tokenizer=byte_tokenizer())
    found = check_kept(tmp_path / "q", tmp_path / "out")
    forms = {matrix.name: (matrix.setting.form, matrix.result) for matrix in found.matrices}
    assert forms.pop("model.embed_tokens") == ("Q8_0", "exact") and set(forms.values()) == {("Q4_K", "exact")}


@pytest.mark.parametrize(
    ("values", "type"),
    [("bfloat16", "BF16"), ("float16", "F16"), ("float32", "F32")],
)
def test_dense_matrices_keep_their_values(values, type, tmp_path):
    model = model_of(dtype=getattr(torch, values)).float()
    qtr.quantize(model, bits=4, group_size=32, sym=True)
    checkpoint.save(model, tmp_path / "q", tokenizer=byte_tokenizer())
    check_kept(tmp_path / "q", tmp_path / "out")
    (table,) = [t for t in gguf.GGUFReader(tmp_path / "out" / "model.gguf").tensors if t.name == "token_embd.weight"]
    assert table.tensor_type.name == type


def test_names_are_those_of_llama_cpp():
    for kind, about in ARCHITECTURES.items():
        arch = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}[about.name]
        theirs = gguf.get_tensor_name_map(arch, 3)
        for ours in ("model.embed_tokens", "model.norm", "lm_head", *(f"model.layers.2.{n}" for n in about.in_block)):
            assert about.to_gguf(f"{ours}.weight") == f"{theirs.get_name(ours)}.weight", (kind, ours)
            assert about.from_gguf(about.to_gguf(f"{ours}.bias")) == f"{ours}.bias"


def test_rows_of_heads():
    about = Architecture("llama", {}, halves=True)
    assert about.order("blk.0.attn_k.weight", 8, 4, 2).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert about.order("blk.0.attn_q.weight", 8, 1, 2).tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    assert (
        about.order("blk.0.attn_v.weight", 8, 4, 2) is None and about.order("blk.0.attn_q_norm.weight", 8, 4, 2) is None
    )


# --- metadata


def metadata(out):
    reader = gguf.GGUFReader(out / "model.gguf")
    return {name: field.contents() for name, field in reader.fields.items()}


def test_metadata_describes_the_model(tmp_path):
    folder = quantized(
        tmp_path / "q", [BLOCKS[0]], "qwen3", rope_parameters={"rope_type": "default", "rope_theta": 5e4}
    )
    qtr.export(folder, "gguf", tmp_path / "out")
    found = metadata(tmp_path / "out")
    wanted = {
        **{"general.architecture": "qwen3", "general.file_type": 2, "general.quantization_version": 2},
        **{"qwen3.context_length": 64, "qwen3.embedding_length": 256, "qwen3.block_count": 2},
        **{"qwen3.feed_forward_length": 512, "qwen3.attention.head_count": 4, "qwen3.attention.head_count_kv": 2},
        **{"qwen3.attention.key_length": 64, "qwen3.attention.value_length": 64, "qwen3.rope.freq_base": 5e4},
        **{"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.add_bos_token": False},
        **{"tokenizer.ggml.bos_token_id": 256, "tokenizer.ggml.eos_token_id": 257},
    }
    assert {key: found.get(key) for key in wanted} == wanted
    assert len(found["tokenizer.ggml.tokens"]) == ROWS and found["tokenizer.ggml.tokens"][256] == "<s>"
    assert found["tokenizer.ggml.token_type"][255:] == [1, 3, 3, 5, 5, 5, 5, 5, 5]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        *("config.json", "generation_config.json", "model.gguf", "tokenizer.json", "tokenizer_config.json")
    ]


def test_scaled_rotary_embeddings(tmp_path):
    llama3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    folder = quantized(tmp_path / "q", GRIDS[:1], rope_parameters=llama3 | {"original_max_position_embeddings": 32})
    check_kept(folder, tmp_path / "out")
    (factors,) = [t for t in gguf.GGUFReader(tmp_path / "out" / "model.gguf").tensors if t.name == "rope_freqs.weight"]
    plain = 1e4 ** -(np.arange(0, 64, 2) / 64)
    scaled = load_model(folder).model.rotary_emb.inv_freq.numpy()
    assert np.allclose(plain / factors.data, scaled, rtol=1e-5) and factors.data.max() == 8
    linear = quantized(
        tmp_path / "l", GRIDS[:1], rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
    )
    qtr.export(linear, "gguf", tmp_path / "linear")
    found = metadata(tmp_path / "linear")
    assert (found["llama.rope.scaling.type"], found["llama.rope.scaling.factor"]) == ("linear", 4.0)


# --- tokenizers


def bytewise(split, normalizer=None, **more):
    """Return a tokenizer of bytes with two merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {c: i for i, c in enumerate(alphabet)} | {"th": 256, "the": 257}
    tokenizer = Tokenizer(models.BPE(vocab, [("t", "h"), ("th", "e")], **more))
    tokenizer.pre_tokenizer, tokenizer.decoder = split, decoders.ByteLevel()
    if normalizer:
        tokenizer.normalizer = normalizer
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


def by_pattern(pattern):
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False)
SCHEMES = {
    "gpt-2": (BYTES, None),
    "smollm": (pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), BYTES]), None),
    **{name: (by_pattern(pattern), normalizers.NFC()) for pattern, name in SPLITS.items()},
}


@pytest.mark.parametrize("name", SCHEMES)
def test_schemes_of_bytes(name):
    found = GgufTokenizer.of(bytewise(*SCHEMES[name]), 264)
    assert (found.model, found.pre, found.merges, found.ids) == ("gpt2", name, ["t h", "th e"], {"eos": 258})
    assert found.tokens[255:] == ["\u0143", "th", "the", "</s>", *(f"[PAD{i}]" for i in range(259, 264))]
    assert found.types[255:] == [1, 1, 1, 3, 5, 5, 5, 5, 5]
    assert not found.add_bos and not found.scores and found.chat_template is None


def in_characters(normalizer, split=None):
    """Return a tokenizer of characters with bytes to fall back to, as Gemma and Llama 2 have them."""
    vocab = {"<unk>": 0, "<s>": 1, **{f"<0x{i:02X}>": i + 2 for i in range(256)}}
    for text in ("\u2581", "t", "h", "e", "th", "the", "\u2581the", "\u2581\u2581"):
        vocab[text] = len(vocab)
    merges = [("t", "h"), ("th", "e"), ("\u2581", "the")]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizer
    if split:
        tokenizer.pre_tokenizer = split
    tokenizer.add_tokens(["\u2581\u2581"])
    found = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>")
    found.chat_template = {"default": "a", "tools": "b"}
    return found


REPLACE = normalizers.Replace(" ", "\u2581")


@pytest.mark.parametrize(
    ("normalizer", "prefixed"),
    [(REPLACE, False), (normalizers.Sequence([normalizers.Prepend("\u2581"), REPLACE]), True)],
)
def test_merges_by_scores(normalizer, prefixed):
    found = GgufTokenizer.of(in_characters(normalizer), 266)
    assert (found.model, found.pre, found.add_space_prefix) == ("llama", "default", prefixed)
    assert found.tokens[258:] == ["\u2581", "t", "h", "e", "th", "the", "\u2581the", "  "]
    assert list(found.scores[258:]) == [0, 0, 0, 0, 0, -1, -2, 0] and found.types[:3] == [2, 3, 6]
    assert found.types[258:] == [1, 1, 1, 1, 1, 1, 1, 4] and not found.merges
    assert found.chat_template == [{"name": "default", "template": "a"}, {"name": "tools", "template": "b"}]


UNKNOWN = {
    "the normalizer Lowercase": bytewise(BYTES, normalizers.Lowercase()),
    "the pre-tokenizer .*Whitespace": bytewise(pre_tokenizers.Whitespace()),
    r"the pre-tokenizer .*\\\\S\+": bytewise(by_pattern(r"\S+")),
    "ignore_merges": bytewise(BYTES, ignore_merges=True),
    "the normalizer .*Strip": in_characters(normalizers.Strip()),
    "the pre-tokenizer .*Digits": in_characters(REPLACE, pre_tokenizers.Digits()),
    "spaces that are not replaced": in_characters(normalizers.Sequence([])),
    "the model WordLevel": transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    ),
}


@pytest.mark.parametrize("what", UNKNOWN)
def test_tokenizers_that_llama_cpp_does_not_have(what):
    with pytest.raises(InvalidArgumentError, match=rf"\[export\] gguf knows no tokenizer with .*{what}"):
        GgufTokenizer.of(UNKNOWN[what], 300)


def test_a_tokenizer_must_fit_the_model():
    with pytest.raises(InvalidArgumentError, match="must have at most 200 tokens, as the model: got token 258"):
        GgufTokenizer.of(bytewise(BYTES), 200)


# --- what is refused


REFUSED = [
    (PlanEntry(3, 32), r"holds grids of 4, 5 and 8 bits with sym.* has b3g32; quantize it with the method gguf"),
    (PlanEntry(8, 32), "holds grids of 4, 5 and 8 bits with sym, 4 and 5 bits without, but it has b8g32"),
    (PlanEntry(4, 48, sym=True), "needs groups that are multiples of 32, but it has b4g48 sym"),
    (PlanEntry(4, 32, sym=True, scale_dtype="bfloat16"), "needs float16 scales; .*scale_dtype float16"),
    (PlanEntry(4, 64, outlier_fraction=0.01), r"cannot hold \d+ outliers; quantize it with the method gguf"),
    (PlanEntry(4, 64, method="nf4"), r"cannot hold a codebook \(b4g64 nf4\); quantize it with the method gguf"),
]


@pytest.mark.parametrize(("entry", "reason"), REFUSED)
def test_settings_without_a_type_are_refused_by_name(entry, reason, tmp_path, capsys):
    folder = quantized(tmp_path / "q", GRIDS[:1], others={Q: entry})
    with pytest.raises(InvalidArgumentError, match=rf"\[export\] {Q}: gguf {reason}"):
        qtr.export(folder, "gguf", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["q"]
    assert main(["export", str(folder), "--to", "gguf", "-o", str(tmp_path / "out")]) == 1
    assert f"quantrature: error: [export] {Q}: gguf" in capsys.readouterr().err


def test_other_settings_are_refused():
    fit = TARGETS["gguf"].fit
    assert "cannot hold trellis codes" in fit(Setting((64, 64), 2, -1, kind="trellis", form="b2L16")).reason
    table = Setting((64, 64), 8, 64, embedding=True, form="b8g64")
    assert fit(table).reason.endswith("but it has b8g64; quantize it with 8 bits, sym")
    for target in ("mlx", "compressed-tensors"):
        reason = TARGETS[target].fit(Setting((64, 256), 4, -1, kind="gguf", form="Q4_K")).reason
        assert f"{target} cannot hold blocks of a GGUF type (Q4_K); quantize it as b4g64 with rtn" in reason


MODELS = {
    "knows the architectures llama, .*: got gpt_neox": ("gpt-neox", {}),
    "knows the rope_type default.*: got dynamic": (
        "llama",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
    ),
    "needs hidden_act silu for llama: got gelu": ("llama", {"hidden_act": "gelu"}),
    "use_sliding_window must be false": ("qwen2", {"use_sliding_window": True, "sliding_window": 16}),
    "needs query_pre_attn_scalar 64 for gemma3_text, as in llama.cpp: got 256": (
        "gemma3",
        {"query_pre_attn_scalar": 256},
    ),
    "needs layer_types .* got .*full_attention": ("gemma3", {"layer_types": ["full_attention"] * 2}),
}


@pytest.mark.parametrize("what", MODELS)
def test_models_that_llama_cpp_does_not_have(what, tmp_path):
    name, more = MODELS[what]
    folder = quantized(tmp_path / "q", GRIDS[:1], name, **more)
    with pytest.raises(InvalidArgumentError, match=what):
        qtr.export(folder, "gguf", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["q"]


def test_the_tokenizer_is_checked_before_anything_is_written(tmp_path, monkeypatch):
    folder = quantized(tmp_path / "q", GRIDS[:1], tokenizer=bytewise(pre_tokenizers.Whitespace()))
    monkeypatch.setitem(TARGETS, "gguf", replace(TARGETS["gguf"], encode=None, write=None))
    with pytest.raises(InvalidArgumentError, match="knows no tokenizer with the pre-tokenizer"):
        qtr.export(folder, "gguf", tmp_path / "out")
    with pytest.raises(InvalidArgumentError, match=r"model must be a folder with tokenizer\.json"):
        qtr.export(load_model(folder), "gguf", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["q"]


def test_a_tensor_without_a_place_is_named():
    with pytest.raises(InvalidArgumentError, match=r"no place for model\.layers\.0\.extra\.weight in .* llama"):
        ARCHITECTURES["llama"].to_gguf("model.layers.0.extra.weight")
    with pytest.raises(QuantratureError, match=r"tensor blk\.0\.ssm_a\.weight is unknown"):
        ARCHITECTURES["llama"].from_gguf("blk.0.ssm_a.weight")


def test_the_package_gguf_is_named_if_it_is_missing(tmp_path, monkeypatch):
    folder = quantized(tmp_path / "q", GRIDS[:1])
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(InvalidArgumentError, match=r"pip install 'quantrature\[gguf\]'"):
        qtr.export(folder, "gguf", tmp_path / "out")


def test_an_error_leaves_no_folder(tmp_path, monkeypatch):
    folder = quantized(tmp_path / "q", GRIDS[:1])
    monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        qtr.export(folder, "gguf", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["q"]


# --- reading back


def test_verify_finds_what_differs(tmp_path):
    model_of().save_pretrained(tmp_path / "source")
    folder = quantized(tmp_path / "q", BLOCKS[6:])
    qtr.export(folder, "gguf", tmp_path / "out")
    assert not exports.verify(tmp_path / "out", tmp_path / "source").failures
    path = tmp_path / "out" / "model.gguf"
    stored = {t.name: (t.data_offset, t.n_bytes) for t in gguf.GGUFReader(path).tensors}
    content = bytearray(path.read_bytes())
    for name in ("output_norm.weight", "blk.0.attn_q.weight"):
        offset, size = stored[name]
        content[offset : offset + size] = bytes(size)
    path.write_bytes(content)
    config = tmp_path / "out" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"rms_norm_eps": 0.1}))
    found = exports.verify(tmp_path / "out", tmp_path / "source")
    assert set(found.failures) == {Q, "model.norm.weight", "config.json: rms_norm_eps"}


def test_damaged_files_are_named(tmp_path):
    folder = quantized(tmp_path / "q", GRIDS[:1])
    qtr.export(folder, "gguf", tmp_path / "out")
    path = tmp_path / "out" / "model.gguf"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(QuantratureError, match="out is damaged, or not of the target gguf"):
        exports.load(tmp_path / "out")
    path.write_bytes(content.replace(b"general.architecture", b"general.architecturE", 1))
    with pytest.raises(QuantratureError, match=r"out is damaged.*: it lacks 'general\.architecture'"):
        exports.load(tmp_path / "out")
    writer = gguf.GGUFWriter(path, "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(QuantratureError, match="is of the architecture mamba, which is not known"):
        exports.load(tmp_path / "out")
