"""`--profile-short`: the native model beside the restored one, checked, and what the report says for having it."""

import json
from pathlib import Path
from typing import Any

from ard_serve.artifact import Manifest
from ard_serve.errors import UsageError
from server.config import ServeConfig
from server.preflight import Checkpoint, check_model


def short_config(config: ServeConfig) -> ServeConfig:
    """Settings of the native model's engine: the other's, with its own folder and window, under the same name."""
    assert config.profile_short is not None
    update = {
        "model": config.profile_short,
        "served_model_name": config.model_name,
        "max_model_len": config.profile_short_tokens,
    }
    return config.model_copy(update=update)


def check_short(config: ServeConfig, main: Checkpoint) -> Checkpoint:
    """Read and verify the native model, as the other one is, and hold the two against each other.

    Raises:
        UsageError: it can never be asked, or its tokens are others.
        ModelError: the folder is damaged.
    """
    if config.attach:
        raise UsageError("--profile-short starts an engine of its own; it does not go together with --attach")
    short = short_config(config)
    checkpoint = check_model(short)
    if checkpoint.window >= main.window:
        raise UsageError(
            f"--profile-short {short.model}: its limit of {checkpoint.window} tokens leaves nothing to {config.model}, whose "
            f"window is {main.window}; use --profile-short-tokens less than that"
        )
    if _vocabulary(short.model) != _vocabulary(config.model):
        raise UsageError(
            f"--profile-short {short.model}: its tokenizer is not that of {config.model}; use the model it was made from"
        )
    return checkpoint


def short_text_loss(manifest: Manifest | None, limit: int) -> list[str]:
    """Where the report found the restored model worse than the native one on short text; lengths up to `limit` tokens."""
    quality = manifest.quality if manifest else None
    if quality is None or quality.native is None or quality.restored is None:
        return []
    native, restored = quality.native, quality.restored
    losses = [
        f"perplexity at {length} tokens {native.perplexity[length]:.1f} -> {score:.1f}"
        for length, score in sorted(restored.perplexity.items())
        if length <= limit and score > native.perplexity.get(length, score)
    ]
    losses += [
        f"{task} {native.tasks[task]:.3f} -> {score:.3f}"
        for task, score in sorted(restored.tasks.items())
        if "perplexity" not in task and score < native.tasks.get(task, score)
    ]
    return losses


def _vocabulary(folder: Path) -> Any:
    """Token ids by text; None where there is no tokenizer.json."""
    path = folder / "tokenizer.json"
    if not path.exists():
        return None
    fields = json.loads(path.read_text(encoding="utf-8"))
    added = {token["content"]: token["id"] for token in fields.get("added_tokens") or () if "id" in token}
    return fields.get("model", {}).get("vocab"), added
