"""Train a small model of another family with a short native window, to see that a recipe is not tuned to one model.

    python -m scripts.train_small qwen3 --data books/train --held-out books/validation --out models/qwen3-small --minutes 4

Minutes on a GPU give a model that has read the books a few times: poor, but its own, with a window of 512 tokens that
`ard restore --target-length 4096` then stretches. Its tokenizer is learnt from the same text.
"""

import argparse
import math
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from ard_serve.console import progress, setup_logging
from ard_serve.errors import ArdError
from restore import devices
from restore.data import Document, TokenStream, Windows, evenly_spaced, read_documents, tokenize

# What makes a family: the heads of Qwen3 are normalised and wider than hidden / heads, Qwen2 has biases, Mistral neither.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 8},
    "mistral": {"num_key_value_heads": 2, "sliding_window": None},
    "qwen2": {"num_key_value_heads": 2, "tie_word_embeddings": True},
    "qwen3": {"num_key_value_heads": 4, "head_dim": 96, "tie_word_embeddings": True},
}
_SHAPE = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8}
_PEAK_RATE, _FLOOR, _WARM_UP = 1e-3, 0.05, 0.03
_SHOWN_EVERY = 20
_END = "<|end|>"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", choices=sorted(FAMILIES), help="whose architecture")
    parser.add_argument("--data", nargs="+", required=True, help="text to train on")
    parser.add_argument("--held-out", nargs="+", required=True, help="text to measure on")
    parser.add_argument("--out", type=Path, required=True, help="folder of the model")
    parser.add_argument("--window", type=int, default=512, help="native window in tokens")
    parser.add_argument("--vocabulary", type=int, default=8192, help="tokens of the tokenizer")
    parser.add_argument("--layers", type=int, default=_SHAPE["num_hidden_layers"], help="decoder layers")
    parser.add_argument("--batch-tokens", type=int, default=65_536, help="tokens of an optimizer step")
    parser.add_argument("--minutes", type=float, default=4.0, help="time to train for")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    setup_logging()
    try:
        run(given)
    except ArdError as error:
        print(f"train_small: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def run(given: argparse.Namespace) -> None:
    documents, held_documents = read_documents(given.data), read_documents(given.held_out)
    tokenizer = learn_tokenizer(documents, given.vocabulary, given.window)
    train, held = (tokenize(part, tokenizer, len(tokenizer)) for part in (documents, held_documents))
    torch.manual_seed(given.seed)
    fields = _SHAPE | FAMILIES[given.family] | {"num_hidden_layers": given.layers}
    config = AutoConfig.for_model(
        given.family, vocab_size=len(tokenizer), max_position_embeddings=given.window, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, **fields,
    )  # fmt: skip
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(device)  # type: ignore[no-untyped-call]
    batches = _batches(Windows(train, given.window, given.seed), max(1, given.batch_tokens // given.window), device)
    tokens = fit(model, batches, 60 * given.minutes)
    perplexity = math.exp(held_out_loss(model, held, given.window))
    model.to(torch.bfloat16).save_pretrained(given.out)
    tokenizer.save_pretrained(given.out)
    count = sum(parameter.numel() for parameter in model.parameters())
    print(
        f"{given.out}: {given.family}, {count / 1e6:.1f}M weights, read {tokens / 1e6:.1f}M tokens "
        f"({tokens / len(train.ids):.1f} times the text), perplexity {perplexity:.2f} on {held.documents} held-out documents"
    )


def learn_tokenizer(documents: Sequence[Document], size: int, window: int) -> PreTrainedTokenizerFast:
    learnt = ByteLevelBPETokenizer()
    learnt.train_from_iterator((document.text for document in documents), vocab_size=size, special_tokens=[_END])
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=learnt._tokenizer, eos_token=_END, pad_token=_END, model_max_length=window
    )


def fit(model: Any, batches: Iterator[Tensor], seconds: float) -> int:
    """Train for a time: warm-up and cosine follow the clock, so that a run always ends at its lowest rate. Tokens read."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=_PEAK_RATE, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    started, tokens, step, shown_s = time.monotonic(), 0, 0, 0.0
    model.train()
    with progress("train", round(seconds)) as bar:
        while (spent := time.monotonic() - started) < seconds:
            for group in optimizer.param_groups:
                group["lr"] = _rate(spent / seconds)
            ids_BT = next(batches)
            with _bf16(ids_BT.device.type):
                loss = model(ids_BT, labels=ids_BT).loss
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            tokens, step = tokens + ids_BT.numel(), step + 1
            if step % _SHOWN_EVERY == 0:
                bar.advance(spent - shown_s, f"loss {loss.item():.3f}")
                shown_s = spent
    return tokens


def _bf16(device_type: str) -> torch.autocast:
    """Products in bf16, where they are faster than in fp32."""
    return torch.autocast(device_type, dtype=torch.bfloat16, enabled=devices.is_fast("bf16", device_type))


def _rate(done: float) -> float:
    """Learning rate when a share `done` of the time is over."""
    return _PEAK_RATE * min((done + 1e-3) / _WARM_UP, _FLOOR + (1 - _FLOOR) * math.cos(math.pi * done / 2) ** 2)


def _batches(windows: Windows, count: int, device: str) -> Iterator[Tensor]:
    number = 0
    while True:
        yield torch.cat([windows[number + i] for i in range(count)]).to(device)
        number += count


@torch.no_grad()
def held_out_loss(model: Any, stream: TokenStream, window: int) -> float:
    """Mean next-token loss in nats on held-out windows."""
    model.eval()
    losses = []
    for ids_BT in evenly_spaced(stream, window, 64):
        on_device = ids_BT.to(model.device)
        with _bf16(model.device.type):
            losses.append(model(on_device, labels=on_device).loss.item())
    return float(np.mean(losses))


if __name__ == "__main__":
    sys.exit(main())
