"""What a server says of itself before it is loaded: its models, their window, and which engine it is."""

from typing import Any

import httpx

from ard_serve.errors import UsageError
from loadtests.address import Address
from loadtests.config import LoadConfig

# Where engines state their version, and under which key: vLLM, llama.cpp, SGLang.
_VERSIONS = (("/version", "version"), ("/props", "build_info"), ("/server_info", "version"), ("/get_server_info", "version"))
_GATEWAY = "ard serve"


def list_models(address: Address, config: LoadConfig) -> dict[str, Any]:
    """The entry of /v1/models that the run is about.

    Raises:
        UsageError: nobody answers, the key is wrong, the server is not ready, or the model is not served.
    """
    url = f"{address.base}/v1/models"
    try:
        answer = httpx.get(url, headers=address.headers, timeout=30)
    except httpx.HTTPError as error:
        raise UsageError(f"{url}: no answer ({error}); start the server or correct the address") from None
    if answer.status_code in (401, 403):
        raise UsageError(f"{url}: the server wants a key (status {answer.status_code}); put it into ${config.api_key_env}")
    if answer.status_code >= 500:
        raise UsageError(f"{url}: status {answer.status_code}, {answer.text[:120]}; wait until the server has loaded its model")
    try:
        models = {model["id"]: model for model in answer.json()["data"]}
    except (ValueError, KeyError, TypeError):
        raise UsageError(
            f"{url}: status {answer.status_code} and no model list; is this an OpenAI-compatible server?"
        ) from None
    name = config.model or next(iter(models), "")
    if name not in models:
        raise UsageError(f"model '{name}': not served at {address.base}; it serves {', '.join(models) or 'none'}")
    listing: dict[str, Any] = models[name]
    return listing


def window(listing: dict[str, Any]) -> int | None:
    """The longest context of one request: vLLM and SGLang list it, llama.cpp lists that of a slot; else None."""
    meta = listing.get("meta")
    found = listing.get("max_model_len") or (meta.get("n_ctx") if isinstance(meta, dict) else None)
    return int(found) if found else None


def engine_version(address: Address, listing: dict[str, Any], behind: Address | None = None) -> str:
    """The engine's name and version as far as it tells, such as `vllm 0.23.0`, so that a report says what was measured.

    `behind` is where the engine behind a gateway answers, if it is known; both are then named.
    """
    name = str(listing.get("owned_by") or "")
    told = next((found for path, key in _VERSIONS if isinstance(found := _asked(address, path).get(key), str)), "")
    if not told and (info := _asked(address, "/openapi.json").get("info", {})).get("title") == _GATEWAY:
        told = str(info.get("version", ""))
    own = f"{name} {told}".strip()
    if behind is None or behind == address:
        return own
    models = _asked(behind, "/v1/models").get("data") or [{}]
    return ", ".join(part for part in (own, engine_version(behind, models[0])) if part)


def _asked(address: Address, path: str) -> dict[str, Any]:
    """The JSON object at a path, empty where there is none."""
    try:
        answer = httpx.get(address.base + path, headers=address.headers, timeout=10).json()
    except (httpx.HTTPError, ValueError):
        return {}
    return answer if isinstance(answer, dict) else {}
