"""vLLM's own flags after the --: passed through if this vLLM has them, refused if the gateway owns them."""

import sys
from pathlib import Path

import pytest

from ard_serve.errors import EngineDiedError, UsageError
from server import capacity, flags
from server.config import ServeConfig

KNOWN = frozenset({"--model", "--uds", "--max-model-len", "--max-num-seqs", "--kv-cache-dtype", "--trust-remote-code", "-tp"})


@pytest.mark.parametrize(
    "args", [("--max-num-seqs", "8"), ("--kv-cache-dtype=fp8",), ("--max_num_seqs", "8"), ("-tp", "2"), ("value",)]
)
def test_vllms_flags_pass(args: tuple[str, ...]) -> None:
    flags.check_engine_args(args, KNOWN)


@pytest.mark.parametrize(
    ("arg", "ours"),
    [
        ("--port=1", "--port"),
        ("--api-key", "--api-keys"),
        ("--model", "MODEL"),
        ("--max_model_len", "--max-model-len"),
        ("--uds", "socket"),
        ("--trust-remote-code", "never run"),
        ("--trust-remote", "never run"),
        ("--hf-overrides.rope", "config.json"),
        ("--enable-log-requests", "never logged"),
    ],
)
def test_flags_that_the_gateway_owns_are_refused_abbreviations_too(arg: str, ours: str) -> None:
    with pytest.raises(UsageError, match=ours):
        flags.check_engine_args((arg,), KNOWN)


def test_a_flag_this_vllm_lacks_is_refused_before_it_starts() -> None:
    with pytest.raises(UsageError, match="no flag --warp-speed"):
        flags.check_engine_args(("--warp-speed",), KNOWN)


def test_only_flags_that_exist_are_added(tmp_path: Path) -> None:
    config = ServeConfig(model=tmp_path, batch_tokens=1000)
    assert flags.optional_flags(config, frozenset(), on_gpu=False, kv_bytes=5, window=4096, seats=128) == ()
    known = KNOWN - {"--max-num-seqs"} | {
        "--max-num-batched-tokens",
        "--long-prefill-token-threshold",
        "--kv-cache-memory-bytes",
    }
    added = flags.optional_flags(config, known, on_gpu=False, kv_bytes=5, window=4096, seats=128)
    assert " ".join(added) == "--max-num-batched-tokens 1000 --long-prefill-token-threshold 250 --kv-cache-memory-bytes 5"


def test_a_small_window_bounds_the_share_of_a_long_prompt(tmp_path: Path) -> None:
    """vLLM refuses to start with a threshold above its window."""
    known = frozenset({"--long-prefill-token-threshold"})
    added = flags.optional_flags(ServeConfig(model=tmp_path), known, on_gpu=True, kv_bytes=None, window=256, seats=256)
    assert " ".join(added) == "--long-prefill-token-threshold 256"


@pytest.mark.parametrize(("batch_tokens", "told"), [(2048, 1024), (100, 100)])
def test_the_engine_is_told_its_seats_and_no_more_than_a_step_has_tokens(tmp_path: Path, batch_tokens: int, told: int) -> None:
    """vLLM refuses to start with more."""
    config = ServeConfig(model=tmp_path, batch_tokens=batch_tokens)
    added = flags.optional_flags(config, KNOWN, on_gpu=True, kv_bytes=None, window=256, seats=1024)
    assert added == ("--max-num-seqs", str(told))


def test_seats_are_vllms_own_default_where_nobody_says() -> None:
    gib = 1 << 30
    assert [capacity.default_seats(gpus) for gpus in ((), (24 * gib,), (80 * gib, 80 * gib))] == [128, 256, 1024]


@pytest.mark.parametrize(
    ("after", "seats"),
    [
        ("", 128),
        ("--max-num-seqs 8", 8),
        ("--max_num_seqs=8 --data-parallel-size 2", 8),
        ("--max-num-seqs 8 --max-num-seqs 9", 9),
        ("--max-num-active-seqs 5", 5),
        ("--max-num-seqs 200 --max-num-active-seqs 300", 200),
    ],
)
def test_seats_are_what_the_whole_command_line_says(after: str, seats: int) -> None:
    assert capacity.seats(("--max-num-seqs", "128", *after.split())) == seats


def test_seats_that_no_flag_states_are_unknown_and_no_number_is_refused() -> None:
    assert capacity.seats(("--enforce-eager",)) is None
    with pytest.raises(UsageError, match="--max-num-seqs many after --: it must be a whole number"):
        capacity.seats(("--max-num-seqs", "many"))


def test_the_probe_reads_help_and_says_what_is_wrong_when_there_is_none(tmp_path: Path) -> None:
    program = tmp_path / "engine.py"
    program.write_text("print('usage: [--uds UDS] [--enable-x, --no-enable-x]')")
    assert flags.known_flags((sys.executable, str(program))) == {"--uds", "--enable-x", "--no-enable-x"}
    program.write_text("raise SystemExit('no GPU here')")
    with pytest.raises(EngineDiedError, match="no GPU here"):
        flags.known_flags((sys.executable, str(program)))


@pytest.mark.vllm
def test_what_operators_need_for_length_and_several_gpus_passes_to_the_real_vllm(tmp_path: Path) -> None:
    words = (
        "--kv-cache-dtype fp8 --enable-prefix-caching --enable-chunked-prefill --kv-offloading-size 8 --kv-transfer-config {}"
    )
    words += " --tensor-parallel-size 2 --pipeline-parallel-size 2 --data-parallel-size 2 --distributed-executor-backend ray"
    flags.check_engine_args(tuple(words.split()), flags.known_flags(ServeConfig(model=tmp_path).engine_command))


@pytest.mark.vllm
def test_the_probe_of_real_vllm_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    command = ServeConfig(model=tmp_path).engine_command
    known = flags.known_flags(command)
    assert {"--uds", "--long-prefill-token-threshold", "--max-num-batched-tokens", "--kv-cache-memory-bytes"} <= known
    (kept,) = (tmp_path / "ard-serve").iterdir()
    assert flags.known_flags(command) == known
    kept.write_text('["--uds"]')
    assert flags.known_flags(command) == {"--uds"}
