"""Checkpoints that mean harm, by the recipes in hostile/: one clear error each, before a kernel sees them.

A recipe's ``says`` is in the error of both inspect and load, or ``loads`` is in that of load where it is another one.
"""

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import quantrature as qtr
from quantrature import PlanEntry, checkpoint
from quantrature.methods import Statistics, quantize_matrix
from quantrature.models import find_linears
from quantrature.packed import MatrixSpec, digest
from quantrature.quantization import declare
from quantrature.quantization import put as put_layer
from tiny_models import tiny_model

MODULE = "model.layers.0.mlp.up_proj"
"""What recipes spoil that name no other module: a grid with outliers and scales in float16."""

ENTRIES = {
    "model.layers.0.mlp.gate_proj": PlanEntry(2, -1, method="qtip"),
    "model.layers.0.mlp.down_proj": PlanEntry(3, -1, method="squeezellm"),
    "model.layers.0.self_attn.q_proj": PlanEntry(4, 16, method="nf4"),
}
"""Modules of other kinds: a trellis, tables of the rows with scales of the inputs, a known table with groups."""
KERNELS = [
    *("dequantize", "Product", "residuals", "codebook_dequantize"),
    *("trellis_dequantize", "trellis_matvec", "hadamard"),
]
RECIPES = sorted((Path(__file__).parent / "hostile").glob("*.json"))
DESCRIPTIONS = [path for path in RECIPES if path.stem.startswith("description-")]


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A checkpoint with matrices of every kind."""
    model = tiny_model("llama")
    specs = {}
    for linear in find_linears(model):
        entry = ENTRIES.get(linear.name, PlanEntry(3, 16, outlier_fraction=0.05))
        weight = linear.weight.contiguous()
        statistics = Statistics(hessian=torch.eye(linear.in_features), fisher=torch.ones(weight.shape))
        matrix = quantize_matrix(linear.name, weight, entry, statistics=statistics)
        if entry.method == "squeezellm":
            matrix = replace(matrix, input_scale=torch.linspace(0.5, 2.0, linear.in_features))
        specs[linear.name] = put_layer(model, linear, matrix)
    declare(model, specs)
    folder = tmp_path_factory.mktemp("good") / "model"
    checkpoint.save(model, folder)
    return folder


def put(document, path, value, matrix):
    """A JSON document with something else at a path."""
    if not path:
        return value
    place = document
    for key in path[:-1]:
        place = place[key]
    if value == "delete":
        del place[path[-1]]
    elif value == "copy":
        place[path[-1]] = copy.deepcopy(matrix)
    elif value == "nest":
        inner = place[path[-1]]
        for _ in range(300):
            inner = {**matrix, "scale": inner}
        place[path[-1]] = inner
    else:
        place[path[-1]] = value
    return document


def change_tensor(tensors, full, change):
    t = tensors[full]
    if "delete" in change:
        del tensors[full]
        return
    if "cut" in change:
        t = t[: -change["cut"]]
    if "reshape" in change:
        t = t.reshape(change["reshape"])
    if "view" in change:
        t = t.view(getattr(torch, change["view"]))
    if "to" in change:
        t = t.to(getattr(torch, change["to"]))
    if "transpose" in change:
        t = t.mT
    if "repeat" in change:
        t = t.repeat(change["repeat"])
    if "fill" in change:
        t = torch.full_like(t, float(change["fill"]))
    if "set" in change:
        kind = t.dtype
        t = t.to(torch.int64)
        t[change["set"]] = t[change["set"] - 1] if change["value"] == "before" else change["value"]
        t = t.to(kind)
    tensors[full] = t.contiguous()


def change_file(path, change):
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header, rest = json.loads(whole[8 : 8 + length]), whole[8 + length :]
    if "keep" in change:
        path.write_bytes(whole[: int(len(whole) * change["keep"])])
    elif "header_length" in change:
        path.write_bytes(change["header_length"].to_bytes(8, "little") + whole[8:])
    else:
        if "offsets" in change:
            header[f"{MODULE}.scale"]["data_offsets"] = change["offsets"]
        text = change.get("header", json.dumps(header)).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + rest)


def spoil(folder, recipe):
    config_path, tensors_path = folder / "config.json", folder / "model.safetensors"
    config = json.loads(config_path.read_text())
    modules = config["quantization_config"]["modules"]
    at, module = recipe["at"], recipe.get("module", MODULE)
    if at == "config":
        put(config, recipe["path"], recipe["value"], modules[module])
    elif at == "matrix":
        modules[module] = put(modules[module], recipe["path"], recipe["value"], copy.deepcopy(modules[module]))
    elif at == "tensor":
        tensors = load_file(tensors_path)
        change_tensor(tensors, f"{module}.{recipe['tensor']}", recipe["change"])
        save_file(tensors, tensors_path, {"format": "pt"})
        if recipe.get("digest") == "renew":
            parts = {n.removeprefix(f"{module}."): t for n, t in tensors.items() if n.startswith(f"{module}.")}
            modules[module]["digest"] = digest(parts)
    elif at == "safetensors":
        change_file(tensors_path, recipe["change"])
        return
    elif at == "file":
        text = {"nest": "[" * 100_000, "latin": "{\u00e9}"}.get(recipe["text"], recipe["text"])
        config_path.write_bytes(text.encode("latin-1"))
        return
    config_path.write_text(json.dumps(config))


def test_the_good_one_is_taken(good):
    checkpoint.inspect(good)
    model = transformers.AutoModelForCausalLM.from_pretrained(good)
    assert model.get_submodule(MODULE).matrix.outliers.nnz > 3
    kinds = {name: model.get_submodule(name).spec.dense.kind for name in ENTRIES}
    assert list(kinds.values()) == ["trellis", "codebook", "codebook"]


def never(*args, **kwargs):
    raise AssertionError("a kernel has seen it")


def use(folder):
    """Load a folder, run the model, and dequantize it."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model(torch.arange(24).view(1, 24))
        model(torch.arange(1).view(1, 1))
    model.dequantize()


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_kernel_is_watched(kernel, good, monkeypatch):
    """Using the good one runs each of the kernels, so that a bad one that loads would be noticed."""
    monkeypatch.setattr(f"quantrature._C.{kernel}", never)
    with pytest.raises(AssertionError, match="a kernel has seen it"):
        use(good)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_says_what_the_error_is(path):
    recipe = json.loads(path.read_text())
    words = [recipe[key] for key in ("says", "loads") if key in recipe]
    assert all(len(text) >= 15 for text in words)


@pytest.mark.parametrize("path", DESCRIPTIONS, ids=lambda path: path.stem)
def test_a_description_is_refused(path):
    recipe = json.loads(path.read_text())
    with pytest.raises(qtr.InvalidArgumentError) as refused:
        MatrixSpec.from_json(recipe["description"])
    assert recipe["says"] in str(refused.value)
    assert len(str(refused.value)) < 300


@pytest.mark.parametrize("path", [path for path in RECIPES if path not in DESCRIPTIONS], ids=lambda path: path.stem)
def test_is_refused(path, good, tmp_path, monkeypatch):
    recipe = json.loads(path.read_text())
    folder = tmp_path / "model"
    shutil.copytree(good, folder)
    spoil(folder, recipe)
    for name in KERNELS:
        monkeypatch.setattr(f"quantrature._C.{name}", never)
    if recipe.get("inspect", True):
        with pytest.raises(qtr.QuantratureError) as refused:
            checkpoint.inspect(folder)
        assert recipe["says"] in str(refused.value)
        assert len(str(refused.value).replace(str(folder), "")) < 300
    if path.stem.startswith(("config-", "safetensors-")):
        return  # transformers reads these files first, and says what it has to say
    with pytest.raises(qtr.QuantratureError) as refused:
        use(folder)
    assert recipe.get("loads", recipe["says"]) in str(refused.value)
    assert "\n" not in str(refused.value).strip()
    assert len(str(refused.value)) < 300
