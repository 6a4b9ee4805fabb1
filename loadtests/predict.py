"""`ard loadtest --predict MODEL --gpu-memory 80GiB`: what would fit, from the model folder alone, without a server."""

from dataclasses import dataclass
from typing import Any

from ard_serve import console
from ard_serve.errors import ResourceError
from loadtests.config import PredictConfig
from loadtests.memory import KvShape, blocks_held, kv_shape, read_config, weight_bytes
from loadtests.units import parse_bytes, short_bytes, short_count

_BLOCK_TOKENS = 16
_SHORTEST = 1024


@dataclass(frozen=True)
class Prediction:
    """Bytes on one GPU, and for each prompt length how many requests fit at once."""

    shape: KvShape
    weights_bytes: int
    pool_bytes: int
    longest_tokens: int
    fits: dict[int, int]


def predict(config: PredictConfig) -> Prediction:
    """Do the arithmetic.

    Raises:
        ModelError: config.json or the weights cannot be read.
        ResourceError: the weights leave nothing for the KV cache; says what would.
    """
    model = read_config(config.model)
    shape = kv_shape(model, config.kv_dtype, config.tensor_parallel)
    whole_bytes = parse_bytes(config.weights_memory) if config.weights_memory else weight_bytes(config.model)
    weights_bytes = -(-whole_bytes // config.tensor_parallel)
    allowed_bytes = int(parse_bytes(config.gpu_memory) * config.gpu_memory_utilization)
    pool_bytes = allowed_bytes - weights_bytes - parse_bytes(config.overhead)
    if pool_bytes <= 0:
        needed_bytes = (weights_bytes + parse_bytes(config.overhead)) / config.gpu_memory_utilization
        raise ResourceError(
            f"{config.gpu_memory}: weights of {short_bytes(weights_bytes)} and {config.overhead} overhead leave nothing for "
            f"the KV cache; use more than {short_bytes(needed_bytes)} a GPU or a larger --tensor-parallel"
        )
    lengths = config.lengths or _default_lengths(model, config.output_tokens)
    fits = {length: pool_bytes // _request_bytes(shape, length + config.output_tokens) for length in lengths}
    return Prediction(shape, weights_bytes, pool_bytes, _longest(shape, pool_bytes), fits)


def run(config: PredictConfig) -> int:
    """Print the prediction; returns 0."""
    found = predict(config)
    shape = found.shape
    rows = [
        (short_count(length), short_bytes(_request_bytes(shape, length + config.output_tokens)), f"{count:,}", f"{count + 1:,}")
        for length, count in found.fits.items()
    ]
    per_token = f"{shape.bytes_per_token:,} bytes of KV per token ({shape.kind})"
    title = (
        f"{config.model.name}: {per_token}, {short_bytes(found.pool_bytes)} of {config.gpu_memory} for it after "
        f"{short_bytes(found.weights_bytes)} of weights; it would hold {found.longest_tokens:,} tokens of one request"
    )
    console.print_table(title, ("prompt", "KV of a request", "fit at once", "waits or preempts from"), rows)
    if shape.state_layers:
        console.err.print(f"{shape.state_layers} layers keep a state of fixed size, which is not counted", highlight=False)
    return 0


def _request_bytes(shape: KvShape, tokens: int) -> int:
    """Whole blocks; a model of state layers alone holds no KV, and one byte keeps the division defined."""
    return max(1, shape.bytes_for(blocks_held(tokens, _BLOCK_TOKENS) * _BLOCK_TOKENS))


def _longest(shape: KvShape, pool_bytes: int) -> int:
    low, high = 0, 1 << 40
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if _request_bytes(shape, middle) <= pool_bytes else (low, middle - 1)
    return low


def _default_lengths(model: dict[str, Any], output_tokens: int) -> tuple[int, ...]:
    window = int(model.get("max_position_embeddings") or 32768)
    rope = model.get("rope_scaling") or model.get("rope_parameters") or {}
    # A linear stretch keeps the native window in max_position_embeddings; every other type states the stretched one.
    if rope.get("rope_type") == "linear":
        window = int(window * float(rope.get("factor", 1)))
    lengths = [1 << step for step in range(10, 31) if _SHORTEST <= 1 << step < window - output_tokens]
    return (*lengths, max(1, window - output_tokens))
