"""The files of a run: result.json, requests.jsonl (the session's journal), trace.jsonl, cells.csv, summary.md, report.html."""

import csv
import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ard_serve.errors import DataError, ResourceError
from loadtests.records import CellResult, Distribution, RunResult
from loadtests.units import short_ms, short_number

RESULT = "result.json"
_DISTRIBUTIONS = ("ttft_ms", "itl_ms", "tpot_ms", "e2e_ms", "scheduled_ms", "late_ms")
_EACH_S = ("output_tokens_each_s", "good_requests_each_s")
_PERCENTILES = ("n", "mean", "p50", "p90", "p99", "max")


def read_result(path: Path) -> RunResult:
    """Read `result.json`, named itself or by its folder.

    Raises:
        DataError: it cannot be read, or is no result of this version.
    """
    path = path / RESULT if path.is_dir() else path
    try:
        return RunResult.model_validate_json(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); name a folder that `ard loadtest` wrote") from None
    except ValidationError as error:
        raise DataError(f"{path}: not a result of this version ({error.error_count()} fields do not fit)") from None


def unwritable(path: Path, error: OSError) -> ResourceError:
    """What to raise when a file of a run cannot be written."""
    return ResourceError(f"{path}: cannot be written ({error.strerror}); free the disk or choose another place with --out")


def write_result(result: RunResult, folder: Path) -> None:
    """Write `result.json`, so that a reader sees a whole one at any moment."""
    # The gaps of every event are in requests.jsonl alone: they are nine tenths of the size.
    text = result.model_dump_json(indent=1, exclude={"requests": {"__all__": {"gaps_ms"}}})
    write_text(folder / RESULT, text)


def write_tables(result: RunResult, folder: Path, with_page: bool) -> None:
    """Write the tables, the trace and, `with_page`, the report."""
    write_text(folder / "trace.jsonl", trace_jsonl(result))
    write_text(folder / "cells.csv", cells_csv(result))
    write_text(folder / "summary.md", summary_markdown(result))
    if with_page:
        write_page(result, folder / "report.html")


def write_page(result: RunResult, path: Path) -> None:
    """Write the report."""
    # Imported here: matplotlib takes a second and 40 MB, which the measured part of a run must not pay.
    from loadtests.report import render

    write_text(path, render(result))


def trace_jsonl(result: RunResult) -> str:
    """When each request was due and how long it was, in Mooncake's format: for `--trace` again, or for aiperf."""
    sent = sorted((record for record in result.requests if record.role != "warm_up"), key=lambda record: record.planned_s)
    lines = [
        {"timestamp": round(1000 * (record.planned_s - sent[0].planned_s)), "input_length": record.prompt_tokens,
         "output_length": max(1, record.output_tokens)}
        for record in sent
    ]  # fmt: skip
    return "".join(json.dumps(line) + "\n" for line in lines)


def cells_csv(result: RunResult) -> str:
    """One row for each cell, one column for each figure."""
    out = io.StringIO()
    plain = ["cell", "length", "concurrency", "rate", "requests", "window_s", "tokens_per_event", "prompt_tokens_per_s",
             "output_tokens_per_s", "requests_per_s", "goodput_per_s", "load_average", "client_lag_ms", "refused"]  # fmt: skip
    spread = [f"{name}_{percentile}" for name in (*_DISTRIBUTIONS, *_EACH_S) for percentile in _PERCENTILES]
    memory = ["predicted_kv", "observed_kv", "preemptions", "server_rss_bytes", "gpu_bytes"]
    writer = csv.DictWriter(out, [*plain, *spread, "accuracy", "accuracy_low", "accuracy_high", *memory])
    writer.writeheader()
    for cell in result.cells:
        row = {name: getattr(cell, name) for name in plain} | {name: getattr(cell.memory, name) for name in memory}
        for name in (*_DISTRIBUTIONS, *_EACH_S):
            values: Distribution | None = getattr(cell, name)
            row |= {f"{name}_{percentile}": getattr(values, percentile) if values else None for percentile in _PERCENTILES}
        if cell.accuracy:
            row |= {"accuracy": cell.accuracy.rate, "accuracy_low": cell.accuracy.low, "accuracy_high": cell.accuracy.high}
        writer.writerow(row)
    return out.getvalue()


SUMMARY_HEADER = ("length", "load", "n", "TTFT p50", "TTFT p99", "ITL p50", "ITL p99", "E2E p50", "scheduled p99", "tok/s",
                  "good req/s", "right", "KV needed", "KV", "preempted")  # fmt: skip


def _summary_row(cell: CellResult) -> list[str]:
    """A cell as people read it; a refused cell shows no figure."""
    load = str(cell.concurrency) if cell.concurrency else f"{cell.rate:g}/s" if cell.rate else "trace"
    head = [str(cell.length or "trace"), load, str(cell.requests)]
    if cell.refused:
        return [*head, *["refused"] * (len(SUMMARY_HEADER) - len(head))]
    latencies = ((cell.ttft_ms, "p50"), (cell.ttft_ms, "p99"), (cell.itl_ms, "p50"), (cell.itl_ms, "p99"), (cell.e2e_ms, "p50"),
                 # In a closed loop it is the time to the last token again.
                 (cell.scheduled_ms if cell.concurrency is None else None, "p99"))  # fmt: skip
    memory = cell.memory
    return [
        *head,
        *("–" if values is None else short_ms(getattr(values, percentile)) for values, percentile in latencies),
        *("–" if value is None else short_number(value) for value in (cell.output_tokens_per_s, cell.goodput_per_s)),
        f"{cell.accuracy.right}/{cell.accuracy.n}" if cell.accuracy else "–",
        *("–" if share is None else f"{share:.0%}" for share in (memory.predicted_kv, memory.observed_kv)),
        "–" if memory.preemptions is None else str(memory.preemptions),
    ]


def summary_table(cells: Sequence[CellResult], wanted: Sequence[str] = SUMMARY_HEADER) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the wanted columns, less those that say nothing of any cell."""
    every = [dict(zip(SUMMARY_HEADER, _summary_row(cell), strict=True)) for cell in cells]
    told = [name for name in wanted if not every or any(row[name] != "–" for row in every)]
    return told, [[row[name] for name in told] for row in every]


def client_share(client: dict[str, Any]) -> str:
    """What of the figures is the client's own, as measured before the run; empty where that was not."""
    # Results before November 2026 do not hold the client's share apart.
    if "ttft_added_p50_ms" not in client:
        return ""
    # The mock stamps an event once it has left, which a quick client may beat by some microseconds.
    median_ms, p99_ms = max(0, client["ttft_added_p50_ms"]), max(0, client["ttft_added_p99_ms"])
    told = f"this client adds {short_ms(median_ms)} to a first token (p99 {short_ms(p99_ms)}) and reads gaps of "
    told += f"{client['true_itl_ms']:g} ms as {short_ms(client['itl_p50_ms'])}, at concurrency {client['concurrency']}"
    return f"{told} against a mock server"


def summary_markdown(result: RunResult) -> str:
    """The cells as a Markdown table, with what a reader must know beside it."""
    header, rows = summary_table(result.cells)
    lines = [
        f"# Load test of {result.server.get('model', '?')}: {result.status}",
        "",
        f"{result.started_at}, {result.duration_s:.0f} s, {result.machine['cpu']} x {result.machine['cores']}. "
        f"`{result.command}`",
        *(["", f"Of these figures, {share}."] if (share := client_share(result.client)) else []),
        "",
        *(f"- **{alarm}**" for alarm in result.alarms),
        *([""] if result.alarms else []),
        "| " + " | ".join(header) + " |",
        "|" + "---|" * len(header),
        *("| " + " | ".join(row) + " |" for row in rows),
    ]
    return "\n".join(lines) + "\n"


def write_text(path: Path, text: str) -> None:
    """Write a file so that a reader sees a whole one at any moment; raises ResourceError where it cannot be written."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_text(text, encoding="utf-8")
        beside.replace(path)
    except OSError as error:
        raise unwritable(path, error) from None
