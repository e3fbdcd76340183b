import json
import re
import shutil

import pytest
import torch
from transformers.utils import logging as transformers_logging

from config_file import edit_config
from own_code import OWN_CASES, own_code
from quantrature import InvalidArgumentError, QuantratureError
from quantrature.allocation.sources import Source
from quantrature.cli import main
from quantrature.evaluate import perplexity
from quantrature.models import find_linears, load_model, load_tokenizer
from quantrature.models.loading import quiet
from tiny_models import CONFIGS, byte_tokenizer, tiny_model


@pytest.fixture
def folder(tiny_llama, tmp_path):
    """A copy to spoil."""
    return shutil.copytree(tiny_llama, tmp_path / "copy")


def test_a_folder_loads_in_its_own_dtype_or_another(tiny_llama, folder):
    loaded = load_model(tiny_llama)
    assert type(loaded).__name__ == "LlamaForCausalLM"
    assert not loaded.training
    for name, parameter in tiny_model("llama").named_parameters():
        assert torch.equal(parameter, loaded.get_parameter(name))
    edit_config(folder, dtype="bfloat16")
    assert load_model(str(folder)).dtype == torch.bfloat16
    assert load_model(folder, dtype="float32").dtype == torch.float32
    assert load_model(folder, dtype=torch.float16).dtype == torch.float16


@pytest.mark.parametrize("name", CONFIGS)
def test_the_class_is_the_one_that_was_saved(name, tmp_path):
    model = tiny_model(name)
    model.save_pretrained(tmp_path)
    assert type(load_model(tmp_path)) is type(model)


def test_shards_load(tmp_path):
    model = tiny_model("llama")
    model.save_pretrained(tmp_path, max_shard_size="20kB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 1
    assert torch.equal(load_model(tmp_path).lm_head.weight, model.lm_head.weight)
    shards[1].unlink()
    with pytest.raises(QuantratureError, match=f"names a shard that is missing: {shards[1].name}"):
        load_model(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(QuantratureError, match=r"index.json is not a valid index of shards"):
        load_model(tmp_path)


def test_loading_says_nothing_and_leaves_the_settings_alone(tiny_llama, capfd):
    before = transformers_logging.get_verbosity()
    load_model(tiny_llama)
    load_tokenizer(tiny_llama)
    assert capfd.readouterr() == ("", "")
    assert transformers_logging.get_verbosity() == before
    marker = lambda bar, args, kwargs: bar(*args, **kwargs)  # noqa: E731
    previous = transformers_logging.set_tqdm_hook(marker)
    with pytest.raises(ZeroDivisionError), quiet():
        raise ZeroDivisionError
    assert transformers_logging.set_tqdm_hook(previous) is marker
    assert transformers_logging.get_verbosity() == before


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("/nowhere/model", r"there is no such folder: /nowhere/model"),
        ("../no/where", r"there is no such folder: \.\./no/where"),
        ("a/b/c", r"there is no such folder: a/b/c"),
    ],
)
@pytest.mark.parametrize("load", [load_model, load_tokenizer])
def test_a_missing_folder_is_named(load, name, message):
    with pytest.raises(InvalidArgumentError, match=message):
        load(name)


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
def test_a_hub_id_without_a_network_is_named(load):
    with pytest.raises(QuantratureError, match=r"cannot load .*nobody/nothing.*the Hugging Face Hub cannot be reached"):
        load("nobody/nothing")


OTHERS = {
    "gguf": ({"model-q4.gguf": "GGUF"}, r"a model in GGUF, the format of llama.cpp \(model-q4.gguf\)\. Give the model"),
    "gguf with a configuration": (
        {"x.gguf": "GGUF", "config.json": '{"model_type": "llama"}'},
        "it is a model in GGUF",
    ),
    "adapter": (
        {"adapter_config.json": '{"base_model_name_or_path": "org/base"}', "adapter_model.safetensors": ""},
        r"an adapter \(PEFT, such as LoRA\) of org/base, not a model\. Merge it first",
    ),
    "adapter of nothing": ({"adapter_config.json": "[]"}, r"an adapter \(PEFT, such as LoRA\), not a model"),
    "diffusers": ({"model_index.json": "{}"}, "a pipeline of diffusers, not a language model"),
    "of its authors": ({"consolidated.00.pth": "", "params.json": "{}"}, "a model in the format of its authors"),
    "onnx": ({"model.onnx": ""}, "a model in ONNX, which transformers does not load"),
    "checkpoints": (
        {"checkpoint-10/config.json": "{}", "checkpoint-20/config.json": "{}"},
        r"a folder of models, not a model: give one of the folders inside it \(checkpoint-10, checkpoint-20\)",
    ),
    "analysis": ({"sensitivity.json": "{}"}, "an analysis that quantrature made, not a model"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_a_folder_of_something_else_says_what_it_is(case, tmp_path, capfd):
    files, message = OTHERS[case]
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    with pytest.raises(QuantratureError, match=message):
        load_model(tmp_path)
    if "config.json" not in files:
        with pytest.raises(QuantratureError, match=message):
            load_tokenizer(tmp_path)
    text = tmp_path / "text.txt"
    text.write_text("It was the best of times.")
    windows = ["--calibration", str(text), "--json"]
    verbs = [
        ["inspect"],
        ["analyze", *windows],
        ["quantize", "--bits", "4", "--dry-run"],
        ["eval", "--text", str(text)],
    ]
    if case == "gguf with a configuration":
        del verbs[1], verbs[-1]  # they look for the tokenizer first, which it lacks as well
    for verb, *options in verbs:
        assert main([verb, str(tmp_path), *options]) == 1
        assert re.search(message, capfd.readouterr().err), verb


def test_a_file_of_llama_cpp_says_what_it_is(tmp_path):
    (tmp_path / "model.gguf").write_text("GGUF")
    for load in (load_model, load_tokenizer):
        with pytest.raises(InvalidArgumentError, match=r"model.gguf is a model in GGUF.* gguf_file=\"model.gguf\""):
            load(tmp_path / "model.gguf")


def test_a_file_is_no_model(tiny_llama):
    with pytest.raises(InvalidArgumentError, match=r"got the file .*config.json"):
        load_model(tiny_llama / "config.json")


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn", torch.int32, None, 16])
def test_a_dtype_must_be_one_to_run_in(tiny_llama, dtype):
    with pytest.raises(InvalidArgumentError, match=f"dtype must be one of auto, float32.*got dtype={dtype}"):
        load_model(tiny_llama, dtype=dtype)


def test_a_folder_without_its_configuration_is_named(folder):
    (folder / "config.json").write_text("{")
    with pytest.raises(InvalidArgumentError, match=f"{folder}/config.json is not valid JSON"):
        load_model(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(InvalidArgumentError, match=f"{folder}/config.json must have a model_type"):
        load_model(folder)
    (folder / "config.json").unlink()
    with pytest.raises(InvalidArgumentError, match=f"{folder} is not a model: it has no config.json"):
        load_model(folder)


def test_an_unknown_model_type_is_named(folder):
    edit_config(folder, model_type="nonsense")
    with pytest.raises(InvalidArgumentError, match=r"config.json must have a model_type .* got model_type=nonsense$"):
        load_model(folder)
    edit_config(folder, auto_map={"AutoConfig": "x.Y", "AutoModelForCausalLM": "x.Z"})
    with pytest.raises(InvalidArgumentError, match=r"got model_type=nonsense; it has code of its own"):
        load_model(folder)
    with pytest.raises(QuantratureError, match=r"cannot load .*x\.py"):
        load_model(folder, trust_remote_code=True)


# Code that comes with a model


@pytest.mark.parametrize("case", OWN_CASES)
def test_trusted_code_is_what_loads(case, tmp_path, caplog):
    auto_map, changes = OWN_CASES[case]
    folder = own_code(tmp_path / "own", auto_map, **changes)
    loaded = load_model(folder, trust_remote_code=True)
    assert type(loaded).__name__ in auto_map.values()
    assert type(loaded).__module__.startswith("transformers_modules.")
    assert not caplog.records
    names = {matrix.name for matrix in Source.of(folder, trust_remote_code=True).matrices}
    assert ("model.layers.0.mlp.extra_proj" in names) == ("AutoModel" not in auto_map)
    assert len(names) == len(find_linears(loaded))
    assert perplexity(loaded, torch.arange(64).view(4, 16)).tokens == 60  # its forward says what it takes by **kwargs


@pytest.mark.parametrize("case", list(OWN_CASES)[:4])
def test_code_that_is_not_trusted_is_named_and_the_class_of_transformers_loads(case, tmp_path, caplog):
    auto_map, changes = OWN_CASES[case]
    folder = own_code(tmp_path / "own", auto_map, **changes)
    assert type(load_model(folder)) is type(tiny_model("llama"))
    said = [record.getMessage() for record in caplog.records]
    assert f"{folder} has Python code of its own (modeling_own.py)" in said[0]
    assert "LlamaForCausalLM of transformers is loaded" in said[0] and "set trust_remote_code" in said[0]
    caplog.clear()
    assert len(Source.of(folder).matrices) == 14
    assert [record.getMessage() for record in caplog.records] == said[:1]


def test_code_of_an_unknown_type_is_refused_without_trust(tmp_path):
    auto_map, changes = OWN_CASES["with a configuration of an unknown type"]
    folder = own_code(tmp_path / "own", auto_map, **changes)
    with pytest.raises(InvalidArgumentError, match="it has code of its own: pass trust_remote_code=True"):
        load_model(folder)


def test_code_for_another_task_does_not_stand_in_for_the_named_class(tmp_path):
    folder = own_code(tmp_path / "own", {"AutoModelForSequenceClassification": "OwnModel"})
    assert type(load_model(folder, trust_remote_code=True)) is type(tiny_model("llama"))


@pytest.mark.parametrize(
    ("auto_map", "message"),
    [
        ("modeling_own.LlamaForCausalLM", r"auto_map must name Python classes by auto class: got 'modeling_own"),
        ({"AutoModelForCausalLM": 3}, r"auto_map must name Python classes by auto class: got .*3"),
        ({"AutoModelForMagic": "modeling_own.OwnModel"}, r"auto_map must name an auto class .* got AutoModelForMagic"),
    ],
)
def test_an_impossible_auto_map_is_named(tmp_path, auto_map, message):
    folder = own_code(tmp_path / "own", {})
    edit_config(folder, auto_map=auto_map, architectures=["Own"])
    with pytest.raises(InvalidArgumentError, match=message):
        load_model(folder, trust_remote_code=True)


def test_verbs_run_the_code_that_is_trusted(tmp_path, capfd):
    folder = own_code(tmp_path / "own", *OWN_CASES["of a known name"][:1])
    (tmp_path / "text.txt").write_text("It was the best of times, it was the worst of times. " * 9)
    text, windows = str(tmp_path / "text.txt"), ("--nsamples", "2", "--seqlen", "16")

    def run(verb, *arguments):
        status = main([*verb.split(), *map(str, arguments), "--trust-remote-code", "--json"])
        out, err = capfd.readouterr()
        assert status == 0, err
        return json.loads(out)

    ours = (folder, "--bits", 4, "--group-size", 16)
    assert run("quantize", *ours, "-o", tmp_path / "out")["modules"] == 15
    assert "modeling_own.LlamaForCausalLM" in (tmp_path / "out" / "config.json").read_text()
    assert (tmp_path / "out" / "modeling_own.py").is_file()
    assert len(run("verify", tmp_path / "out", "--source", folder)["modules"]) == 15
    assert "model.layers.0.mlp.extra_proj" in run("plan", folder, "--strategy", "uniform", "--avg-bits", 5)["entries"]
    analysis = run("analyze", folder, "--calibration", text, "--metrics", "kurtosis", *windows)
    assert len(analysis["modules"]) == 15
    again = ("--source", folder, "--calibration", text, "--significant-fraction", 0.01, "-o", tmp_path / "re", *windows)
    run("requant", tmp_path / "out", *again, "--dtype", "float32")
    assert type(load_model(tmp_path / "re", trust_remote_code=True)).__module__.startswith("transformers_modules.")
    perplexity = [
        run("eval", place, "--text", text, "--seqlen", 16)["perplexity"] for place in (folder, tmp_path / "re")
    ]
    assert perplexity[0] == pytest.approx(perplexity[1], rel=0.2)


def test_an_impossible_configuration_is_named(folder):
    edit_config(folder, num_attention_heads=5)
    with pytest.raises(QuantratureError, match=r"cannot load .*The hidden size \(32\) is not a multiple"):
        load_model(folder)


def test_an_unknown_quantization_method_never_runs(folder):
    edit_config(folder, quantization_config={"quant_method": "nonsense"})
    with pytest.raises(InvalidArgumentError, match=r"quant_method that is installed: got quant_method=nonsense"):
        load_model(folder)


@pytest.mark.parametrize("keep", [0, 5, 60, -1])
def test_a_truncated_file_is_named(folder, keep):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(QuantratureError, match=f"{path} is truncated or corrupted"):
        load_model(folder)


def test_a_corrupted_header_is_named(folder):
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[20:30] = b"\xff" * 10
    path.write_bytes(content)
    with pytest.raises(QuantratureError, match=f"{path} is truncated or corrupted"):
        load_model(folder)
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(QuantratureError, match="it is a Git LFS pointer"):
        load_model(folder)
    path.unlink()
    with pytest.raises(InvalidArgumentError, match=f"{folder} has no weights"):
        load_model(folder)


def test_no_weight_is_ever_random(folder):
    edit_config(folder, num_hidden_layers=3)
    with pytest.raises(QuantratureError, match=r"no values for tensors of the model: model.layers.2.*and 6 more"):
        load_model(folder)
    edit_config(folder, num_hidden_layers=2, intermediate_size=40)
    with pytest.raises(
        QuantratureError, match=r"other shapes of the model: .*down_proj.weight \(\(32, 48\) instead of"
    ):
        load_model(folder)


def test_tensors_without_a_use_are_reported(folder, caplog):
    edit_config(folder, num_hidden_layers=1)
    load_model(folder)
    assert "tensors that the model does not use: model.layers.1.input_layernorm.weight" in caplog.text


def test_a_tokenizer_loads_or_the_folder_is_named(folder):
    assert load_tokenizer(folder)("hé").input_ids == byte_tokenizer()("hé").input_ids
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(QuantratureError, match=f"cannot load the tokenizer of {folder}"):
        load_tokenizer(folder)
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(QuantratureError, match=f"the tokenizer of {folder}: it has no tokenizer"):
        load_tokenizer(folder)
