"""What is said of models that are not quantized, and of those that are where a dense one is wanted."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM

import quantrature as qtr
from quantrature import InvalidArgumentError, QuantratureError, analysis, checkpoint
from quantrature.allocation import activation_sensitivity, allocate
from quantrature.allocation.validation import measured_loss_changes
from quantrature.cli import main
from quantrature.models import find_linears, load_model
from quantrature.quantization.dense_folder import describe_dense
from tiny_models import byte_tokenizer, tiny_model

TOKENS = torch.arange(32).view(2, 16)


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense") / "quantized"
    checkpoint.save(qtr.quantize(tiny_model("llama"), bits=4, group_size=16), folder, tokenizer=byte_tokenizer())
    (folder.parent / "text.txt").write_text("It was the best of times, it was the worst of times. " * 9)
    return folder


# Quantized where dense is wanted


@pytest.mark.parametrize(
    "use",
    [
        lambda model: analysis.analyze(model, TOKENS, metrics=["kurtosis"]),
        lambda model: allocate(model, strategy="uniform", avg_bits=4),
        lambda model: activation_sensitivity(model, TOKENS),
        lambda model: measured_loss_changes(model, TOKENS, []),
        find_linears,
    ],
)
@pytest.mark.parametrize("loaded", [False, True])
def test_a_quantized_model_says_so(use, loaded, quantized):
    model = load_model(quantized) if loaded else qtr.quantize(tiny_model("llama"), bits=4, group_size=16)
    with pytest.raises(
        InvalidArgumentError, match=r"the model is quantized already \(model\.layers\.0\.\S+\): give the or"
    ):
        use(model)


@pytest.mark.parametrize(
    "arguments",
    [
        ("analyze", "OUT", "--calibration", "TEXT", "--json"),
        ("analyze", "OUT", "--calibration", "TEXT", "--dry-run"),
        ("plan", "OUT", "--strategy", "uniform", "--avg-bits", "4"),
        ("plan", "OUT", "--strategy", "pqi", "--avg-bits", "4", "--calibration", "TEXT"),
    ],
)
def test_verbs_that_need_a_dense_model_name_the_folder(arguments, quantized, capfd):
    names = {"OUT": str(quantized), "TEXT": str(quantized.parent / "text.txt")}
    assert main([names.get(argument, argument) for argument in arguments]) == 1
    said = capfd.readouterr().err
    assert f"{quantized} is quantized already, by quantrature: give the original model instead" in said


# Counting


@pytest.mark.parametrize("layout", ["llama", "llama-tied", "gpt2", "mixtral", "bert"])
def test_quantized_weights_count_as_parameters(layout, tmp_path):
    model = tiny_model(layout)
    embedding_bits = None if layout == "gpt2" else 8
    wanted = [model.num_parameters(exclude_embeddings=exclude) for exclude in (False, True)]
    inner = model.base_model.num_parameters()
    qtr.quantize(model, bits=3, group_size=16, outlier_fraction=0.02, embedding_bits=embedding_bits)
    model.save_pretrained(tmp_path)
    torch.save(model, tmp_path / "whole.pt")
    again = torch.load(tmp_path / "whole.pt", weights_only=False)
    for each in (model, type(model).from_pretrained(tmp_path), copy.deepcopy(model), again):
        assert [each.num_parameters(exclude_embeddings=exclude) for exclude in (False, True)] == wanted
        assert each.base_model.num_parameters() == inner
    if layout != "bert":  # which gets a pooler without one in the folder
        assert AutoModel.from_pretrained(tmp_path).num_parameters() == inner
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert model.num_parameters(only_trainable=True) == trainable < wanted[0]
    model.dequantize()
    assert model.num_parameters() == wanted[0]


# Describing


@pytest.mark.parametrize("layout", ["llama", "llama-tied", "mixtral", "gpt2", "t5"])
def test_a_dense_folder_is_described(layout, tmp_path, capfd):
    model = tiny_model(layout).bfloat16()
    model.save_pretrained(tmp_path / "model", max_shard_size="40KB")
    found = describe_dense(tmp_path / "model")
    assert found.model_class == type(model).__name__
    tensors = {}
    for path in (tmp_path / "model").glob("*.safetensors"):
        tensors |= load_file(path)
    assert found.parameters == sum(tensor.numel() for tensor in tensors.values())
    assert found.bytes == sum(tensor.nbytes for tensor in tensors.values()) == 2 * found.parameters
    assert found.dtypes == {"BF16": found.parameters}
    assert found.blocks == (4 if layout == "t5" else 2)
    assert main(["inspect", str(tmp_path / "model"), "--json"]) == 0
    said = json.loads(capfd.readouterr().out)
    assert (said["quantized"], said["parameters"], said["quantized_bytes"]) == (
        False,
        found.parameters,
        found.quantized_bytes,
    )
    assert main(["inspect", str(tmp_path / "model")]) == 0
    out = " ".join(capfd.readouterr().out.split())
    assert f"{found.matrices} matrices, {found.matrix_parameters:,} weights" in out
    # What it says of 4 bits is what comes out.
    checkpoint.save(qtr.quantize(load_model(tmp_path / "model"), bits=4), tmp_path / "out")
    contents = checkpoint.inspect(tmp_path / "out")
    assert found.matrices == len(contents.modules)
    assert found.quantized_bytes == contents.bytes + contents.other_bytes


def test_dtypes_that_are_mixed_are_counted(tmp_path):
    model = tiny_model("llama").bfloat16()
    model.model.norm.float()
    model.save_pretrained(tmp_path)
    assert describe_dense(tmp_path).dtypes["F32"] == 32


def test_what_cannot_be_described_is_said(quantized, tmp_path, capfd):
    tiny_model("llama").save_pretrained(tmp_path / "a")
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    other = {**config, "quantization_config": {"quant_method": "gptq", "bits": 4}}
    (tmp_path / "a" / "config.json").write_text(json.dumps(other))
    with pytest.raises(InvalidArgumentError, match="holds a model quantized by gptq: inspect reads dense models and"):
        describe_dense(tmp_path / "a")
    (tmp_path / "a" / "config.json").write_text(json.dumps(config))
    path = tmp_path / "a" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(QuantratureError, match="model.safetensors is truncated or corrupted"):
        describe_dense(tmp_path / "a")
    path.rename(tmp_path / "a" / "pytorch_model.bin")
    with pytest.raises(InvalidArgumentError, match="pytorch_model.bin has no header that says what is in it"):
        describe_dense(tmp_path / "a")
    assert main(["inspect", str(quantized), "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["quantized"] is True


def test_nothing_of_the_weights_is_read(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    before = describe_dense(tmp_path)
    path = tmp_path / "model.safetensors"
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    path.write_bytes(whole[:header] + b"\xff" * (len(whole) - header))  # NaN everywhere
    assert describe_dense(tmp_path) == before
    with pytest.raises(InvalidArgumentError, match="must hold finite numbers"):
        qtr.quantize(AutoModelForCausalLM.from_pretrained(tmp_path), bits=4)
