"""Checkpoints that mean harm, by the recipes in hostile/: one clear error each, before a kernel sees them."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import quantrature as qtr
from quantrature import checkpoint
from quantrature.storage import digest
from tiny_models import tiny_model

MODULE = "model.layers.0.mlp.up_proj"
RECIPES = sorted((Path(__file__).parent / "hostile").glob("*.json"))


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A checkpoint with outliers and scales in float16."""
    model = qtr.quantize(tiny_model("llama"), bits=3, group_size=16, outliers=0.05)
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


def change_tensor(tensors, name, change):
    full = f"{MODULE}.{name}"
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
    at = recipe["at"]
    if at == "config":
        put(config, recipe["path"], recipe["value"], modules[MODULE])
    elif at == "matrix":
        modules[MODULE] = put(modules[MODULE], recipe["path"], recipe["value"], copy.deepcopy(modules[MODULE]))
    elif at == "tensor":
        tensors = load_file(tensors_path)
        change_tensor(tensors, recipe["tensor"], recipe["change"])
        save_file(tensors, tensors_path, {"format": "pt"})
        if recipe.get("digest") == "renew":
            parts = {n.removeprefix(f"{MODULE}."): t for n, t in tensors.items() if n.startswith(f"{MODULE}.")}
            modules[MODULE]["digest"] = digest(parts)
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


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_is_refused(path, good, tmp_path, monkeypatch):
    recipe = json.loads(path.read_text())
    folder = tmp_path / "model"
    shutil.copytree(good, folder)
    spoil(folder, recipe)

    def never(*args, **kwargs):
        raise AssertionError("a kernel has seen it")

    for name in ("dequantize", "unpack", "matvec", "residuals"):
        monkeypatch.setattr(f"quantrature._C.{name}", never)
    if recipe.get("inspect", True):
        with pytest.raises(qtr.QuantratureError, match=recipe["says"] or None):
            checkpoint.inspect(folder)
    if path.stem.startswith(("config-", "safetensors-")):
        return  # transformers reads these files first, and says what it has to say
    with pytest.raises(qtr.QuantratureError) as refused:
        transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert "\n" not in str(refused.value).strip()
