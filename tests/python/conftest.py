import os
import tempfile
from pathlib import Path

import pytest

_MODULES = tempfile.TemporaryDirectory(prefix="transformers-modules-")
os.environ["HF_MODULES_CACHE"] = _MODULES.name  # transformers copies the code of models there before it runs it
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the cores; so do the programs that they start
    os.environ.setdefault("OMP_NUM_THREADS", "1")

SHARED = Path(os.environ.get("QUANTRATURE_SHARED") or Path(__file__).resolve().parents[3] / "shared")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of dossiers, oracles and models beside the checkout or at QUANTRATURE_SHARED, where there is one."""
    if not SHARED.is_dir():
        pytest.skip(f"needs {SHARED}")
    return SHARED


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny Llama and its tokenizer; not to be written to."""
    from tiny_models import byte_tokenizer, tiny_model

    folder = tmp_path_factory.mktemp("tiny") / "llama"
    tiny_model("llama").save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(params=["numpy", "torch"])
def library(request: pytest.FixtureRequest):
    """Turns a NumPy array into an array of each supported library."""
    if request.param == "numpy":
        return lambda x: x
    import torch

    return torch.from_numpy


@pytest.fixture
def every_target():
    """Iterates over the kernel sets of this CPU, each in force while it is yielded."""
    import quantrature

    before = quantrature.target()

    def iterate():
        for name in quantrature.available_targets():
            quantrature.set_target(name)
            yield name

    yield iterate
    quantrature.set_target(before)
