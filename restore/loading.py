"""Open a model: by folder or by its name on the hub, safetensors only, without remote code."""

import os
import re
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ard_serve.errors import ModelError, ResourceError, UsageError
from restore.inspection import Checkpoint, inspect, read_config, transformers_config

__all__ = ["Checkpoint", "inspect", "load", "load_tokenizer", "resolve"]

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
# Neither pickles nor code are ever fetched; `consolidated` and `original` hold the same weights in another layout.
# Cards and reports because the manifest of an export lists them.
_WANTED = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.md", "*.html", "LICENSE*", "NOTICE*", "USE_POLICY*"]
_UNWANTED = ["consolidated*", "original/*", "*/*"]


def resolve(model: str) -> Path:
    """The folder of a model given as a path or as a hub name such as `HuggingFaceTB/SmolLM2-135M`.

    A hub name is downloaded into the hub's cache, or only looked up there when HF_HUB_OFFLINE is set.

    Raises:
        UsageError: neither a folder nor a model that can be had from the hub.
        ResourceError: the download does not fit on the disk or cannot be written.
    """
    folder = Path(model).expanduser()
    if folder.exists():
        return folder
    if not _HUB_NAME.fullmatch(model):
        raise UsageError(f"{model}: no such folder; give a Hugging Face model folder or a hub name such as org/name")
    try:
        return Path(snapshot_download(model, allow_patterns=_WANTED, ignore_patterns=_UNWANTED))
    except (LocalEntryNotFoundError, OfflineModeIsEnabled):
        reason = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the hub cannot be reached"
        raise UsageError(
            f"{model}: no such folder, not in the hub's cache at {constants.HF_HUB_CACHE}, and {reason}; give a folder"
        ) from None
    except HfHubHTTPError as error:
        raise UsageError(f"{model}: the hub refuses it ({_first_line(error)}); check the name, or set HF_TOKEN") from None
    except OSError as error:
        raise ResourceError(f"{model}: the download failed ({error.strerror or _first_line(error)})") from None


def load(
    folder: Path, dtype: torch.dtype, device: torch.device | str = "cpu", config: dict[str, Any] | None = None
) -> PreTrainedModel:
    """Load a causal language model in evaluation mode from a folder that `inspect` passed.

    Args:
        folder: a Hugging Face model folder.
        dtype: of the weights in memory.
        device: where they go, one shard at a time.
        config: replaces the folder's config.json, for example with another RoPE.

    Raises:
        UsageError: no such model.
        ModelError: transformers cannot load it.
    """
    model_config = transformers_config(config if config is not None else read_config(folder))
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            config=model_config,
            dtype=dtype,
            device_map={"": device},
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
        )
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder}: transformers cannot load the model ({_first_line(error)})") from None
    assert isinstance(model, PreTrainedModel)
    model.train(False)
    return model


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model folder.

    Raises:
        ModelError: there is none, or it cannot be read.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(os.fspath(folder), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{folder}: no usable tokenizer ({_first_line(error)}); copy the tokenizer files again") from None
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    return tokenizer


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
