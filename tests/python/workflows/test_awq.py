"""AWQ's search for scales and clipping, against plain torch and its identities."""

import pytest
import torch

import quantrature as qtr
from quantrature import PlanEntry, models, ops
from quantrature.methods import Statistics, quantize_matrix
from quantrature.methods.awq import CLIPPED, STEPS, best_scale, candidates, clipped, shared_scale
from quantrature.nn import quantized_layers
from tiny_models import tiny_model

ENTRY = PlanEntry(3, 32, method="awq")


def layer(rows=48, cols=128, tokens=300, seed=0):
    """Weights, and inputs of which some channels are much larger than others."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(rows, cols, generator=g), torch.randn(tokens, cols, generator=g) * torch.randn(
        cols, generator=g
    ).mul(1.5).exp()


def quantized(weight, x, entry=ENTRY, kept=None, name="mlp.up_proj"):
    return quantize_matrix(name, weight, entry, kept, Statistics(activations=x))


def error(weight, image, x):
    return float((x @ (image - weight).T).square().mean())


def plain_grid(w, bits, group):
    """Round to nearest on min-max grids, float64."""
    groups = w.reshape(len(w), -1, group)
    low, high = groups.amin(2, keepdim=True), groups.amax(2, keepdim=True)
    inv = (2**bits - 1) / (high - low)
    return (((groups * inv - low * inv).round().clamp(0, 2**bits - 1) + low * inv) / inv).reshape(w.shape)


def plain_awq(weight, x, bits, group):
    """Scale and clipping limits as the paper and its code have them."""
    w, x = weight.double(), x.double()
    sizes, least = x.abs().mean(0), torch.inf
    for step in range(20):
        s = sizes.pow(step / 20).clamp(min=1e-4)
        s = s / (s.max() * s.min()).sqrt()
        loss = (x @ (plain_grid(w * s, bits, group) / s - w).T).square().mean()
        if loss < least:
            least, scale = loss, s
    scaled, inputs = w * scale, x / scale
    groups = scaled.reshape(len(w), -1, group)
    parts = inputs.reshape(len(x), -1, group)
    largest = groups.abs().amax(2)
    best, limits = torch.full_like(largest, torch.inf), largest.clone()
    for step in range(10):
        limit = largest * (1 - step / 20)
        tried = groups.clamp(-limit[:, :, None], limit[:, :, None]).reshape(w.shape)
        apart = (plain_grid(tried, bits, group) - scaled).reshape(groups.shape)
        loss = torch.einsum("tgc,rgc->trg", parts, apart).square().mean(0)
        limits = torch.where(loss < best, limit, limits)
        best = torch.minimum(loss, best)
    return scale, limits


@pytest.mark.parametrize(("bits", "group"), [(2, 32), (3, 64), (4, 128), (2, 128), (3, 256)])
def test_equals_plain_torch(bits, group):
    weight, x = layer(cols=256)
    entry = PlanEntry(bits, group, method="awq")
    scale, limits = plain_awq(weight, x, bits, group)
    found = best_scale(weight, entry, x, None)
    torch.testing.assert_close(found.double(), scale, rtol=1e-4, atol=0)
    scaled = (weight * found).contiguous()
    kept = clipped(scaled, entry, x / found, None)
    bound = limits.repeat_interleave(group, 1).float()
    same = torch.isclose(kept, scaled.clamp(-bound, bound), rtol=1e-3).float().mean()
    assert same > 0.99  # of two limits with all but the same error either may win
    image = quantized(weight, x, entry).dequantize("float32")
    nearest = ops.quantize(weight, bits, group).dequantize()
    assert error(weight, image, x) < 0.75 * error(weight, nearest, x)


def test_without_scaling_and_clipping_it_is_round_to_nearest():
    weight, x = layer()
    entry = PlanEntry(3, 32, method="awq", options={"scale": False, "clip": False})
    found = quantized(weight, x, entry)
    nearest = quantize_matrix("w", weight, PlanEntry(3, 32))
    assert found.input_scale is None
    assert torch.equal(found.dense.codes, nearest.dense.codes)
    assert torch.equal(found.dense.scale, nearest.dense.scale)
    assert torch.equal(candidates(x)[0], torch.ones(128))


@pytest.mark.parametrize("options", [{}, {"clip": False}, {"scale": False}])
def test_the_output_error_is_never_above_that_of_rounding(options):
    for seed in range(3):
        weight, x = layer(seed=seed)
        entry = PlanEntry(4, 64, method="awq", options=options)
        nearest = ops.quantize(weight, 4, 64).dequantize()
        assert error(weight, quantized(weight, x, entry).dequantize("float32"), x) <= 1.02 * error(weight, nearest, x)


def test_matrices_that_read_the_same_share_the_scale_that_is_best_for_all():
    (one, x), (two, _) = layer(), layer(seed=1)
    sizes = x.double().abs().mean(0)

    def loss(scale):
        apart = [plain_grid(w.double() * scale, 3, 32) / scale - w.double() for w in (one, 4 * two)]
        return float(sum((x.double() @ each.T).square().sum() for each in apart))

    tried = [sizes.pow(step / 20).clamp(min=1e-4) for step in range(20)]
    least = min(loss(s / (s.max() * s.min()).sqrt()) for s in tried)
    found = shared_scale([(one, ENTRY), (4 * two, ENTRY)], x)
    assert loss(found.double()) <= 1.001 * least  # two of the scales are all but equally good


def test_channels_that_are_read_repeatedly_share_a_scale():
    _, x = layer(cols=48)
    for scale in candidates(x, (4, 3)):
        heads = scale.view(-1, 3, 4)
        assert torch.equal(heads, heads[:, :1].expand_as(heads))
    expected = x.abs().mean(0).view(-1, 3, 4).mean(1)
    found = candidates(x, (4, 3))[10].view(-1, 3, 4)[:, 0]
    torch.testing.assert_close(found / found[0, 0], (expected / expected[0, 0]).sqrt())


def test_a_constant_factor_of_the_scale_does_not_matter():
    weight, _ = layer()
    scale = torch.rand(128, generator=torch.Generator().manual_seed(1)) + 0.5
    one = ops.quantize((weight * scale).contiguous(), 3, 32, scale_dtype="float32").dequantize() / scale
    four = ops.quantize((4 * weight * scale).contiguous(), 3, 32, scale_dtype="float32").dequantize() / (4 * scale)
    torch.testing.assert_close(one, four, rtol=1e-6, atol=1e-6)


def test_inputs_of_attention_scores_are_not_clipped():
    weight, x = layer()
    entry = PlanEntry(3, 32, method="awq", options={"scale": False})
    nearest = ops.quantize(weight, 3, 32)
    for name in ("self_attn.q_proj", "self_attn.k_proj", "attention.query_key_value"):
        assert torch.equal(quantized(weight, x, entry, name=name).dense.codes, nearest.codes)
    assert not torch.equal(quantized(weight, x, entry).dense.codes, nearest.codes)


def test_kept_weights_are_exact_and_out_of_the_way():
    weight, x = layer()
    weight[2, 7] = 50.0
    kept = torch.tensor([2 * 128 + 7, 3000])
    found = quantized(weight, x, kept=kept)
    image = found.dequantize("float32")
    assert torch.equal(image.view(-1)[kept], weight.view(-1)[kept])
    moved = weight.clone()
    moved[2, 7] = -9.0
    again = quantized(moved, x, kept=kept).dequantize("float32")
    assert torch.equal(again[2, 8:], image[2, 8:])


def test_a_step_of_clipping_is_a_twentieth():
    assert (STEPS, CLIPPED) == (20, 10)
    weight, x = layer()
    out = clipped(weight, ENTRY, x, None)
    shares = out.view(48, 4, 32).abs().amax(2) / weight.view(48, 4, 32).abs().amax(2)
    assert ((shares * 20).round() / 20 - shares).abs().max() < 1e-6
    assert shares.min() >= 0.55 - 1e-6
    assert shares.min() < 1


def test_models_apply_the_scale_of_the_inputs(tmp_path):
    windows = torch.randint(0, 256, (6, 24), generator=torch.Generator().manual_seed(0))
    model = tiny_model("llama")
    qtr.quantize(model, bits=3, group_size=16, method="awq", calibration=windows, batch_size=6, fold=False)
    layers = quantized_layers(model)
    scaled = [name for name, layer in layers.items() if layer.matrix.input_scale is not None]
    assert scaled
    dense = tiny_model("llama")
    for linear in models.find_linears(dense):
        linear.weight.copy_(layers[linear.name].dequantize())
    with torch.no_grad():
        expected = dense(windows).logits
        torch.testing.assert_close(model(windows).logits, expected)
        model.save_pretrained(tmp_path / "out")
        torch.testing.assert_close(models.load_model(tmp_path / "out")(windows).logits, expected)
