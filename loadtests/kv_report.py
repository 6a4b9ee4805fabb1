"""Predicted against measured memory: what config.json says, what the server reports, where preemption began."""

from typing import Any

from ard_serve.errors import ModelError
from loadtests.memory import fitting_concurrency, kv_shape, read_config
from loadtests.records import CellResult, RunResult
from loadtests.target import Target


def describe_kv(result: RunResult, target: Target) -> dict[str, Any]:
    """The memory part of a result; what is not known is absent."""
    described: dict[str, Any] = {}
    cache = result.server.get("cache", {})
    closed = [cell for cell in result.cells if cell.concurrency is not None]
    if target.model_dir is not None:
        try:
            dtype = cache.get("cache_dtype") or "auto"
            shape = kv_shape(read_config(target.model_dir), dtype)
            described |= {
                "kind": shape.kind,
                "dtype": dtype,
                "bytes_per_token": shape.bytes_per_token,
                "state_layers": shape.state_layers,
                "request_bytes": {
                    str(length): shape.bytes_for(length + int(result.settings["output_tokens"]))
                    for length in sorted({cell.length for cell in closed})
                },
            }
        except ModelError as error:
            described["unknown"] = str(error)
    if target.kv_tokens is None:
        return described
    described["pool_tokens"] = target.kv_tokens
    # vLLM 0.32 states the bytes it was given, not those that remain after a block override.
    pool, blocks = cache.get("kv_cache_memory_bytes", ""), cache.get("num_gpu_blocks", "")
    if cache.get("num_gpu_blocks_override", "None") == "None" and pool.isdigit() and blocks.isdigit():
        described["reported_bytes_per_token"] = int(pool) / (int(blocks) * target.block_tokens)
    described["lengths"] = {
        str(length): _at_length([cell for cell in closed if cell.length == length], result, target)
        for length in sorted({cell.length for cell in closed})
    }
    return described


def _at_length(cells: list[CellResult], result: RunResult, target: Target) -> dict[str, Any]:
    assert target.kv_tokens is not None
    length = cells[0].length
    tokens = length + int(result.settings["output_tokens"])
    fits = fitting_concurrency(tokens, target.kv_tokens, target.block_tokens)
    # An engine admits a request when its prompt fits. One more than fit whole is admitted only if the outputs' share makes
    # the difference, and then somebody is preempted; otherwise it waits its turn.
    admitted = fitting_concurrency(length, target.kv_tokens, target.block_tokens)
    preempted = [cell.concurrency for cell in cells if cell.memory.preemptions]
    calm = [cell.concurrency for cell in cells if cell.memory.preemptions == 0]
    return {
        "fits": fits,
        "predicted_preemption_at": fits + 1 if admitted > fits else None,
        "observed_preemption_at": min((c for c in preempted if c), default=None),
        "largest_without": max((c for c in calm if c), default=None),
    }
