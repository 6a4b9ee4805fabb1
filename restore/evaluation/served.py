"""A model behind a server, measured as its users meet it: vLLM, alone or behind `ard serve`, over /v1/completions."""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np

from ard_serve.console import track
from ard_serve.errors import EngineDiedError, UsageError
from restore.evaluation.reader import Likelihood, Request

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CONNECT_S = 10.0
# Requests at once: the engine batches them, the gateway queues what does not fit.
_STREAMS = 16


class Served:
    """A `Reader` of the model that a server names first."""

    def __init__(self, url: str) -> None:
        """Ask the server what it serves; a key is taken from the environment variable OPENAI_API_KEY.

        Raises:
            UsageError: nothing that speaks OpenAI's protocol answers there.
        """
        self.url = url.rstrip("/").removesuffix("/v1")
        key = os.environ.get("OPENAI_API_KEY")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        # A long prompt is read for minutes before the answer begins.
        try:
            self._client = httpx.Client(base_url=self.url, headers=headers, timeout=httpx.Timeout(None, connect=_CONNECT_S))
            reply = self._client.get("/v1/models", timeout=_CONNECT_S)
            card = reply.raise_for_status().json()["data"][0]
            self._name, self.window = str(card["id"]), int(card["max_model_len"])
        except (httpx.HTTPError, httpx.InvalidURL, ValueError, LookupError, TypeError) as error:
            raise UsageError(f"server = {url}: no vLLM answers there ({error}); start it with `ard serve`") from None

    def score(self, requests: Sequence[Request], description: str) -> list[Likelihood]:
        results = []
        rows = [(*request.context, *request.continuation) for request in requests]
        for request, (log_probs, greedy) in zip(requests, self._each(self._read, rows, description), strict=True):
            size = len(request.continuation)
            results.append(Likelihood(float(log_probs[-size:].sum()), bool(greedy[-size:].all())))
        return results

    def log_probs(self, rows: Sequence[Sequence[int]], positions: Sequence[int], advance: Callable[[int], None]) -> np.ndarray:
        found = []
        # One after the other: windows are long, and every position of every window comes back.
        for row in rows:
            found.append(self._read(row)[0][np.array(positions) - 1])
            advance(len(row))
        return np.stack(found)

    def continue_greedily(
        self, prompts: Sequence[Sequence[int]], new_tokens: int, advance: Callable[[int], None]
    ) -> list[list[int]]:
        written = []
        with ThreadPoolExecutor(_STREAMS) as pool:
            for prompt, ids in zip(prompts, pool.map(lambda prompt: self._continue(prompt, new_tokens), prompts), strict=True):
                written.append(ids)
                advance(len(prompt))
        return written

    def generate(
        self,
        prompts: Sequence[str],
        stops: Sequence[str],
        new_tokens: int,
        tokenizer: "PreTrainedTokenizerBase",
        description: str,
    ) -> list[str]:
        def write(prompt: str) -> str:
            ids = tokenizer(prompt)["input_ids"]
            return str(self._complete(ids, max_tokens=new_tokens, stop=list(stops))["text"])

        return list(self._each(write, prompts, description))

    def _each(self, ask: Callable[[Any], Any], items: Sequence[Any], description: str) -> Iterator[Any]:
        with ThreadPoolExecutor(_STREAMS) as pool:
            futures = [pool.submit(ask, item) for item in items]
            yield from (future.result() for future in track(futures, description))

    def _read(self, row: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Log-probability and whether it is the likeliest, of every token of a row but the first: [T - 1] each.

        The last token is written instead of read, and allowed no other, so that a row may fill the whole window. Its
        log-probability is the model's own: vLLM takes it before the others are ruled out.
        """
        choice = self._complete(row[:-1], max_tokens=1, prompt_logprobs=0, logprobs=1, allowed_token_ids=[row[-1]])
        try:
            # The first token follows nothing; its entry is null.
            inside = [entry[str(token)] for entry, token in zip(choice["prompt_logprobs"][1:], row[1:-1], strict=True)]
            last, likeliest = choice["logprobs"]["token_logprobs"][0], max(choice["logprobs"]["top_logprobs"][0].values())
        except (LookupError, TypeError, ValueError):
            raise UsageError(f"server = {self.url}: answers without prompt_logprobs; only vLLM's server gives them") from None
        log_probs = [*(entry["logprob"] for entry in inside), last]
        return np.array(log_probs, dtype=float), np.array([*(entry["rank"] == 1 for entry in inside), last >= likeliest])

    def _continue(self, prompt: Sequence[int], new_tokens: int) -> list[int]:
        choice = self._complete(prompt, max_tokens=new_tokens, ignore_eos=True, return_token_ids=True)
        return [int(token) for token in choice["token_ids"]]

    def _complete(self, prompt: Sequence[int], **fields: Any) -> dict[str, Any]:
        body = {"model": self._name, "prompt": list(prompt), "temperature": 0, **fields}
        try:
            while (reply := self._client.post("/v1/completions", json=body)).status_code == httpx.codes.TOO_MANY_REQUESTS:
                time.sleep(float(reply.headers.get("Retry-After", 1)))
        except httpx.TransportError as error:
            raise EngineDiedError(f"server = {self.url}: stopped answering ({error}); start it and run this again") from None
        if reply.is_error:
            raise UsageError(f"server = {self.url}: status {reply.status_code}, {reply.text[:300]}")
        choice: dict[str, Any] = reply.json()["choices"][0]
        return choice
