"""Load an exported folder with transformers and with llama.cpp, and compare with what prepare.py expects.

    python tests/clients/gguf_client.py FOLDER

transformers computes with dequantized weights. llama.cpp rounds activations to 8 bits, so log probabilities differ.
"""

import json
import sys
import urllib.request
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import transformers
import xllamacpp
from compare import compare

FILE = "model.gguf"
POSITIONS = 20
LARGEST = 50
"""Tokens whose log probabilities are compared at each position."""
TOLERANCE = 0.15
"""Largest difference of a log probability, for the rounding of activations."""


def with_transformers(folder, expected):
    """Compare weights, logits and greedy tokens; return the model."""
    print(f"  gguf {version('gguf')}, transformers {transformers.__version__}")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    config = transformers.AutoConfig.from_pretrained(folder)
    # transformers does not read how rotary embeddings are scaled, nor the head dimension of some models.
    complete = config.model_type in ("llama", "qwen2") and config.rope_parameters["rope_type"] == "default"
    given = {} if complete else {"config": config}
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=FILE, dtype=torch.float32, **given)
    ids = expected["/prompt"].tolist()
    written = []
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].numpy()
        for _ in expected["/greedy"]:
            written.append(int(model(torch.tensor([ids + written])).logits[0, -1].argmax()))
    weights = {name: (t.numpy(), 0.0) for name, t in model.state_dict().items() if name in expected}
    compare(expected, weights, logits, written)
    return model


def server(folder):
    """Return a server of llama.cpp."""
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(folder / FILE)
    parameters.n_ctx, parameters.n_parallel, parameters.cpuparams.n_threads = 256, 1, 1
    parameters.warmup, parameters.verbosity, parameters.n_gpu_layers = False, 0, 0
    return xllamacpp.Server(parameters)


def asked(llama, what, **how):
    """Return the answer of a server."""
    request = urllib.request.Request(
        f"{llama.listening_address}/{what}", json.dumps(how).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as file:
        return json.load(file)


def greedy_tokens(llama, prompt, tokens):
    """Return the most probable tokens that follow a prompt."""
    how = {"temperature": 0.0, "cache_prompt": False, "ignore_eos": True, "return_tokens": True}
    return asked(llama, "completion", prompt=prompt, n_predict=tokens, **how)["tokens"]


def log_probabilities(llama, prompt):
    """Return the largest log probabilities of the token that follows a prompt."""
    # The server leaves out tokens that are not whole characters. The bias makes it take the first token of the prompt.
    how = {"n_probs": LARGEST, "temperature": 0.0, "cache_prompt": False, "logit_bias": [[prompt[0], 100.0]]}
    (found,) = asked(llama, "completion", prompt=prompt, n_predict=1, **how)["completion_probabilities"]
    return {each["id"]: each["logprob"] for each in found["top_logprobs"]}


def with_llama_cpp(folder, expected, model):
    """Compare tokens, log probabilities and greedy text."""
    print(f"  xllamacpp {version('xllamacpp')}")
    llama, ids = server(folder), expected["/prompt"].tolist()
    tokens = asked(llama, "tokenize", content=str(expected["/text of the prompt"]), add_special=True)["tokens"]
    if tokens != ids:
        sys.exit(f"  tokens differ: {tokens} instead of {ids}")
    print(f"  tokens:  the same {len(tokens)}")
    wanted_text = expected["/greedy"].tolist()
    text = ids + wanted_text
    with torch.no_grad():
        every = model(torch.tensor([text])).logits[0].log_softmax(-1)
    best, near, worst = 0, 0, 0.0
    for place in np.linspace(1, len(text), POSITIONS).astype(int).tolist():
        wanted = every[place - 1]
        found = log_probabilities(llama, text[:place])
        first = max(found, key=found.get)
        best += first == int(wanted.argmax())
        near += close(wanted, first)
        worst = max(worst, *(abs(value - float(wanted[token])) for token, value in found.items()))
    print(f"  log probabilities: largest difference {worst:.2g}; the best token is the same at {best} of {POSITIONS}")
    if worst > TOLERANCE or near < POSITIONS:
        sys.exit(f"  log probabilities may differ by {TOLERANCE}, and the best token must be nearly as probable here")
    greedy = greedy_tokens(llama, ids, len(wanted_text))
    same = next((i for i, pair in enumerate(zip(greedy, wanted_text, strict=True)) if pair[0] != pair[1]), len(greedy))
    if same < len(greedy) and not close(every[len(ids) + same - 1], greedy[same]):
        sys.exit(f"  greedy tokens differ: {greedy} instead of {wanted_text}")
    print(f"  greedy:  the same {same} tokens" + (", then two are as probable" if same < len(greedy) else ""))


def close(wanted, token):
    """Whether a token is as probable as the best one, but for rounding."""
    return float(wanted.max() - wanted[token]) <= 2 * TOLERANCE


def main(folder):
    """Compare with both clients."""
    folder = Path(folder)
    expected = np.load(folder / "expected.npz")
    model = with_transformers(folder / "model", expected)
    with_llama_cpp(folder / "model", expected, model)


if __name__ == "__main__":
    main(*sys.argv[1:])
