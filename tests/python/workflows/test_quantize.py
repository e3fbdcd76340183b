"""Quantizing a model in place, saving it, and loading it through transformers."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import quantrature as qtr
from fresh_python import run_python
from quantrature import InvalidArgumentError, Plan, PlanEntry, QuantratureError, checkpoint, models
from quantrature.checkpoint.verify import verify
from quantrature.files.new_folder import new_folder
from quantrature.nn import QuantLinear, quantized_layers
from tiny_models import byte_tokenizer, tiny_config, tiny_model

TOKENS = torch.arange(2 * 24).view(2, 24)
LAYOUTS = [
    *(
        "llama",
        "llama-tied",
        "mistral",
        "qwen2",
        "qwen3",
        "gemma",
        "gemma2",
        "phi",
        "opt",
        "gpt2",
        "gpt-neox",
        "falcon",
    ),
    *("mixtral", "qwen2-moe", "gpt-oss", "bert"),
]


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    """A folder with a model at mixed settings, with outliers, and its source beside it."""
    root = tmp_path_factory.mktemp("quantized")
    model = tiny_model("llama")
    model.save_pretrained(root / "source")
    byte_tokenizer().save_pretrained(root / "source")
    names = [linear.name for linear in models.find_linears(model)]
    plan = Plan(
        {
            name: PlanEntry(
                2 + i % 4, [16, -1][i % 2], outlier_fraction=[0.0, 0.02][i % 3 == 0], predicted_loss_change=0.001
            )
            for i, name in enumerate(names)
        }
    )
    qtr.quantize(model, plan=plan)
    checkpoint.save(model, root / "out", tokenizer=byte_tokenizer(), plan=plan, source="tiny/llama")
    return root


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_survives_the_way_through_a_folder(layout, tmp_path):
    model = tiny_model(layout)
    kind = type(model)
    before = logits(model)
    linears = models.find_linears(model)
    model.save_pretrained(tmp_path / "dense")
    returned = qtr.quantize(model, bits=4, group_size=16, outlier_fraction=0.01)
    assert returned is model
    assert set(quantized_layers(model)) == {linear.name for linear in linears}
    after = logits(model)
    assert not torch.equal(after, before)
    assert torch.nn.functional.cosine_similarity(after.flatten(), before.flatten(), dim=0) > 0.9
    model.save_pretrained(tmp_path / "out")
    loaded = kind.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(loaded), after)
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(kind.from_pretrained(tmp_path / "again")), after)

    wish = qtr.QuantratureConfig(bits=4, group_size=16, outlier_fraction=0.01)
    assert torch.equal(logits(kind.from_pretrained(tmp_path / "dense", quantization_config=wish)), after)

    # What the quantized weights are, times the inputs: by torch alone, in a plain model that any reader loads.
    model.dequantize()
    assert not quantized_layers(model)
    assert torch.allclose(logits(model), after, rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path / "plain")
    assert set(load_file(tmp_path / "plain" / "model.safetensors")) == set(
        load_file(tmp_path / "dense" / "model.safetensors")
    )
    assert torch.equal(logits(kind.from_pretrained(tmp_path / "plain")), logits(model))


@pytest.mark.parametrize("layout", ["llama", "gpt2"])
def test_a_layer_computes_what_its_dequantized_weight_does(layout):
    model = tiny_model(layout)
    sources = {linear.name: linear.weight.clone() for linear in models.find_linears(model)}
    qtr.quantize(model, bits=8, group_size=-1)
    for name, layer in quantized_layers(model).items():
        weight = layer.dequantize()
        step = (sources[name].amax(1) - sources[name].amin(1)) / 255  # rounding: half of it, and the float16 zero
        assert ((weight - sources[name]).abs() <= 0.6 * step[:, None] + 1e-3 * sources[name].abs()).all()
        x = torch.randn(3, layer.in_features)
        assert torch.allclose(layer(x), torch.nn.functional.linear(x, weight, layer.bias), rtol=1e-5, atol=1e-6)


def test_outliers_are_kept_to_the_bit():
    model = tiny_model("llama")
    source = {linear.name: linear.weight.clone() for linear in models.find_linears(model)}
    qtr.quantize(model, bits=2, group_size=16, outlier_fraction=0.05)
    for name, layer in quantized_layers(model).items():
        weight, original = layer.dequantize(), source[name]
        largest = original.abs().flatten().topk(round(0.05 * original.numel())).indices
        assert torch.equal(weight.flatten()[largest], original.flatten()[largest])


def test_bias_and_everything_else_stay(tmp_path):
    model = tiny_model("qwen2")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    qtr.quantize(model, bits=3, group_size=16)
    kept = [name for name in model.state_dict() if name in before and not name.endswith("proj.weight")]
    assert any(name.endswith("q_proj.bias") for name in kept)
    for name in kept:
        assert torch.equal(model.state_dict()[name], before[name])


def test_casts_leave_the_storage_alone():
    model = qtr.quantize(tiny_model("qwen2"), bits=3, group_size=16, outlier_fraction=0.01)
    layer = model.model.layers[0].self_attn.q_proj
    stored = {name: tensor.clone() for name, tensor in layer.stored().items()}
    layer.to(torch.bfloat16)
    assert layer.bias.dtype == torch.bfloat16
    for name, tensor in layer.stored().items():
        assert tensor.dtype == stored[name].dtype
        assert torch.equal(tensor, stored[name])
    assert layer(torch.randn(2, layer.in_features, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_a_checkpoint_loads_in_another_dtype(quantized):
    half = AutoModelForCausalLM.from_pretrained(quantized / "out", dtype=torch.bfloat16)
    full = AutoModelForCausalLM.from_pretrained(quantized / "out")
    assert half.model.layers[0].mlp.up_proj.scale.dtype == torch.float16
    assert logits(half).dtype == torch.bfloat16
    assert torch.allclose(logits(half).float(), logits(full), atol=0.05)


def test_dequantize_gives_a_dense_model(quantized, tmp_path):
    expected = logits(AutoModelForCausalLM.from_pretrained(quantized / "out"))
    with pytest.warns(UserWarning, match="loading attributes"):
        dense = AutoModelForCausalLM.from_pretrained(
            quantized / "out", quantization_config=qtr.QuantratureConfig(dequantize=True)
        )
    assert type(dense.model.layers[0].mlp.up_proj) is torch.nn.Linear
    assert torch.allclose(logits(dense), expected, atol=1e-5)  # packed products add in another order
    dense.save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "dense")), logits(dense))


@pytest.mark.parametrize("layout", ["llama", "gpt2"])
def test_a_model_dequantizes_itself(layout):
    model = qtr.quantize(tiny_model(layout), bits=4, group_size=16)
    expected = logits(model)
    model.dequantize()
    assert not quantized_layers(model)
    assert torch.allclose(logits(model), expected, atol=1e-6)


def test_transformers_quantizes_while_loading(quantized, tmp_path):
    wish = qtr.QuantratureConfig(bits=3, group_size=16)
    loaded = AutoModelForCausalLM.from_pretrained(quantized / "source", quantization_config=wish)
    expected = qtr.quantize(tiny_model("llama"), bits=3, group_size=16)
    assert torch.equal(logits(loaded), logits(expected))
    loaded.save_pretrained(tmp_path / "out")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(expected))


def test_transformers_quantizes_by_a_plan(quantized):
    plan = json.loads((quantized / "out" / "plan.json").read_text())
    loaded = AutoModelForCausalLM.from_pretrained(
        quantized / "source", quantization_config=qtr.QuantratureConfig(plan=plan)
    )
    assert torch.equal(logits(loaded), logits(AutoModelForCausalLM.from_pretrained(quantized / "out")))


def test_device_maps_and_generation(quantized):
    loaded = AutoModelForCausalLM.from_pretrained(quantized / "out", device_map="auto")
    expected = AutoModelForCausalLM.from_pretrained(quantized / "out")
    assert torch.equal(logits(loaded), logits(expected))
    assert loaded.generate(TOKENS, max_new_tokens=3, do_sample=False).shape == (2, 27)


ENDS = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")
PLACES = {
    "disk": dict.fromkeys(ENDS, "cpu") | {"model.layers": "disk"},
    "cpu and disk": dict.fromkeys(ENDS, "cpu") | {"model.layers.0": "cpu", "model.layers.1": "disk"},
    "cpu": {"": "cpu"},
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("shards", [1, 4])
def test_weights_may_stay_on_disk(place, shards, tmp_path):
    model = qtr.quantize(tiny_model("llama"), bits=4, group_size=16, outlier_fraction=0.01)
    checkpoint.save(model, tmp_path / "out", max_shard_size="5GB" if shards == 1 else "40KB")
    assert (len(list((tmp_path / "out").glob("*.safetensors"))) > 1) == (shards > 1)
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", device_map=PLACES[place], offload_folder=tmp_path / "offload", offload_buffers=True
    )
    last = quantized_layers(loaded)["model.layers.1.mlp.down_proj"]
    assert last.weight.is_meta == ("disk" in place)
    assert torch.equal(logits(loaded), logits(model))
    assert last.weight.is_meta == ("disk" in place)
    ids = loaded.generate(TOKENS, max_new_tokens=3, do_sample=False)
    assert torch.equal(ids, model.generate(TOKENS, max_new_tokens=3, do_sample=False))


def test_automatic_maps_count_quantized_sizes(tmp_path):
    """Given room for the quantized model, though not for a dense one, all of it is put there."""
    model = qtr.quantize(tiny_model("llama"), bits=2, group_size=16)
    checkpoint.save(model, tmp_path / "out")
    size = sum(t.nbytes for t in model.state_dict().values())
    assert size < 0.7 * sum(t.nbytes for t in tiny_model("llama").state_dict().values())
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", device_map="auto", max_memory={"cpu": int(1.25 * size)}
    )
    assert not any(tensor.is_meta for tensor in loaded.state_dict().values())
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("wish", [None, {"bits": 3, "group_size": 16, "outlier_fraction": 0.01}])
@pytest.mark.parametrize("layout", ["llama-tied", "mixtral"])
def test_no_tensor_is_read_twice(wish, layout, tmp_path, monkeypatch):
    model = tiny_model(layout)
    (model if wish else qtr.quantize(model, bits=3, group_size=16, outlier_fraction=0.01)).save_pretrained(
        tmp_path / "model"
    )
    reads = count_reads(monkeypatch)
    settings = {"quantization_config": qtr.QuantratureConfig(**wish)} if wish else {}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", **settings)
    assert quantized_layers(loaded)
    assert set(reads) == set(load_file(tmp_path / "model" / "model.safetensors"))
    assert set(reads.values()) == {1}


def count_reads(monkeypatch):
    """How often each tensor of a safetensors file is read from now on, by name."""
    import collections

    import safetensors
    import transformers.modeling_utils

    reads = collections.Counter()

    class Slice:
        def __init__(self, name, inner):
            self.name, self.inner = name, inner

        def __getitem__(self, index):
            reads[self.name] += 1
            return self.inner[index]

        def __getattr__(self, name):
            return getattr(self.inner, name)

    class File:
        def __init__(self, *args, **kwargs):
            self.inner = safetensors.safe_open(*args, **kwargs)

        def __enter__(self):
            return self

        def __exit__(self, *about):
            self.inner.__exit__(*about)

        def get_tensor(self, name):
            reads[name] += 1
            return self.inner.get_tensor(name)

        def get_slice(self, name):
            return Slice(name, self.inner.get_slice(name))

        def __getattr__(self, name):
            return getattr(self.inner, name)

    monkeypatch.setattr(transformers.modeling_utils, "safe_open", File)
    return reads


LOADING = """
import threading, torch, transformers
import quantrature as qtr
torch.set_num_threads(1)

def own():
    return int(next(l for l in open("/proc/self/status") if l.startswith(KIND)).split()[1]) * 1024

def load(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **SETTINGS)

load(SMALL)  # what libraries take once
before, peak, over = own(), 0, threading.Event()

def watch():
    global peak
    while not over.wait(0.001):
        peak = max(peak, own())

thread = threading.Thread(target=watch)
thread.start()
model = load(FOLDER)
over.set()
thread.join()
quantized = sum(t.nbytes for t in model.state_dict().values())
module = max(4 * layer.in_features * layer.out_features for layer in model.modules() if hasattr(layer, "spec"))
print((peak - before - quantized) / module)
"""


@pytest.mark.parametrize("quantized", [False, True])
def test_loading_takes_the_quantized_size_and_one_module(quantized, tmp_path):
    """The dense model would take 40 of its modules of 8 MB."""
    import transformers

    shape = {"num_attention_heads": 8, "vocab_size": 64, "num_hidden_layers": 10, "max_position_embeddings": 64}
    for name, size in (("small", 64), ("large", 1024)):
        config = transformers.LlamaConfig(hidden_size=size, intermediate_size=2 * size, **shape)
        model = AutoModelForCausalLM.from_config(config)
        if quantized:
            qtr.quantize(model, bits=4, group_size=64)
        model.save_pretrained(tmp_path / name)
    wish = "" if quantized else "quantization_config=qtr.QuantratureConfig(bits=4)"
    values = {
        "SETTINGS": f"dict({wish})",
        "SMALL": repr(str(tmp_path / "small")),
        "FOLDER": repr(str(tmp_path / "large")),
        "KIND": repr("VmRSS" if quantized else "RssAnon"),  # pages of the dense file can go at any time
    }
    code = LOADING
    for name, value in values.items():
        code = code.replace(name, value)
    done = run_python(code, QUANTRATURE_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1, done.stdout


def test_an_encoder_with_a_decoder_runs(tmp_path):
    """T5 casts what its layer wo is given to the dtype of its weight, so that one stays as it is."""
    from transformers import AutoModelForSeq2SeqLM

    model = qtr.quantize(tiny_model("t5"), bits=4, group_size=16, outlier_fraction=0.01)
    assert not any(name.endswith(".wo") for name in quantized_layers(model))
    assert any(name.endswith(".wi") for name in quantized_layers(model))
    model.save_pretrained(tmp_path / "out")
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        expected, found = (m(input_ids=TOKENS, decoder_input_ids=TOKENS).logits for m in (model, loaded))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("order", ["quantrature, transformers", "transformers, quantrature"])
def test_the_format_is_known_in_whatever_order(quantized, order):
    done = run_python(
        f"import {order}\n"
        f"m = transformers.AutoModelForCausalLM.from_pretrained({str(quantized / 'out')!r})\n"
        "print(type(m.model.layers[0].mlp.up_proj).__name__)"
    )
    assert done.stdout == "QuantLinear\n", done.stderr


def test_without_quantrature_loading_fails_loudly(quantized):
    done = run_python(
        f"import transformers\ntransformers.AutoModelForCausalLM.from_pretrained({str(quantized / 'out')!r})"
    )
    assert done.returncode != 0
    assert "ignore_mismatched_sizes" in done.stderr


@pytest.fixture
def trusting(tmp_path):
    """Code that opens a folder with code of its own, and where transformers may copy it."""
    text = (
        "import sys, torch, transformers\n"
        "m = transformers.{auto}.from_pretrained({folder!r}, trust_remote_code={trust})\n"
        "print(sum(type(x).__name__ == 'QuantLinear' for x in m.modules()), 'quantrature' in sys.modules)\n"
        "torch.save(m(torch.arange(48).view(2, 24)).logits.detach(), {to!r})\n"
    )

    def run(folder, auto="AutoModelForCausalLM", trust=True):
        to = tmp_path / "logits.pt"
        code = text.format(folder=str(folder), auto=auto, trust=trust, to=str(to))
        return run_python(code, HF_HOME=str(tmp_path / "home")), to

    return run


@pytest.mark.parametrize(
    ("kind", "opened_by"),
    [
        ("T5ForConditionalGeneration", "AutoModelForSeq2SeqLM"),
        ("T5EncoderModel", "AutoModelForTextEncoding"),
        ("LlamaModel", "AutoModel"),
        ("LlamaForSequenceClassification", "AutoModelForSequenceClassification"),
        ("GPT2LMHeadModel", "AutoModelForCausalLM"),
        ("BertForPreTraining", "AutoModelForPreTraining"),
    ],
)
def test_the_model_card_names_the_class_that_opens_the_folder(kind, opened_by, tmp_path):
    config = tiny_config({"T5": "t5", "Ll": "llama", "GP": "gpt2", "Be": "bert"}[kind[:2]])
    model = getattr(transformers, kind)(config)
    checkpoint.save(qtr.quantize(model, bits=4, group_size=16), tmp_path / "out")
    assert f"{opened_by}.from_pretrained" in (tmp_path / "out" / "README.md").read_text()
    opened = getattr(transformers, opened_by).from_pretrained(tmp_path / "out")
    assert (type(opened), len(quantized_layers(opened))) == (type(model), len(quantized_layers(model)))


@pytest.mark.parametrize(("layout", "auto"), [("qwen2", "CausalLM"), ("mixtral", "CausalLM"), ("bert", "MaskedLM")])
def test_a_folder_with_code_of_its_own_needs_no_import(layout, auto, tmp_path, trusting):
    model = qtr.quantize(tiny_model(layout), bits=4, group_size=16, outlier_fraction=0.01)
    checkpoint.save(model, tmp_path / "out", auto_map=True)
    done, to = trusting(tmp_path / "out", f"AutoModelFor{auto}")
    assert done.stdout == f"{len(quantized_layers(model))} True\n", done.stderr
    assert torch.equal(torch.load(to), logits(model))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "trust_remote_code=True" in card
    assert f"import AutoModelFor{auto}\n" in card
    assert f"model = AutoModelFor{auto}.from_pretrained" in card


def test_code_of_its_own_runs_only_where_it_is_trusted(tmp_path, trusting):
    checkpoint.save(qtr.quantize(tiny_model("llama"), bits=4, group_size=16), tmp_path / "out", auto_map=True)
    done, _ = trusting(tmp_path / "out", trust=False)
    assert done.returncode != 0 and not done.stdout
    assert "ignore_mismatched_sizes" in done.stderr
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")  # here, quantrature is imported
    loaded.save_pretrained(tmp_path / "again")
    assert "auto_map" not in json.loads((tmp_path / "again" / "config.json").read_text())


def test_without_the_wish_no_code_is_written(quantized):
    assert not list((quantized / "out").glob("*.py"))
    assert "auto_map" not in json.loads((quantized / "out" / "config.json").read_text())


def test_classes_of_their_own_get_no_code(tmp_path):
    model = tiny_model("llama")
    model.__class__ = type("Mine", (type(model),), {})
    qtr.quantize(model, bits=4, group_size=16)
    with pytest.raises(
        InvalidArgumentError, match=r"\[save\] auto_map must be false for a model with code of its own: got Mine"
    ):
        checkpoint.save(model, tmp_path / "out", auto_map=True)
    assert not (tmp_path / "out").exists()


def test_importing_does_not_import_transformers():
    done = run_python("import quantrature, sys\nprint('transformers' in sys.modules, 'torch' in sys.modules)")
    assert done.stdout == "False False\n", done.stderr


def test_a_folder_says_what_it_holds(quantized):
    contents = checkpoint.inspect(quantized / "out")
    layers = quantized_layers(AutoModelForCausalLM.from_pretrained(quantized / "out"))
    assert set(contents.modules) == set(layers)
    assert contents.bytes == sum(t.numel() * t.element_size() for m in layers.values() for t in m.stored().values())
    weights = sum(layer.out_features * layer.in_features for layer in layers.values())
    assert contents.bits_per_weight == 8 * contents.bytes / weights
    for name, layer in layers.items():
        assert contents.modules[name]["bits"] == layer.spec.dense.bits
        assert contents.modules[name]["bytes"] == layer.matrix.nbytes
    names = {path.name for path in (quantized / "out").iterdir()}
    assert names >= {"config.json", "generation_config.json", "plan.json", "README.md", "tokenizer.json"}
    assert "import quantrature" in (quantized / "out" / "README.md").read_text()
    assert "base_model: tiny/llama" in (quantized / "out" / "README.md").read_text()


def test_a_large_model_is_sharded(tmp_path):
    model = qtr.quantize(tiny_model("llama"), bits=4, group_size=16)
    checkpoint.save(model, tmp_path / "out", max_shard_size="40KB")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(model))
    assert checkpoint.inspect(tmp_path / "out").bytes > 0


# What goes wrong


def copied(folder, tmp_path):
    import shutil

    return shutil.copytree(folder, tmp_path / "copy")


def test_damaged_tensors_are_noticed(quantized, tmp_path):
    folder = copied(quantized / "out", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj"
    tensors[f"{name}.weight"][5] ^= 1
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(QuantratureError, match=rf"{name}: the stored tensors are damaged"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_missing_tensors_are_noticed(quantized, tmp_path):
    folder = copied(quantized / "out", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj"
    del tensors[f"{name}.scale"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(QuantratureError, match=rf"{name}"):
        AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(QuantratureError, match=rf"lacks the tensor {name}.scale"):
        checkpoint.inspect(folder)


def test_a_truncated_file_is_named(quantized, tmp_path):
    folder = copied(quantized / "out", tmp_path)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(QuantratureError, match=r"model.safetensors is truncated or corrupted"):
        models.load_model(folder)
    with pytest.raises(QuantratureError, match=r"model.safetensors is truncated or corrupted"):
        checkpoint.inspect(folder)


def edited(folder, change):
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("field", "value", "complaint"),
    [
        ("bits", 9, "bits of a grid must be 1 to 8"),
        ("group_size", 0, "group_size of a grid must be -1 or at least 1"),
        ("sym", "no", "sym of a grid must be true or false"),
        ("dtype", "int8", "dtype of a grid must be"),
        ("shape", [0, 32], "shape of a grid must be"),
        ("shape", [8], "must be rows and columns"),
        ("shape", [16, 64], "the checkpoint has shape"),
        ("scale", "int8", "scale of a grid must be"),
        ("zero", None, "zero of a grid must be null if and only if sym is true"),
        ("outliers", -1, "outliers of a matrix must be 0 to"),
    ],
)
def test_an_impossible_description_names_its_matrix(quantized, tmp_path, field, value, complaint):
    folder = copied(quantized / "out", tmp_path)
    name = "model.layers.0.mlp.up_proj"
    edited(folder, lambda config: config["modules"][name].update({field: value}))
    with pytest.raises(InvalidArgumentError, match=f"{name}: .*{complaint}"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_field_that_is_missing_is_named(quantized, tmp_path):
    folder = copied(quantized / "out", tmp_path)
    edited(folder, lambda config: config["modules"]["model.layers.0.mlp.up_proj"].pop("bits"))
    with pytest.raises(InvalidArgumentError, match="bits of a grid is missing"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_another_format_version_is_refused(quantized, tmp_path):
    folder = copied(quantized / "out", tmp_path)
    edited(folder, lambda config: config.update(format_version=1))
    with pytest.raises(InvalidArgumentError, match="format_version of the checkpoint is 1"):
        AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(InvalidArgumentError, match="format_version 1"):
        checkpoint.inspect(folder)


def test_other_folders_are_refused(quantized, tmp_path):
    with pytest.raises(InvalidArgumentError, match="holds no model quantized by quantrature"):
        checkpoint.inspect(quantized / "source")
    with pytest.raises(InvalidArgumentError, match=r"cannot read .*config.json"):
        checkpoint.inspect(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named_and_the_model_is_left_alone(value):
    model = tiny_model("llama")
    model.model.layers[1].mlp.down_proj.weight.data[3, 4] = value
    with pytest.raises(InvalidArgumentError, match=r"model.layers.1.mlp.down_proj must hold finite numbers"):
        qtr.quantize(model, bits=4)
    assert not quantized_layers(model)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({}, "either bits or plan"),
        ({"bits": 3, "plan": Plan({"a": PlanEntry(3)})}, "either bits or plan"),
        ({"bits": 0}, "bits must be 1 to 8"),
        ({"bits": 9}, "bits must be 1 to 8"),
        ({"bits": 3, "group_size": 0}, "group_size must be -1 or at least 1"),
        ({"bits": 3, "group_size": -2}, "group_size must be -1 or at least 1"),
        ({"bits": 3, "method": "magic"}, "method must be one of rtn"),
        ({"bits": 3, "outlier_fraction": 2.0}, "outlier_fraction must be a fraction"),
        (
            {"bits": 3, "outliers": 0.01},
            r"\[quantize\] outliers is not an argument, .* did you mean 'outlier_fraction'\?",
        ),
        ({"bits": 3, "state_folder": "x"}, r"did you mean 'resume_folder'\?"),
        ({"bits": 3, "method": "gptq", "damp_precent": 0.1}, r"did you mean 'damp_percent'\?"),
        ({"bits": 3, "method": "hqq", "sym": True}, "method must be rtn or mse when sym"),
        ({"plan": Plan({"nowhere": PlanEntry(3)})}, "entry 'nowhere' is no quantizable matrix"),
        ({"plan": Plan({"a": PlanEntry(3)}), "ignore": "re:x"}, "ignore cannot be combined with a plan"),
        (
            {"plan": Plan({"a": PlanEntry(3)}), "method": "hqq"},
            "method cannot be combined with a plan: .* got method='hqq'",
        ),
        (
            {"plan": Plan({"a": PlanEntry(3)}), "group_size": 32},
            "group_size cannot be combined with a plan: .*group_size=32",
        ),
        (
            {"plan": Plan({"a": PlanEntry(3)}), "outlier_fraction": 0.1},
            "outlier_fraction cannot be combined with a plan",
        ),
    ],
)
def test_bad_arguments(arguments, complaint):
    model = tiny_model("llama")
    with pytest.raises(InvalidArgumentError, match=complaint):
        qtr.quantize(model, **arguments)
    assert not quantized_layers(model)


def test_a_config_refuses_what_it_does_not_know_and_shows_its_settings():
    for name, near in {"nbits": "bits", "outliers": "outlier_fraction", "groupsize": "group_size"}.items():
        with pytest.raises(
            InvalidArgumentError, match=rf"\[QuantratureConfig\] {name} is not a setting; .* '{near}'\?"
        ):
            qtr.QuantratureConfig(**{name: 3})
    assert repr(qtr.QuantratureConfig(bits=4, method="hqq")) == "QuantratureConfig(bits=4, method='hqq')"
    plan = Plan({"a": PlanEntry(3), "b": PlanEntry(4)})
    assert repr(qtr.QuantratureConfig(plan=plan)) == "QuantratureConfig(plan=<2 entries>)"
    config = qtr.quantize(tiny_model("llama"), bits=4, group_size=16).config.quantization_config
    assert repr(config) == "QuantratureConfig(modules=<14 entries>)"
    assert type(config).from_dict(config.to_dict()).modules == config.modules


def test_errors_of_a_dense_model_that_is_quantized_as_it_is_read_name_the_config(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    with pytest.raises(InvalidArgumentError, match=r"\[QuantratureConfig\] bits must be 1 to 8"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=qtr.QuantratureConfig(bits=9))


def test_a_quantized_model_is_not_quantized_again():
    model = qtr.quantize(tiny_model("llama"), bits=4)
    with pytest.raises(InvalidArgumentError, match="must not be quantized already"):
        qtr.quantize(model, bits=3)


def test_float64_is_refused_by_name():
    with pytest.raises(InvalidArgumentError, match=r"layers.0.self_attn.q_proj must be float32, .*: got dtype"):
        qtr.quantize(tiny_model("llama").double(), bits=4)


def test_ignored_and_kept_matrices_stay_dense():
    model = qtr.quantize(tiny_model("llama"), bits=4, ignore="re:.*self_attn")
    assert not any("self_attn" in name for name in quantized_layers(model))
    names = [linear.name for linear in models.find_linears(tiny_model("llama"))]
    plan = Plan.uniform(names, PlanEntry(4)).replace(names[0], bits=16)
    assert set(quantized_layers(qtr.quantize(tiny_model("llama"), plan=plan))) == set(names[1:])


# Writing


def test_an_occupied_folder_is_refused_and_replaced_on_request(tmp_path):
    model = qtr.quantize(tiny_model("llama"), bits=4)
    (tmp_path / "out").mkdir()
    checkpoint.save(model, tmp_path / "out")
    with pytest.raises(InvalidArgumentError, match="exists and is not empty"):
        checkpoint.save(model, tmp_path / "out")
    (tmp_path / "out" / "stray").write_text("old")
    checkpoint.save(model, tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out" / "stray").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidArgumentError, match="is a file"):
        checkpoint.save(model, tmp_path / "file")


@pytest.mark.parametrize("existing", [False, True])
def test_a_failure_while_writing_leaves_nothing_half_written(tmp_path, monkeypatch, existing):
    model = qtr.quantize(tiny_model("llama"), bits=4)
    if existing:
        checkpoint.save(model, tmp_path / "out")
    before = sorted(tmp_path.rglob("*"))

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(byte_tokenizer()), "save_pretrained", full)
    with pytest.raises(QuantratureError, match=r"the disk is full; nothing was written to .*out"):
        checkpoint.save(model, tmp_path / "out", tokenizer=byte_tokenizer(), overwrite=True)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_killed_process_leaves_no_folder_that_looks_whole(tmp_path):
    code = (
        "import os\nfrom quantrature.files.new_folder import new_folder\n"
        f"with new_folder({str(tmp_path / 'out')!r}) as partial:\n"
        "    (partial / 'config.json').write_text('{}')\n"
        "    os._exit(9)"
    )
    assert run_python(code).returncode == 9
    assert not (tmp_path / "out").exists()
    with new_folder(tmp_path / "out") as partial:
        assert not (partial / "config.json").exists()
        (partial / "new").write_text("")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# Comparing with the source


def test_a_folder_fits_its_source(quantized):
    found = verify(quantized / "out", quantized / "source")
    assert found.failures == ()
    assert all(matrix.outliers_equal and 0 < matrix.relative_error < 1 for matrix in found.modules.values())


def test_another_source_is_noticed(quantized, tmp_path):
    other = tiny_model("llama", seed=1)
    other.save_pretrained(tmp_path / "other")
    found = verify(quantized / "out", tmp_path / "other")
    assert set(found.modules) <= set(found.failures)
    assert "lm_head.weight" in found.changed


def test_a_single_changed_outlier_is_noticed(quantized, tmp_path):
    layers = quantized_layers(AutoModelForCausalLM.from_pretrained(quantized / "out"))
    name, layer = next((name, layer) for name, layer in layers.items() if layer.spec.outliers)
    source = AutoModelForCausalLM.from_pretrained(quantized / "source")
    weight = source.get_submodule(name).weight.data
    weight.view(-1)[layer.matrix.outliers.positions()[0]] *= 1.001
    source.save_pretrained(tmp_path / "source")
    assert verify(quantized / "out", tmp_path / "source").failures == (name,)


def test_only_quantized_folders_are_verified(quantized):
    with pytest.raises(QuantratureError, match="holds no quantized matrix"):
        verify(quantized / "source", quantized / "source")


def test_the_hqq_method_is_the_hqq_solver():
    model, source = tiny_model("llama"), tiny_model("llama")
    qtr.quantize(model, bits=4, group_size=16, method="hqq")
    for name, layer in quantized_layers(model).items():
        expected = qtr.ops.quantize(source.get_submodule(name).weight.detach(), 4, 16, solver="hqq-scale-free")
        assert torch.equal(layer.matrix.dense.codes, expected.codes)


def test_the_layer_prints_its_grid():
    layer = next(iter(quantized_layers(qtr.quantize(tiny_model("llama"), bits=4)).values()))
    assert isinstance(layer, QuantLinear)
    assert "grid b4g64, outliers=0" in repr(layer)
