"""A small random Llama that a real vLLM serves: `python tests/helpers_tiny_llama.py FOLDER`."""

import sys
from pathlib import Path
from typing import Any

WINDOW = 2048
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_tiny_llama(folder: Path, window: int = WINDOW) -> Path:
    """With a byte-level tokenizer and a chat template; `window` in tokens.

    Not the tiniest: its weights (120 MB) fill no processor's cache, so that a long answer takes seconds on any machine. An
    engine that makes tokens faster than its API process passes them on sends them in one piece.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast: Any = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, bos_token="<|bos|>", eos_token="<|im_end|>"
    )
    fast.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320, hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=window, bos_token_id=256, eos_token_id=257,
    )  # fmt: skip
    network: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)  # type: ignore[no-untyped-call]
    network.save_pretrained(folder)
    return folder


if __name__ == "__main__":
    write_tiny_llama(Path(sys.argv[1]))
