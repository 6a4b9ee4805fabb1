"""Where token ids come from: the server's own /tokenize, the model's tokenizer.json, or nowhere (text, calibrated)."""

import functools
import logging
from pathlib import Path
from typing import Any, Protocol

import httpx

from ard_serve.errors import ModelError
from loadtests.address import Address

log = logging.getLogger(__name__)


class TokenSource(Protocol):
    """Turns text into the ids that the measured model would see."""

    name: str

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Token ids of `text`, with the model's special tokens if asked."""


class ServerTokens:
    """The server's /tokenize: vLLM reads `prompt`, llama.cpp `content`, and each ignores the other's field."""

    name = "server /tokenize"

    def __init__(self, address: Address, model: str) -> None:
        self._model = model
        self._client = httpx.Client(base_url=address.base, headers=address.headers, timeout=30)

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Token ids of `text`; raises httpx.HTTPError or KeyError where the server has no such route."""
        body = {"model": self._model, "prompt": text, "content": text, "add_special_tokens": special, "add_special": special}
        answer = self._client.post("/tokenize", json=body)
        answer.raise_for_status()
        return [int(token) for token in answer.json()["tokens"]]


class FileTokens:
    """A tokenizer.json read by the `tokenizers` package."""

    def __init__(self, folder: Path) -> None:
        # Imported here: this optional package takes 30 MB, and the other sources do without.
        import tokenizers

        self.name = str(folder / "tokenizer.json")
        try:
            self._tokenizer: Any = tokenizers.Tokenizer.from_file(self.name)
        except Exception as error:  # noqa: BLE001 - the package raises bare Exception
            raise ModelError(f"{self.name}: not a readable tokenizer ({error})") from None

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Token ids of `text`."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=special).ids
        return ids


def find_source(address: Address, model: str, folder: Path | None) -> TokenSource | None:
    """The first source that works: the folder's tokenizer.json, then the server's route, else None."""
    if folder is not None and (folder / "tokenizer.json").is_file():
        try:
            return FileTokens(folder)
        except ImportError:
            log.warning("%s is not read: install the package 'tokenizers' for exact token ids", folder / "tokenizer.json")
    server = ServerTokens(address, model)
    try:
        server.encode("one")
    except (httpx.HTTPError, KeyError, ValueError, TypeError):
        return None
    return server


def leading_ids(source: TokenSource) -> list[int]:
    """The ids that the model expects before any text, such as BOS; often none."""
    plain, special = source.encode("one"), source.encode("one", special=True)
    return next((special[:at] for at in range(len(special)) if special[at : at + len(plain)] == plain), [])


class CachedTokens:
    """A source that remembers, for sentences that come again and again."""

    def __init__(self, source: TokenSource) -> None:
        self.name = source.name
        self.encode = functools.lru_cache(maxsize=4096)(source.encode)
