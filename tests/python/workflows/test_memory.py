"""Where analysis and ReQuant keep what they need: devices, files and no more memory than they must."""

import pytest
import torch

import quantrature as qtr
from fresh_python import run_python
from quantrature import InvalidArgumentError, models
from quantrature.analysis.path import Moved, WeightPath
from sharp_models import TOKENS, images, sharp_model
from tiny_models import byte_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("memory")
    sharp_model().save_pretrained(root / "model")
    byte_tokenizer().save_pretrained(root / "model")
    return root / "model"


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"model.layers.0": "cpu", "": "cpu"}])
def test_models_that_accelerate_has_placed(folder, device_map):
    settings = {"metrics": ["pqi", "activation_error"], "bits": 2, "group_size": 16, "nodes": 2}
    expected = qtr.analyze(sharp_model(), TOKENS, **settings)
    placed = models.load_model(folder, "float32", device_map)
    if not torch.cuda.is_available():
        assert qtr.analyze(placed, TOKENS, **settings).matrices == expected.matrices
    _, record = qtr.requant(placed, TOKENS, bits=2, group_size=16, nodes=2)
    assert record.gradient_evaluations == 8


def test_weights_that_are_offloaded_are_refused_by_name(folder, tmp_path):
    limited = {"device_map": "auto", "max_memory": {"cpu": 60000}}
    offloaded = models.load_model(folder, "float32", **limited)
    assert offloaded.get_parameter("model.layers.0.self_attn.q_proj.weight").is_meta
    for call in (
        lambda: qtr.analyze(offloaded, TOKENS, bits=2),
        lambda: qtr.quantize(offloaded, bits=2),
        lambda: qtr.requant(offloaded, TOKENS, bits=2),
    ):
        with pytest.raises(InvalidArgumentError, match="model.layers.0.self_attn.q_proj must be on a device"):
            call()


def test_a_device_gets_what_the_core_has_formed(monkeypatch):
    """What is done for a parameter on a GPU, with another CPU tensor in its place."""
    model = sharp_model().to(torch.bfloat16)
    moved = images(model, 2, 16)
    linears = models.find_linears(model)
    path = WeightPath(model, [Moved(linear, lambda name=linear.name: moved[name]) for linear in linears])
    originals = {linear.name: linear.weight.clone() for linear in linears}
    with path:
        path.move_to(0.3)
        expected = {linear.name: linear.weight.clone() for linear in linears}
        model.to("meta")  # takes whatever it is given, and gives nothing back
        path.move_to(0.3)
        path.move_to(1)
        written = {}
        monkeypatch.setattr(WeightPath, "_in_model", staticmethod(lambda m: Place(written, m.name)))
        path.move_to(0.3)
        for name, values in written.items():
            assert torch.equal(values, expected[name])
        assert len(written) == len(linears)
    for name, values in written.items():
        assert torch.equal(values, originals[name])


class Place:
    """A parameter that the core cannot reach."""

    device = torch.device("cuda")

    def __init__(self, written, name):
        self.written, self.name = written, name

    def copy_(self, values):
        self.written[self.name] = values.clone()


def test_originals_in_files_come_back(tmp_path):
    model = sharp_model().to(torch.bfloat16)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    settings = {"metrics": ["pqi"], "bits": 2, "group_size": 16, "nodes": 2}
    found = qtr.analyze(model, TOKENS, **settings, map_folder=tmp_path / "maps")
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name])
    assert found.matrices == qtr.analyze(model, TOKENS, **settings).matrices
    assert len(list((tmp_path / "maps").iterdir())) == len(found.matrices)  # the accumulators alone


def test_bfloat16_passes_rank_the_weights_much_alike():
    settings = {"metrics": ["pqi"], "bits": 2, "group_size": 16, "nodes": 3, "batch_size": 4}
    exact = qtr.analyze(sharp_model(), TOKENS, **settings)
    narrow = qtr.analyze(sharp_model().bfloat16(), TOKENS, **settings)
    for name, values in exact.maps["pqi"].items():
        assert narrow.maps["pqi"][name].dtype == torch.float32
        both = torch.stack([values.flatten(), narrow.maps["pqi"][name].flatten()])
        assert float(torch.corrcoef(both)[0, 1]) > 0.9


MEASURED = """
import resource, sys
import torch, transformers
import quantrature as qtr
torch.set_num_threads(1)
sizes = dict(hidden_size=512, intermediate_size=1408, num_hidden_layers=8, num_attention_heads=8, vocab_size=64)
config = transformers.LlamaConfig(**sizes, max_position_embeddings=64)
torch.manual_seed(0)
model = transformers.AutoModelForCausalLM.from_config(config)
tokens = torch.arange(16).view(1, 16)
settings = dict(metrics=["pqi"], group_size=64, nodes=2, progress=False)
qtr.analyze(model, tokens, bits=2, ignore=["re:model.layers.[1-7].*"], **settings)  # what libraries take once
weights = 4 * sum(p.numel() for n, p in model.named_parameters() if "proj" in n)

def status(name):
    return int(next(l for l in open("/proc/self/status") if l.startswith(name)).split()[1]) * 1024

kind, room = sys.argv[1:]
if kind == "peak":
    before = status("VmHWM")
    qtr.analyze(model, tokens, bits=2, **settings)
    print((status("VmHWM") - before) / weights)
else:
    resource.setrlimit(resource.RLIMIT_DATA, (int(status("VmData") + float(room) * weights), -1))
    folder = None if kind == "in-memory" else kind
    print(qtr.analyze(model, tokens, bits=2, map_folder=folder, **settings).gradient_evaluations)
"""


def measured(*arguments):
    code = MEASURED.replace("sys.argv[1:]", repr(list(map(str, arguments))))
    # Otherwise glibc keeps an amount of freed memory that differs from run to run.
    returned = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    return run_python(code, OMP_NUM_THREADS="1", QUANTRATURE_NUM_THREADS="1", **returned)


def test_the_peak_is_originals_accumulators_and_one_gradient():
    """A second full gradient would make it 3.1 times the weights; images at 2 bits and the largest matrix are small."""
    done = measured("peak", 0)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 2.5


@pytest.mark.slow
def test_files_in_the_place_of_memory(tmp_path):
    """Originals and accumulators are twice the weights: with less room than that, an analysis needs them in files.

    In files it takes less than a fifth of the weights, here; what allocators keep differs between machines.
    """
    done = measured("in-memory", 1.25)
    assert done.returncode != 0
    assert "memory" in done.stderr.lower() or "alloc" in done.stderr.lower()
    done = measured(tmp_path, 1.25)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "2\n"
