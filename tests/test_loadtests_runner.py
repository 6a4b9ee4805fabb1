"""Whole load tests over real sockets, against a mock server whose truth is known, in its own process."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ard_serve.errors import ArdError, DataError, EngineDiedError, ModelError, ResourceError, UsageError
from loadtests.config import LoadConfig
from loadtests.records import RunResult
from loadtests.runner import run

StartMock = Callable[..., str]


@pytest.fixture
def start_mock() -> Iterator[StartMock]:
    """Starts mock servers with the flags given and returns their addresses."""
    running: list[subprocess.Popen[str]] = []

    def start(**flags: object) -> str:
        options = []
        for name, value in flags.items():
            flag = name.replace("_", "-")
            options.append(f"--{'' if value else 'no-'}{flag}" if isinstance(value, bool) else f"--{flag}={value}")
        command = [sys.executable, "-m", "loadtests.mock_server", *options]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        running.append(process)
        assert process.stdout is not None
        return f"http://127.0.0.1:{int(process.stdout.readline())}"

    yield start
    for process in running:
        process.kill()
        process.wait()


def config(url: str, out: Path, **fields: object) -> LoadConfig:
    quick: dict[str, object] = {
        "url": url, "out": out, "lengths": (256, 512), "concurrencies": (1, 4), "output_tokens": 8, "requests_per_cell": 4,
        "check_client": False, "warm_up": 0, "report": False,
    }  # fmt: skip
    return LoadConfig.model_validate(quick | fields)


def result_of(out: Path) -> RunResult:
    return RunResult.model_validate_json((out / "result.json").read_bytes())


@pytest.mark.timing
def test_grid_measures_the_truth_and_writes_every_file(start_mock: StartMock, tmp_path: Path) -> None:
    url = start_mock(ttft_ms=100, itl_ms=20)
    assert run(config(url, tmp_path, report=True)) == 0
    result = result_of(tmp_path)
    assert result.status == "complete"
    assert [cell.cell for cell in result.cells] == ["256x1", "256x4", "512x1", "512x4"]
    for cell in result.cells:
        assert cell.outcomes == {"ok": 4}
        assert cell.ttft_ms is not None
        assert cell.itl_ms is not None
        assert cell.e2e_ms is not None
        assert cell.ttft_ms.p50 == pytest.approx(100, abs=25)
        assert cell.itl_ms.p50 == pytest.approx(20, abs=4)
        assert cell.itl_ms.n == 4 * 7
        assert cell.e2e_ms.p50 == pytest.approx(240, abs=40)
        assert cell.accuracy is not None
        assert cell.accuracy.rate == 1
        assert not cell.refused
        assert cell.flags == []
        concurrency = cell.concurrency or 0
        assert cell.output_tokens_per_s == pytest.approx(8 / 0.24 * concurrency, rel=0.25)
        assert cell.memory.preemptions == 0
    assert {path.name for path in tmp_path.iterdir()} == {
        "result.json", "requests.jsonl", "cells.csv", "trace.jsonl", "summary.md", "report.html"
    }  # fmt: skip
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.count("<svg") >= 4
    assert not re.findall(r"(?:src|href)\s*=\s*[\"']https?:", page), "the page must need nothing from outside"


def test_prompts_are_exact_and_never_alike(start_mock: StartMock, tmp_path: Path) -> None:
    assert run(config(start_mock(ttft_ms=1, itl_ms=1), tmp_path, lengths=(256, 333))) == 0
    measured = [record for record in result_of(tmp_path).requests if record.outcome == "ok"]
    assert all(record.reported_prompt_tokens == record.prompt_tokens for record in measured)
    assert {record.prompt_tokens for record in measured} == {256, 333}
    lines = [json.loads(line) for line in (tmp_path / "requests.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(lines) >= len(measured)
    assert all(len(line["gaps_ms"]) == line["events"] - 1 for line in lines if line["outcome"] == "ok")


@pytest.mark.timing
def test_defaults_follow_the_window_and_cross_the_preemption_point(start_mock: StartMock, tmp_path: Path) -> None:
    url = start_mock(ttft_ms=50, itl_ms=40, max_model_len=2200, kv_blocks=258)
    assert run(config(url, tmp_path, lengths=(), concurrencies=())) == 0
    result = result_of(tmp_path)
    assert {cell.length for cell in result.cells} == {1024, 2048, 2192}
    at_1k = result.kv["lengths"]["1024"]
    # 257 usable blocks of 16: four prompts of 64 blocks are admitted, and outgrow them with 65 each.
    assert at_1k["fits"] == 3
    assert at_1k["predicted_preemption_at"] == at_1k["observed_preemption_at"] == 4
    assert at_1k["largest_without"] == 2
    for cell in result.cells:
        assert cell.memory.observed_kv is not None
        assert cell.memory.predicted_kv is not None
        assert min(1, cell.memory.predicted_kv) == pytest.approx(cell.memory.observed_kv, rel=0.3)


@pytest.mark.fault("L1")
def test_server_death_keeps_what_was_measured(start_mock: StartMock, tmp_path: Path) -> None:
    url = start_mock(ttft_ms=20, itl_ms=5, fault="die", fault_after=20)
    with pytest.raises(EngineDiedError, match="measured requests are in") as raised:
        run(config(url, tmp_path, requests_per_cell=8, report=True))
    assert raised.value.exit_code == 70
    result = result_of(tmp_path)
    assert result.status == "server_died"
    ok = [record for record in result.requests if record.outcome == "ok"]
    lost = [record for record in result.requests if record.outcome in ("connection", "no_done")]
    assert len(ok) >= 8
    assert lost
    measured_ok = sum(record.role == "measured" for record in ok)
    assert sum(cell.ttft_ms.n for cell in result.cells if cell.ttft_ms) == measured_ok, "a lost request is in no latency"
    assert (tmp_path / "report.html").stat().st_size > 1000


@pytest.mark.fault("L2")
@pytest.mark.parametrize(("fault", "outcome"), [("429", "rejected"), ("500", "server_error"), ("error_event", "error_event")])
def test_refusals_and_errors_are_counted_apart(start_mock: StartMock, tmp_path: Path, fault: str, outcome: str) -> None:
    url = start_mock(ttft_ms=5, itl_ms=1, fault=fault, fault_every=4, fault_after=3)
    assert run(config(url, tmp_path, lengths=(256,), concurrencies=(1,), requests_per_cell=12)) == 0
    (cell,) = result_of(tmp_path).cells
    assert cell.outcomes == {"ok": 9, outcome: 3}
    assert cell.ttft_ms is not None
    assert cell.ttft_ms.n == 9
    assert cell.goodput_per_s is not None
    assert cell.requests_per_s is not None
    assert cell.goodput_per_s == cell.requests_per_s
    assert any("3 of 12 requests failed" in flag for flag in cell.flags)


@pytest.mark.timing
@pytest.mark.fault("L2")
def test_timeouts_are_counted_apart(start_mock: StartMock, tmp_path: Path) -> None:
    url = start_mock(ttft_ms=5, itl_ms=1, fault="stall", fault_every=3, fault_after=2)
    fields = {"lengths": (256,), "concurrencies": (1,), "requests_per_cell": 6, "request_timeout_s": 0.5}
    assert run(config(url, tmp_path, **fields)) == 0
    (cell,) = result_of(tmp_path).cells
    assert cell.outcomes == {"ok": 4, "timeout": 2}


@pytest.mark.timing
@pytest.mark.fault("L2")
def test_failures_of_every_kind_at_once_are_counted_apart(start_mock: StartMock, tmp_path: Path) -> None:
    url = start_mock(ttft_ms=5, itl_ms=1, fault="mixed", fault_every=2, fault_after=2)
    out = tmp_path / "out"
    assert run(config(url, out, lengths=(256,), concurrencies=(1,), requests_per_cell=20, request_timeout_s=0.5)) == 0
    (cell,) = result_of(out).cells
    wrong = {"rejected": 2, "server_error": 2, "timeout": 2, "no_done": 2, "error_event": 2}
    assert cell.outcomes == {"ok": 10} | wrong
    assert cell.ttft_ms is not None
    assert cell.ttft_ms.n == 10
    assert "10 of 20 requests failed" in cell.flags[0]


@pytest.mark.timing
@pytest.mark.fault("L3")
def test_open_loop_shows_late_sends_behind_a_stall(start_mock: StartMock, tmp_path: Path) -> None:
    url = start_mock(ttft_ms=5, itl_ms=1, fault="stall", fault_every=1000, fault_after=3)
    fields = {"arrival": "constant", "rates": (20,), "max_in_flight": 1, "lengths": (256,), "requests_per_cell": 10,
              "request_timeout_s": 1.0}  # fmt: skip
    assert run(config(url, tmp_path, **fields)) == 0
    (cell,) = result_of(tmp_path).cells
    assert cell.outcomes == {"ok": 9, "timeout": 1}
    assert cell.scheduled_ms is not None
    assert cell.e2e_ms is not None
    assert cell.e2e_ms.max < 300, "the stall is not in the service time of the others"
    assert cell.scheduled_ms.max > 600, "it is in the time from their planned arrival"
    assert any("sent more than 100 ms late" in flag for flag in cell.flags)


@pytest.mark.fault("L4")
def test_stream_without_done_is_a_failure(start_mock: StartMock, tmp_path: Path) -> None:
    url = start_mock(ttft_ms=5, itl_ms=1, fault="drop", fault_every=2, fault_after=1)
    assert run(config(url, tmp_path, lengths=(256,), concurrencies=(1,))) == 0
    (cell,) = result_of(tmp_path).cells
    assert cell.outcomes == {"no_done": 2, "ok": 2}


@pytest.mark.fault("L5")
@pytest.mark.parametrize(("sent", "code", "status"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")])
def test_interruption_leaves_valid_results(
    start_mock: StartMock, tmp_path: Path, sent: signal.Signals, code: int, status: str
) -> None:
    url = start_mock(ttft_ms=100, itl_ms=20)
    script = (
        # What runs in the background of a script inherits an ignored SIGINT.
        "import signal, sys\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from loadtests.config import LoadConfig\nfrom loadtests.runner import run\n"
        "sys.exit(run(LoadConfig.model_validate_json(sys.argv[1])))"
    )
    wanted = config(url, tmp_path, requests_per_cell=200, concurrencies=(2,)).model_dump_json()
    process = subprocess.Popen([sys.executable, "-c", script, wanted], env=os.environ | {"PYTHONPATH": "."})
    journal = tmp_path / "requests.jsonl"
    deadline_s = time.monotonic() + 30
    while not journal.exists() or journal.read_text(encoding="utf-8").count("\n") < 8:
        assert time.monotonic() < deadline_s
        time.sleep(0.05)
    process.send_signal(sent)
    assert process.wait(30) == code
    result = result_of(tmp_path)
    assert result.status == status
    (cell,) = result.cells
    assert 0 < cell.outcomes["ok"] < 200
    assert cell.ttft_ms is not None


@pytest.mark.fault("L6")
def test_another_host_is_refused_unless_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--allow-host example\.test") as raised:
        run(config("http://example.test:8000", tmp_path))
    assert raised.value.exit_code == 2


def test_a_mistyped_address_wipes_no_older_record(tmp_path: Path) -> None:
    (tmp_path / "requests.jsonl").write_text("{}", encoding="utf-8")
    with pytest.raises(UsageError, match="no answer"):
        run(config("http://127.0.0.2:9", tmp_path))
    assert (tmp_path / "requests.jsonl").read_text(encoding="utf-8") == "{}"


@pytest.mark.fault("L7")
def test_usage_that_disagrees_is_flagged(start_mock: StartMock, tmp_path: Path) -> None:
    url = start_mock(ttft_ms=5, itl_ms=1, fault="short_usage")
    assert run(config(url, tmp_path, lengths=(256,), concurrencies=(1,))) == 0
    (cell,) = result_of(tmp_path).cells
    assert cell.flags == ["the server counts 249 prompt tokens where 256 were sent (4 of 4 requests)"]


@pytest.mark.fault("L8")
def test_cell_that_a_prefix_cache_answered_is_refused(start_mock: StartMock, tmp_path: Path) -> None:
    url = start_mock(ttft_ms=5, itl_ms=1, prefix_cache=True)
    assert run(config(url, tmp_path, lengths=(256,), concurrencies=(1,))) == 0
    result = result_of(tmp_path)
    assert result.cells[0].refused == "the prefix cache answered 1024 of 1024 prompt tokens"
    assert any("refused" in alarm for alarm in result.alarms)
    assert "refused" in (tmp_path / "summary.md").read_text(encoding="utf-8")


def test_repeats_ask_at_the_depths_that_are_left(start_mock: StartMock, tmp_path: Path) -> None:
    url = start_mock(ttft_ms=5, itl_ms=1)
    fields = {"lengths": (256,), "requests_per_cell": 2, "repeats": 3, "depths": 6, "concurrencies": (1, 2)}
    assert run(config(url, tmp_path, **fields)) == 0
    alone, loaded = result_of(tmp_path).cells
    assert [one.n if one else 0 for one in alone.accuracy_by_depth] == [1] * 6
    assert alone.accuracy_by_depth == loaded.accuracy_by_depth


@pytest.mark.timing
def test_answers_that_go_wrong_under_load_raise_an_alarm(start_mock: StartMock, tmp_path: Path) -> None:
    url = start_mock(ttft_ms=30, itl_ms=5, fault="wrong_under_load")
    assert run(config(url, tmp_path, lengths=(256,), requests_per_cell=8)) == 0
    result = result_of(tmp_path)
    alone, loaded = result.cells
    assert alone.accuracy is not None
    assert loaded.accuracy is not None
    assert alone.accuracy.rate == 1
    assert loaded.accuracy.rate == 0
    assert loaded.goodput_per_s == 0
    assert len(result.alarms) == 1
    assert "8 answers right at concurrency 1 are wrong at 4" in result.alarms[0]


@pytest.mark.parametrize("endpoint", ["completions", "chat"])
def test_plain_server_is_measured_by_text(start_mock: StartMock, tmp_path: Path, endpoint: str) -> None:
    url = start_mock(ttft_ms=5, itl_ms=1, strict=True, engine_metrics=False)
    assert run(config(url, tmp_path, lengths=(256,), endpoint=endpoint)) == 0
    result = result_of(tmp_path)
    assert result.server["exact_lengths"] is False
    assert all(cell.outcomes == {"ok": 4} for cell in result.cells)
    assert all(cell.accuracy and cell.accuracy.rate == 1 for cell in result.cells)
    assert all(cell.memory.preemptions is None for cell in result.cells)


def test_hosted_api_wants_its_key_and_no_file_keeps_it(
    start_mock: StartMock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = start_mock(ttft_ms=5, itl_ms=1, strict=True, engine_metrics=False, api_key="sk-sesame")
    out, fields = tmp_path / "out", {"lengths": (256,), "concurrencies": (2,), "api_key_env": "HOSTED_KEY", "report": True}
    monkeypatch.setenv("HOSTED_KEY", "sk-other")
    with pytest.raises(UsageError, match=r"wants a key.*\$HOSTED_KEY"):
        run(config(url, out, **fields))
    monkeypatch.setenv("HOSTED_KEY", "sk-sesame")
    assert run(config(url, out, **fields)) == 0
    assert result_of(out).cells[0].outcomes == {"ok": 4}
    assert not [path for path in out.iterdir() if b"sesame" in path.read_bytes()]


@pytest.mark.timing
def test_trace_is_replayed_with_its_lengths(start_mock: StartMock, tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    lines = [{"timestamp": 200 * n, "input_length": 200 + 10 * n, "output_length": 4 + n} for n in range(6)]
    lines += [
        {"timestamp": 300, "input_length": 5000, "output_length": 4},
        {"timestamp": 1100, "input_length": 9, "output_length": 4},
    ]
    trace.write_text("\n".join(json.dumps(line) for line in lines), encoding="utf-8")
    url = start_mock(ttft_ms=5, itl_ms=1, max_model_len=1000)
    assert run(config(url, tmp_path / "out", arrival="trace", trace=trace, trace_speed=2, lengths=())) == 0
    result = result_of(tmp_path / "out")
    assert result.cells[0].flags == ["1 requests of the trace are longer than the window of 1000 and were left out"]
    sent = sorted(result.requests, key=lambda record: record.index)
    assert [record.prompt_tokens for record in sent] == [200, 210, 220, 230, 240, 250, 9]
    assert [record.output_tokens for record in sent] == [4, 5, 6, 7, 8, 9, 4]
    assert sent[5].sent_s - sent[0].sent_s == pytest.approx(0.5, abs=0.1)


def test_full_disk_is_one_line_and_keeps_the_result(start_mock: StartMock, tmp_path: Path) -> None:
    (tmp_path / "requests.jsonl").symlink_to("/dev/full")
    with pytest.raises(ResourceError, match=r"requests\.jsonl: cannot be written \(No space left.*--out") as raised:
        run(config(start_mock(ttft_ms=5, itl_ms=1), tmp_path))
    assert raised.value.exit_code == 5
    result = result_of(tmp_path)
    assert (result.status, result.cells[0].requests) == ("failed", 0)
    assert "No space left" in result.detail


def test_time_limit_lists_what_it_left_out(start_mock: StartMock, tmp_path: Path) -> None:
    url = start_mock(ttft_ms=50, itl_ms=5)
    assert run(config(url, tmp_path, time_limit_s=0.1)) == 0
    result = result_of(tmp_path)
    assert result.status == "time_limit"
    assert len(result.cells) + len(result.not_run) == 4
    assert result.not_run


@pytest.mark.parametrize(
    ("fields", "error"),
    [({"arrival": "trace", "trace": "missing.csv"}, DataError), ({"lengths": (20,)}, UsageError),
     ({"model_dir": "missing"}, ModelError)],
)  # fmt: skip
def test_mistakes_leave_no_report(
    start_mock: StartMock, tmp_path: Path, fields: dict[str, object], error: type[ArdError]
) -> None:
    with pytest.raises(error):
        run(config(start_mock(), tmp_path, **fields))
    assert not (tmp_path / "result.json").exists()


def test_length_beyond_the_window_says_what_would_fit(start_mock: StartMock, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="window of 512; use --lengths up to 504"):
        run(config(start_mock(max_model_len=512), tmp_path, lengths=(512,)))


@pytest.mark.timing
@pytest.mark.fault("L1")
def test_several_sending_processes_measure_the_same_truth(start_mock: StartMock, tmp_path: Path) -> None:
    url = start_mock(ttft_ms=100, itl_ms=20)
    assert run(config(url, tmp_path / "a", lengths=(256,), processes=2)) == 0
    for cell in result_of(tmp_path / "a").cells:
        assert cell.outcomes == {"ok": 4}
        assert cell.ttft_ms is not None
        assert cell.ttft_ms.p50 == pytest.approx(100, abs=40)
        assert cell.accuracy is not None
        assert cell.accuracy.rate == 1
    dying = start_mock(ttft_ms=20, itl_ms=5, fault="die", fault_after=10)
    with pytest.raises(EngineDiedError):
        run(config(dying, tmp_path / "b", processes=2, requests_per_cell=8))
    assert result_of(tmp_path / "b").status == "server_died"
