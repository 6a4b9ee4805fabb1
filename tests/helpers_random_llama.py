"""A Llama of a shape of the bench with random weights, for what a real model's head counts do not allow:

    python tests/helpers_random_llama.py 1.7b WINDOW TOKENIZER_FOLDER FOLDER

The tokenizer is another model's, and so is the size of the vocabulary: an engine could not write other tokens. `reference.json`
beside the weights holds what the model itself says to a prompt, to hold an engine to that splits it over GPUs.
"""

import json
import shutil
import sys
from pathlib import Path

import torch
from bench_server_long import unseen_prompt
from transformers import AutoTokenizer

from restore.bench_cases import SHAPES, build_model

_PROMPT_TOKENS, _LIKELIEST = 500, 20


def write_random_llama(shape: str, window: int, tokenizer: Path, folder: Path) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    vocabulary = len(AutoTokenizer.from_pretrained(tokenizer))
    base = SHAPES[shape] | {"max_position_embeddings": window, "vocab_size": vocabulary}
    model = build_model(base, torch.bfloat16, device)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (tokenizer / name).exists():
            shutil.copy(tokenizer / name, folder)
    prompt = [token % vocabulary for token in unseen_prompt(_PROMPT_TOKENS, seed=1)]
    with torch.inference_mode():
        logits = model(torch.tensor([prompt], device=device)).logits[0, -1]
    likeliest = torch.log_softmax(logits.float(), -1).topk(_LIKELIEST)
    pairs = zip(likeliest.indices.tolist(), likeliest.values.tolist(), strict=True)
    reference = {"prompt": prompt, "logprobs": {str(token): value for token, value in pairs}}
    (folder / "reference.json").write_text(json.dumps(reference), encoding="utf-8")


if __name__ == "__main__":
    write_random_llama(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4]))
