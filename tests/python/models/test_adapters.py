"""LoRA adapters on quantized layers. Needs peft."""

import copy

import pytest
import torch

import quantrature as qtr
from fresh_python import run_python
from quantrature import InvalidArgumentError, UnsupportedError
from quantrature.nn import QuantLinear, TiedLinear, quantized_layers
from tiny_models import tiny_model

peft = pytest.importorskip("peft")

from quantrature.integrations.peft import LoraQuantLinear, prepare  # noqa: E402

# What PEFT asks of transformers is on its way out there.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

TOKENS = torch.arange(2 * 12).view(2, 12)
NAMES = {
    "llama": ["q_proj", "down_proj"],
    "qwen2": ["q_proj", "v_proj"],
    "gpt2": ["c_attn"],
    "falcon": ["query_key_value"],
}


def quantized(layout="llama"):
    return qtr.quantize(tiny_model(layout), bits=4, group_size=16, outlier_fraction=0.01)


def logits(model):
    model.eval()
    with torch.no_grad():
        return model(TOKENS).logits


@pytest.mark.parametrize("layout", NAMES)
def test_adapters_learn_on_a_quantized_model(layout, tmp_path):
    torch.manual_seed(0)
    before = logits(quantized(layout))
    config = peft.LoraConfig(r=4, target_modules=NAMES[layout], task_type="CAUSAL_LM", lora_dropout=0.0)
    model = peft.get_peft_model(quantized(layout), prepare(config))
    assert sum(isinstance(module, LoraQuantLinear) for module in model.modules()) == 2 * len(NAMES[layout])
    assert torch.equal(logits(model), before)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained and all("lora_" in name for name in trained)

    # Not in training mode: GPT-2 would drop out at random.
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    losses = []
    for _ in range(5):
        loss = model(TOKENS, labels=TOKENS).loss
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses == sorted(losses, reverse=True)

    after = logits(model)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(
        quantized(layout), tmp_path, config=prepare(peft.LoraConfig.from_pretrained(tmp_path))
    )
    assert torch.equal(logits(again), after)
    with again.disable_adapter():
        assert torch.equal(logits(again), before)


def test_transformers_adds_adapters_too():
    model = quantized()
    model.add_adapter(prepare(peft.LoraConfig(r=2, target_modules=["q_proj"])))
    model(TOKENS).logits.sum().backward()
    assert model.hf_quantizer.is_trainable  # what transformers' Trainer asks


@pytest.mark.parametrize(
    "setting", [{"use_dora": True}, {"lora_bias": True}, {"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}]
)
def test_what_needs_plain_weights_is_refused(setting):
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], **setting)
    with pytest.raises(UnsupportedError, match=rf"\[adapters\] {next(iter(setting))}"):
        prepare(config)
    with pytest.raises(UnsupportedError, match=rf"\[adapters\] {next(iter(setting))}"):
        peft.get_peft_model(quantized(), config)


def adapted(model, targets="all-linear", **more):
    """The model with random adapters, which change its outputs."""
    config = peft.LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM", **more)
    torch.manual_seed(0)
    found = peft.get_peft_model(model, config)
    for name, parameter in found.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return found


def wrapped(model):
    return [name for name, module in model.named_modules() if isinstance(module, LoraQuantLinear)]


@pytest.mark.parametrize("layout", ["llama", "gpt2", "mixtral", "qwen2-moe", "gpt-oss", "zamba"])
def test_all_linear_means_the_quantized_layers_too(layout, tmp_path):
    model = quantized(layout)
    output = model.get_output_embeddings()
    names = {n for n, m in model.named_modules() if isinstance(m, QuantLinear | TiedLinear) and m is not output}
    found = adapted(model)
    assert {name.removeprefix("base_model.model.") for name in wrapped(found)} == names
    expected = logits(found)
    assert not torch.equal(expected, logits(quantized(layout)))
    found.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(quantized(layout), tmp_path)
    torch.testing.assert_close(logits(again), expected)


@pytest.mark.parametrize(
    ("targets", "count"),
    [
        (["q_proj", "down_proj"], 2 + 6),
        (r".*experts\.down_proj\.[01]", 4),
        (r".*down_proj", 6),
        (["q_proj", "w1", "w2", "w3"], 2 + 12),
    ],
)
def test_experts_take_adapters_one_by_one(targets, count):
    assert len(wrapped(adapted(quantized("mixtral"), targets))) == count


def test_a_second_adapter_goes_on_the_same_layers():
    model = adapted(quantized())
    before = logits(model)
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    assert torch.equal(logits(model), before)
    model.set_adapter("second")
    assert len(wrapped(model)) == 14
    assert not torch.equal(logits(model), before)


KINDS = [
    {"bits": 4, "outlier_fraction": 0.01},
    {"bits": 4, "method": "nf4"},
    {"bits": 3, "meta_bits": 8, "sym": True},
    {"bits": 8, "group_size": -1},
]
CALIBRATED = [
    {"bits": 4, "method": "awq"},
    {"bits": 3, "method": "squeezellm", "outlier_fraction": 0.01},
    {"bits": 4, "method": "qtip"},
]


def of_kind(layout, settings):
    if settings in CALIBRATED:
        settings = {**settings, "calibration": torch.arange(200).view(10, 20)}
    if settings.get("method") not in ("squeezellm", "qtip"):
        settings = {"group_size": 16, **settings}
    return qtr.quantize(tiny_model(layout), **settings, progress=False)


@pytest.mark.parametrize("settings", [*KINDS, *CALIBRATED], ids=str)
@pytest.mark.parametrize("layout", ["llama", "gpt2", "mixtral"])
def test_adapters_are_merged_into_what_has_become_dense(layout, settings):
    if layout == "mixtral" and settings in CALIBRATED:
        pytest.skip("not calibrated here, since it takes long")
    model = adapted(of_kind(layout, settings))
    expected = logits(model)
    model.get_base_model().dequantize()
    torch.testing.assert_close(logits(model), expected, rtol=1e-3, atol=1e-4)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, rtol=1e-3, atol=1e-4)
    assert [name for name, _ in merged.named_parameters()] == [
        name for name, _ in tiny_model(layout).named_parameters()
    ]


@pytest.mark.parametrize("settings", [*KINDS, *CALIBRATED], ids=str)
@pytest.mark.parametrize("layout", ["llama", "gpt2"])
def test_adapters_are_merged_into_quantized_weights_on_request(layout, settings, tmp_path, caplog):
    caplog.set_level("INFO", "quantrature.integrations.peft")
    model = adapted(of_kind(layout, settings))
    unmerged = logits(model)
    before = {name: layer.spec for name, layer in quantized_layers(of_kind(layout, settings)).items()}
    sums = {
        name: module.base_layer.dequantize() + (delta.mT if layout == "gpt2" else delta)
        for name, module in model.named_modules()
        if isinstance(module, LoraQuantLinear)
        for delta in [module.get_delta_weight("default").detach()]
    }
    with pytest.raises(UnsupportedError, match=r"dequantize\(\) first, which loses nothing; or merge with safe_merge"):
        model.merge_and_unload()
    assert torch.equal(logits(model), unmerged)
    with pytest.warns(UserWarning, match="quantized again without calibration"):
        merged = model.merge_and_unload(safe_merge=True)
    layers = quantized_layers(merged)
    assert {n: a.spec.dense.setting for n, a in layers.items()} == {n: b.dense.setting for n, b in before.items()}
    assert {n: layer.spec.outliers for n, layer in layers.items()} == {n: spec.outliers for n, spec in before.items()}
    for name, layer in layers.items():
        exact = sums[f"base_model.model.{name}"]
        error = (layer.dequantize() - exact).norm() / exact.norm()
        assert error < (0.01 if settings["bits"] == 8 else 0.3)
        assert f"{error:.2e}" in caplog.text
        if layer.matrix.outliers is not None:
            places = layer.matrix.outliers.positions()
            torch.testing.assert_close(layer.dequantize().flatten()[places], exact.flatten()[places])
    expected = logits(merged)
    assert (expected - unmerged).norm() < (expected - logits(of_kind(layout, settings))).norm()
    merged.save_pretrained(tmp_path)
    assert torch.equal(logits(type(merged).from_pretrained(tmp_path)), expected)


def test_merging_what_is_zero_moves_little_and_only_once():
    model = quantized()
    config = peft.LoraConfig(r=2, target_modules=["up_proj"])
    found = peft.get_peft_model(copy.deepcopy(model), config)
    with pytest.warns(UserWarning, match="quantized again"):
        found.merge_adapter(safe_merge=True)
    merged = logits(found)
    torch.testing.assert_close(merged, logits(model), rtol=0.01, atol=0.01)
    with pytest.warns(UserWarning, match="already merged"):
        found.merge_adapter(safe_merge=True)
    assert torch.equal(logits(found), merged)
    with pytest.raises(UnsupportedError, match="cannot be unmerged"):
        found.unmerge_adapter()


def test_adapters_that_are_not_finite_are_refused_and_leave_the_layer():
    model = adapted(quantized(), ["q_proj"])
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    layer.lora_B["default"].weight.data.fill_(torch.inf)
    spec = layer.base_layer.spec
    with pytest.raises(InvalidArgumentError, match="merging default would give weights that are not finite"):
        layer.merge(safe_merge=True)
    assert layer.base_layer.spec == spec and layer.base_layer.intact


def test_unloading_gives_the_quantized_model_back():
    model = adapted(quantized())
    before = logits(quantized())
    assert torch.equal(logits(model.unload()), before)


def test_quantized_embeddings_under_adapters():
    def tied():
        return qtr.quantize(tiny_model("llama-tied"), bits=8, group_size=16, embedding_bits=8)

    with pytest.raises(UnsupportedError, match="a quantized token embedding cannot have an adapter"):
        adapted(tied(), ["embed_tokens"])
    for more in ({"modules_to_save": ["embed_tokens"]}, {"trainable_token_indices": [3]}):
        with pytest.raises(UnsupportedError, match=f"{next(iter(more))} names model.embed_tokens, which is quantized"):
            adapted(tied(), ["q_proj"], **more)
    with pytest.raises(UnsupportedError, match="target_parameters names model.layers.0.self_attn.q_proj"):
        adapted(tied(), [], target_parameters=["q_proj.weight"])
    model = adapted(tied(), ["lm_head", "q_proj"])
    assert len(wrapped(model)) == 3
    expected = logits(model)
    with pytest.raises(UnsupportedError, match=r"tied embeddings\) cannot be merged"):
        model.merge_and_unload(safe_merge=True)
    assert torch.equal(logits(model), expected)
    with pytest.warns(UserWarning, match="quantized again"):
        merged = adapted(tied(), ["q_proj"]).merge_and_unload(safe_merge=True)
    assert merged.config.tie_word_embeddings


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("embedding_bits", [None, 8])
def test_dtypes_agree_after_preparing_for_training_and_dequantizing(dtype, embedding_bits):
    model = tiny_model("llama").to(dtype)
    model.config.dtype = dtype
    model = qtr.quantize(model, bits=4, group_size=16, embedding_bits=embedding_bits)
    model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    model = adapted(model)
    model(TOKENS, labels=TOKENS).loss.backward()
    expected = logits(model)
    base = model.get_base_model()
    base.dequantize()
    assert {parameter.dtype for parameter in base.parameters()} == {torch.float32}
    torch.testing.assert_close(logits(model), expected, rtol=0.05, atol=0.05)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("dtype", [torch.bfloat16, "float16"])
def test_dequantizing_into_a_dtype_takes_the_whole_model_there(dtype):
    model = qtr.quantize(tiny_model("llama"), bits=4, group_size=16).dequantize(dtype)
    wanted = torch.float16 if dtype == "float16" else dtype
    assert {parameter.dtype for parameter in model.parameters()} == {wanted}
    assert logits(model).dtype == wanted


@pytest.mark.parametrize("order", ["import peft, quantrature", "import quantrature"])
def test_importing_both_in_any_order_is_enough(order):
    done = run_python(
        f"{order}\nimport sys\nprint('peft' in sys.modules, 'torch' in sys.modules)\n"
        "import peft, peft.tuners.lora.model as model\nprint(model.dispatch_default.__module__)"
    )
    both = "peft" in order
    assert done.stdout == f"{both} {both}\nquantrature.integrations.peft\n", done.stderr
