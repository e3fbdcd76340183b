"""Train the model in ``model/`` from random weights: ``python -m quantrature.demo.train --compile``.

The model that ships saw the standard library of Python 3.11 for 2,200 steps, 9 million tokens, in an hour or so on two
busy cores: 1,600 steps of a run with ``--steps 4000``, which a checkpoint took over into one with ``--steps 2200``. Its
perplexity on :func:`quantrature.demo.text.evaluation_text` was 10.88 then, 1.116 bits a byte.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from . import text

WINDOW = 256
END_OF_TEXT = "<|endoftext|>"
FINAL_LEARNING_RATE = 0.02  # as a fraction of the peak


def parse_arguments() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m quantrature.demo.train",
        description="Train the demo model on the standard library of the running Python.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "model")
    parser.add_argument("--checkpoint", type=Path, help="file for the training state, to resume from")
    parser.add_argument("--steps", type=int, default=2200)
    parser.add_argument("--batch", type=int, default=16, help="windows per step")
    parser.add_argument("--learning-rate", type=float, default=4e-3, help="peak of the cosine schedule")
    parser.add_argument("--warmup", type=int, default=200, help="steps up to the peak")
    parser.add_argument("--weight-decay", type=float, default=0.1, help="weight decay of matrices; norms have none")
    parser.add_argument("--vocabulary", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--intermediate", type=int, default=384)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--heads", type=int, default=4, help="query heads; every two share a key/value head")
    parser.add_argument("--report-every", type=int, default=250, help="steps between reports and checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compile", action="store_true", help="use torch.compile, which needs a C++ compiler")
    return parser.parse_args()


def train_tokenizer(corpus: str, vocabulary: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on ``corpus``. Its end-of-text token is for padding and occurs in no text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    # One string and not lines, so that a line end and the indentation after it can become one token.
    tokenizer.train_from_iterator([corpus], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerFast, part: str) -> torch.Tensor:
    """Return the token ids of a text, int64, one-dimensional."""
    return torch.tensor(tokenizer.backend_tokenizer.encode(part).ids)


def build_model(options: argparse.Namespace, end_of_text: int) -> LlamaForCausalLM:
    """Return a model with random weights."""
    config = LlamaConfig(
        vocab_size=options.vocabulary,
        hidden_size=options.hidden,
        intermediate_size=options.intermediate,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        num_key_value_heads=options.heads // 2,
        max_position_embeddings=WINDOW,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=end_of_text,
        pad_token_id=end_of_text,
    )
    return LlamaForCausalLM(config)


def batches(tokens: torch.Tensor, size: int, seed: int) -> Iterator[torch.Tensor]:
    """Yield batches of windows endlessly. Each epoch cuts the text at other positions and in another order."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        start = int(torch.randint(WINDOW, (), generator=generator))
        windows = _windows(tokens[start:])
        order = torch.randperm(len(windows), generator=generator)
        for chosen in order.split(size):
            if len(chosen) == size:
                yield windows[chosen]


def learning_rate(step: int, options: argparse.Namespace) -> float:
    """Return the learning rate of a step (from 1): a linear warm-up, then a half cosine."""
    if step <= options.warmup:
        return float(options.learning_rate * step / options.warmup)
    progress = (step - options.warmup) / (options.steps - options.warmup)
    cosine = (1 + math.cos(math.pi * progress)) / 2
    return float(options.learning_rate * (FINAL_LEARNING_RATE + (1 - FINAL_LEARNING_RATE) * cosine))


@torch.inference_mode()
def held_out_loss(model: LlamaForCausalLM, tokens: torch.Tensor) -> float:
    """Return the mean loss, in nats per token, over consecutive windows that share no context."""
    windows = _windows(tokens)
    total = math.fsum(float(model(input_ids=b, labels=b, use_cache=False).loss) * len(b) for b in windows.split(32))
    return total / len(windows)


def _windows(tokens: torch.Tensor) -> torch.Tensor:
    return tokens[: len(tokens) // WINDOW * WINDOW].view(-1, WINDOW)


def train(
    model: LlamaForCausalLM, training: torch.Tensor, monitored: torch.Tensor, options: argparse.Namespace
) -> None:
    """Train ``model`` in place, from its checkpoint if there is one."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    norms = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    groups = [{"params": matrices, "weight_decay": options.weight_decay}, {"params": norms, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
    done = 0
    if options.checkpoint and options.checkpoint.exists():
        saved = torch.load(options.checkpoint)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        done = saved["step"]
    forward = torch.compile(model) if options.compile else model
    source = itertools.islice(batches(training, options.batch, options.seed), done, None)
    started, recent = time.monotonic(), []
    for step, batch in enumerate(itertools.islice(source, options.steps - done), done + 1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, options)
        loss = forward(input_ids=batch, labels=batch, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        recent.append(loss.item())
        if step % options.report_every == 0 or step == options.steps:
            held_out = held_out_loss(model, monitored)
            print(
                f"step {step}: training loss {sum(recent) / len(recent):.4f}, held-out loss {held_out:.4f}, "
                f"{(step - done) * batch.numel() / (time.monotonic() - started):.0f} tokens/s",
                flush=True,
            )
            recent.clear()
            if options.checkpoint:
                partial = options.checkpoint.with_suffix(".partial")
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
                torch.save(state, partial)
                partial.replace(options.checkpoint)


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Save model and tokenizer to ``folder``. The tokenizer is saved without indentation, which halves its size."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(content, ensure_ascii=False, separators=(",", ":")), encoding="utf-8")


def main() -> None:
    """Train, evaluate and save."""
    options = parse_arguments()
    torch.manual_seed(options.seed)
    torch.set_num_threads(options.threads)
    corpus = text.training_text()
    tokenizer = train_tokenizer(corpus, options.vocabulary)
    training = encode(tokenizer, corpus)
    monitored = encode(tokenizer, text.calibration_text())[:65_536]
    model = build_model(options, tokenizer.eos_token_id)
    print(
        f"{len(corpus.encode()):,} bytes, {len(training):,} tokens, {model.num_parameters():,} parameters",
        flush=True,
    )
    train(model, training, monitored, options)

    evaluation_text = text.evaluation_text()
    evaluation = encode(tokenizer, evaluation_text)
    print(f"evaluation loss {held_out_loss(model, evaluation):.4f} in float32", flush=True)
    model.bfloat16()
    save(model, tokenizer, options.output)
    loss = held_out_loss(model.float(), evaluation)
    bits = loss * len(evaluation) / len(evaluation_text.encode()) / math.log(2)
    print(f"evaluation loss {loss:.4f} with bfloat16 weights: perplexity {math.exp(loss):.3f}, {bits:.4f} bits/byte")


if __name__ == "__main__":
    main()
