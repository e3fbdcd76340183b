"""Calibration on text of models that read images beside it, or that have an encoder and a decoder."""

import pytest
import torch
import transformers

import quantrature as qtr
from interruptions import limited_to
from quantrature import InvalidArgumentError, Plan, checkpoint, models
from quantrature.cli import main
from quantrature.models import find_linears
from quantrature.models.running import outputs
from quantrature.nn import quantized_layers
from quantrature.plan import PlanEntry
from quantrature.quantization import calibrate, collect, sequential
from tiny_configs import shrunk
from tiny_models import byte_tokenizer
from tiny_multimodal import CLASSES, LANGUAGE, tiny_multimodal

WINDOWS = torch.randint(0, 256, (5, 20), generator=torch.Generator().manual_seed(1))
SETTINGS = {
    "gptq": {"bits": 4, "group_size": 16},
    "awq": {"bits": 4, "group_size": 16},
    "squeezellm": {"bits": 3},
    "qtip": {"bits": 2},
}
FEW = [("llava", "gptq"), ("qwen3-vl", "squeezellm"), ("t5", "gptq"), ("bart", "awq")]
ALL = [(name, method) for name in CLASSES for method in SETTINGS if (name, method) not in FEW]


def quantized(name, method, **more):
    return qtr.quantize(tiny_multimodal(name), method=method, calibration=WINDOWS, **SETTINGS[method], **more)


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def text_matrices(name):
    """Names of the matrices that text reaches: all that is linear in the language model, or in both halves."""
    found = find_linears(tiny_multimodal(name))
    if name in LANGUAGE:
        assert all(linear.name.startswith(LANGUAGE[name]) for linear in found)
        assert any("which does not read text" in skipped.reason for skipped in found.skipped)
    else:
        assert {linear.name.split(".layer")[0].split(".block")[0].rpartition(".")[2] for linear in found} == {
            "encoder",
            "decoder",
        }
    return [linear.name for linear in found]


def check_method(name, method, folder):
    model = quantized(name, method)
    assert list(quantized_layers(model)) == text_matrices(name)
    with torch.no_grad():
        expected = outputs(model, WINDOWS).logits
        apart = outputs(tiny_multimodal(name), WINDOWS).logits - expected
    assert 0 < float(apart.norm()) < float(expected.norm())
    checkpoint.save(model, folder / "out")
    with torch.no_grad():
        assert torch.equal(outputs(models.load_model(folder / "out"), WINDOWS).logits, expected)


@pytest.mark.parametrize(("name", "method"), FEW)
def test_calibrated_methods_quantize_what_reads_text(name, method, tmp_path):
    check_method(name, method, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "method"), ALL)
def test_every_calibrated_method_quantizes_what_reads_text(name, method, tmp_path):
    check_method(name, method, tmp_path)


def gram_matrices(model, linears):
    """Mean of x x^T over the inputs of each matrix, in one pass of the whole model, which no block is taken out of."""
    found = {}

    def see(linear):
        def hook(module, args):
            x = args[0].detach().reshape(-1, linear.in_features)
            found[linear.name] = x.T @ x / len(x)

        return hook

    handles = [linear.layer.register_forward_pre_hook(see(linear)) for linear in linears]
    with torch.no_grad():
        outputs(model, WINDOWS)
    for handle in handles:
        handle.remove()
    return found


def gemma3n():
    """Each of its blocks is told of the tokens, too, in an embedding of its own."""
    torch.manual_seed(0)
    config = transformers.Gemma3nTextConfig(
        vocab_size=258,
        vocab_size_per_layer_input=258,
        hidden_size=32,
        hidden_size_per_layer_input=8,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        laurel_rank=4,
        num_kv_shared_layers=0,
        altup_num_inputs=2,
        layer_types=["full_attention"] * 2,
        activation_sparsity_pattern=[0.0, 0.0],
    )
    return transformers.Gemma3nForCausalLM(config).eval()


def switch():
    """Its forward takes no use_cache, and makes a cache."""
    torch.manual_seed(0)
    config = transformers.SwitchTransformersConfig(
        vocab_size=258,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_decoder_layers=2,
        num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=1,
        num_experts=1,
        num_heads=4,
        decoder_start_token_id=0,
    )
    return transformers.SwitchTransformersForConditionalGeneration(config).eval()


FLOWS = {name: lambda name=name: tiny_multimodal(name) for name in ("t5", "bart", "qwen3-vl")}
FLOWS |= {"gemma3n": gemma3n, "switch": switch}


USUAL = [("bart", 2), ("gemma3n", 2)]
OTHERS = [(name, size) for name in FLOWS for size in (1, 2) if (name, size) not in USUAL]


@pytest.mark.parametrize(("name", "batch_size"), [*USUAL, *(pytest.param(*x, marks=pytest.mark.slow) for x in OTHERS)])
def test_a_matrix_is_calibrated_on_what_the_quantized_model_gives_it(name, batch_size):
    model = FLOWS[name]()
    linears = find_linears(model)
    entries = {linear.name: PlanEntry(3, 16, method="gptq") for linear in linears}
    before = state_of(model)
    found = calibrate(model, linears, entries, WINDOWS, batch_size=batch_size, keep_statistics=True)
    assert same(state_of(model), before)
    dense = collect(model, linears, dict.fromkeys(entries, ("hessian",)), WINDOWS, batch_size=batch_size)
    for name_, expected in gram_matrices(model, linears).items():
        torch.testing.assert_close(dense[name_].hessian, expected, rtol=1e-3, atol=1e-4)
    with torch.no_grad():
        for linear in linears:
            linear.weight.copy_(found.matrices[linear.name].dequantize("float32"))
    grams = gram_matrices(model, linears)
    assert grams.keys() == entries.keys()
    for linear in linears:
        torch.testing.assert_close(found.statistics[linear.name].hessian, grams[linear.name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["t5", "llava"])
def test_resuming_gives_the_same_bytes(name, monkeypatch, tmp_path, caplog):
    whole = state_of(quantized(name, "gptq"))
    blocks = 4 if name == "t5" else 2
    after = round(len(text_matrices(name)) * (blocks - 0.5) / blocks)  # within the last block
    with monkeypatch.context() as patch:
        patch.setattr(sequential, "quantize_matrix", limited_to(after, sequential.quantize_matrix, KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            quantized(name, "gptq", resume_folder=tmp_path / "state")
    resumed = quantized(name, "gptq", resume_folder=tmp_path / "state", resume="required")
    assert f"{blocks - 1} of {blocks} blocks are read from" in caplog.text
    assert same(state_of(resumed), whole)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_progress_comes_to_the_work_that_was_announced(name):
    model = tiny_multimodal(name)
    linears = find_linears(model)
    entries = {linear.name: PlanEntry(3, -1, method="squeezellm") for linear in linears}
    said = []
    calibrate(model, linears, entries, WINDOWS, report=lambda count, note: said.append(count))
    assert sum(said) == pytest.approx(sequential.units(linears, entries, len(WINDOWS)))
    assert sequential.peak_bytes(linears, entries, *WINDOWS.shape) > 0


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_layers_with_heads_of_several_sizes_are_calibrated(method):
    """Gemma 4's configuration refuses to name one size."""
    config = shrunk(transformers.CONFIG_MAPPING["gemma4"]())
    assert config.text_config.is_heterogeneous
    model = transformers.AutoModelForImageTextToText.from_config(config).eval()
    windows = torch.randint(5, 250, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model(windows).logits
        qtr.quantize(model, bits=8, group_size=16, method=method, calibration=windows)
        assert (model(windows).logits - before).norm() < 0.15 * before.norm()
    assert {name.split(".")[1] for name in quantized_layers(model)} == {"language_model"}


def test_one_half_may_be_quantized_alone():
    for half in ("encoder", "decoder"):
        model = tiny_multimodal("bart")
        names = [name for name in text_matrices("bart") if f".{half}." in name]
        plan = Plan(dict.fromkeys(names, PlanEntry(4, 16, method="gptq")))
        qtr.quantize(model, plan=plan, calibration=WINDOWS)
        assert list(quantized_layers(model)) == names


@pytest.mark.parametrize("name", ["paligemma", "bart"])
def test_an_analysis_predicts_the_loss_change(name):
    model = tiny_multimodal(name)
    before = state_of(model)
    found = qtr.analyze(model, WINDOWS, metrics=["pqi", "fisher", "activation_error"], bits=8, group_size=16, nodes=8)
    assert same(state_of(model), before)
    assert [matrix.name for matrix in found.matrices] == text_matrices(name)
    proof = found.proofs[0]
    assert proof.predicted_loss_change == pytest.approx(proof.measured_loss_change, rel=0.05, abs=1e-5)


def test_the_loss_of_an_encoder_decoder_is_that_of_its_labels():
    from quantrature.models.gradients import next_token_nll

    model = tiny_multimodal("bart")
    labels = WINDOWS.clone()
    labels[:, 0] = -100  # the first token of a window is foretold by nothing
    with torch.no_grad():
        ours = next_token_nll(model, WINDOWS)
        start = torch.full((len(WINDOWS), 1), model.config.decoder_start_token_id)
        shifted = torch.cat([start, WINDOWS[:, :-1]], 1)
        theirs = model(input_ids=WINDOWS, decoder_input_ids=shifted, labels=labels).loss
    assert float(ours) == pytest.approx(float(theirs) * WINDOWS[:, 1:].numel(), rel=1e-5)


def test_a_model_without_output_embedding_is_calibrated_unless_a_loss_is_needed():
    model = tiny_multimodal("bart").model
    qtr.quantize(model, bits=4, group_size=16, method="gptq", calibration=WINDOWS)
    assert len(quantized_layers(model)) == 32
    with pytest.raises(InvalidArgumentError, match="a loss needs a model with an output embedding: got BartModel"):
        qtr.quantize(tiny_multimodal("bart").model, bits=3, method="squeezellm", calibration=WINDOWS)


def whisper():
    config = transformers.WhisperConfig(
        vocab_size=258,
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        pad_token_id=0,
        bos_token_id=256,
        eos_token_id=257,
    )
    return transformers.WhisperForConditionalGeneration(config).eval()


def albert():
    sizes = {"hidden_size": 32, "embedding_size": 16, "intermediate_size": 48}
    return transformers.AlbertForMaskedLM(transformers.AlbertConfig(vocab_size=258, **sizes, num_attention_heads=4))


def xlm():
    config = transformers.XLMConfig(vocab_size=258, emb_dim=32, n_layers=2, n_heads=4, max_position_embeddings=64)
    return transformers.XLMWithLMHeadModel(config).eval()


def with_an_idle_block():
    """Of LLaVA, whose language model leaves out its last block."""
    model = tiny_multimodal("llava")
    model.model.language_model.config.num_hidden_layers = 1
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (whisper, "WhisperForConditionalGeneration also needs input_features"),
        (albert, r"run each block once: albert.encoder.albert_layer_groups.0 runs repeatedly"),
        (xlm, r"the input of transformer.attentions.1 is not the output of transformer.ffns.0"),
        (
            with_an_idle_block,
            r"no calibration text reaches model.language_model.layers.1.\S+; add it to ig",
        ),
    ],
)
def test_models_that_cannot_be_gone_through_are_refused(make, message):
    model = make()
    before = state_of(model)
    with pytest.raises(InvalidArgumentError, match=message):
        qtr.quantize(model, bits=4, group_size=16, method="gptq", calibration=WINDOWS)
    assert same(state_of(model), before)


def test_blocks_that_no_text_reaches_may_stay_as_they_are():
    model = with_an_idle_block()
    last = "model.language_model.layers.1"
    qtr.quantize(model, bits=4, group_size=16, method="gptq", calibration=WINDOWS, ignore=last)
    assert quantized_layers(model)
    assert not any(name.startswith(last) for name in quantized_layers(model))


def test_files_of_the_processor_go_with_the_model(tmp_path, capfd):
    source, text = tmp_path / "source", tmp_path / "text.txt"
    tiny_multimodal("llava").save_pretrained(source)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(source)
    (source / "additional_chat_templates").mkdir()
    files = {
        "processor_config.json": '{"processor_class": "LlavaProcessor", "patch_size": 4}',
        "preprocessor_config.json": '{"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 8}}',
        "video_preprocessor_config.json": '{"fps": 2}',
        "chat_template.json": '{"chat_template": "{{ messages }}"}',
        "additional_chat_templates/tools.jinja": "{{ tools }}",
    }
    for name, content in files.items():
        (source / name).write_text(content)
    text.write_text("It was the best of times, it was the worst of times. " * 20)
    given = ["--calibration", str(text), "--nsamples", "2", "--seqlen", "24"]
    out, more = str(tmp_path / "out"), str(tmp_path / "more")
    assert main(["quantize", str(source), "-o", out, "--bits", "3", "--method", "gptq", *given]) == 0
    assert main(["requant", out, "--source", str(source), "-o", more, "--significant-fraction", "0.01", *given]) == 0
    for folder in (out, more):
        for name, content in files.items():
            assert (tmp_path / folder / name).read_text() == content
        assert (tmp_path / folder / "chat_template.jinja").read_text() == "{{ messages }}"
    assert "in model.vision_tower, which does not read text" in capfd.readouterr().err
