"""The page: self-contained, harmless, and honest about what was refused or never measured."""

import csv
import io
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from ard_serve.errors import DataError
from loadtests import plots, redraw
from loadtests.bias import ClientBias
from loadtests.config import LoadConfig
from loadtests.fits import add_fits
from loadtests.metrics import accuracy, by_depth, distribution
from loadtests.output import cells_csv, summary_markdown, trace_jsonl, write_result
from loadtests.records import CellMemory, CellResult, RequestRecord, RunResult
from loadtests.report import render
from loadtests.traces import read_trace
from loadtests.units import short_bytes, short_count, short_ms, short_number

_VOID = {"meta", "br", "path", "use", "rect", "circle", "line", "clippath", "stop"}


class Balance(HTMLParser):
    """Fails on a tag that closes none, and collects the text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag: str) -> None:
        if tag not in _VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data


def records(length: int, concurrency: int) -> list[RequestRecord]:
    return [
        RequestRecord(cell=f"{length}x{concurrency}", repeat=0, index=n, role="measured", outcome="ok", prompt_tokens=length,
                      output_tokens=8, events=8, planned_s=n, sent_s=n, gaps_ms=[20.0] * 7,
                      ttft_ms=length * concurrency / 2 + n, depth=n / 8,
                      e2e_ms=length * concurrency / 2 + n + 140, expected=f"{100_000 + n}", correct=n != 7)
        for n in range(8)
    ]  # fmt: skip


def cell(length: int, concurrency: int, **fields: Any) -> CellResult:
    own = records(length, concurrency)
    memory = CellMemory(predicted_kv=concurrency * length / 40_000, observed_kv=concurrency * length / 40_000,
                        preemptions=int(concurrency == 8), server_rss_bytes=5 << 30)  # fmt: skip
    return CellResult(
        cell=f"{length}x{concurrency}", length=length, concurrency=concurrency, requests=8, outcomes={"ok": 8}, memory=memory,
        ttft_ms=distribution(r.ttft_ms or 0 for r in own), itl_ms=distribution([20.0] * 56), output_tokens_per_s=50.0,
        accuracy=accuracy(own), accuracy_by_depth=by_depth(own, 5), **fields,
    )  # fmt: skip


@pytest.fixture
def result() -> RunResult:
    config = LoadConfig(url="http://127.0.0.1:1", ttft_limit_ms=3000)
    grid = [(length, concurrency) for length in (1024, 2048, 4096) for concurrency in (1, 8)]
    machine = {"cpu": "a processor", "cores": 2, "gpus": []}
    found = RunResult(
        status="complete", started_at="2026-01-01", duration_s=12, command="ard loadtest",
        settings=config.model_dump(mode="json"),
        server={"model": "<script>alert(1)</script>", "url": "http://127.0.0.1:1"}, machine=machine,
        kv={"kind": "grouped-query", "bytes_per_token": 23_040, "pool_tokens": 40_000, "lengths": {
            "4096": {"fits": 9, "predicted_preemption_at": 10, "observed_preemption_at": None, "largest_without": 8}}},
        cells=[cell(length, concurrency) for length, concurrency in grid],
        requests=[record for point in grid for record in records(*point)],
    )  # fmt: skip
    add_fits(found, config)
    return found


def read(page: str) -> Balance:
    parser = Balance()
    parser.feed(page)
    parser.close()
    assert parser.open == []
    return parser


def test_page_is_whole_and_needs_nothing_from_outside(result: RunResult) -> None:
    page = render(result)
    parsed = read(page)
    assert page.count("<svg") == 6
    assert all(link.startswith("#") for link in parsed.links)
    assert "@import" not in page
    assert "<script" not in page
    assert "<script>alert(1)</script>" in parsed.text
    for said in (
        "2.05 s",
        "What fits your limits",
        "Right answers by length and depth",
        "KV cache needed by length and load",
        "KV cache used by length and load",
        "23,040",
        "least squares on 24 requests",
    ):
        assert said in parsed.text, said


def test_colours_follow_the_readers_setting(result: RunResult) -> None:
    page = render(result)
    assert "prefers-color-scheme: dark" in page
    svg = page[page.index("<svg") : page.index("</svg>")]
    assert "var(--s0)" in svg
    assert "var(--ink)" in svg
    assert "#000000" not in svg, "black would vanish on the dark page"


def test_prompts_of_about_one_length_are_one_series(result: RunResult) -> None:
    """Where a server gives no token ids, prompts of 1K are 1,030 or 1,041 tokens; the legend still says 1K once."""
    for number, record in enumerate(result.requests):
        record.prompt_tokens += number
    drawn = plots.latency_over_time(result)
    assert [drawn.count(f">{name}</text>") for name in ("1K", "2K", "4K")] == [1, 1, 1]


def test_costs_are_told_where_two_lengths_were_measured(result: RunResult) -> None:
    text = read(render(result)).text
    assert "Each length, one request at a time" in text
    assert "What 4K tokens cost against 1K, at every load" in text
    result.cells, result.requests = result.cells[:2], result.requests[:16]
    assert "What a longer prompt costs" not in render(result)


def test_client_states_its_own_share_beside_the_figures(result: RunResult) -> None:
    assert "this client" not in summary_markdown(result)
    result.client = ClientBias(concurrency=8, requests=8, ttft_p50_ms=203, ttft_p99_ms=210, mock_ttft_p50_ms=201,
                               ttft_added_p50_ms=2.5, ttft_added_p99_ms=9, itl_p50_ms=20.2, itl_p99_ms=21, cpu_s=0.1,
                               rss_bytes=70 << 20).model_dump()  # fmt: skip
    assert "this client adds 2.5 ms to a first token (p99 9 ms)" in summary_markdown(result)
    assert "2.5 msof a first token are this client's own, 8 at once" in read(render(result)).text
    result.client["ttft_added_p50_ms"] = -0.03
    assert "this client adds 0 ms to a first token" in summary_markdown(result)


def test_open_loop_has_no_concurrency_that_fits(result: RunResult) -> None:
    result.cells = [one.model_copy(update={"concurrency": None, "rate": float(one.concurrency or 0)}) for one in result.cells]
    add_fits(result, LoadConfig(url="http://127.0.0.1:1", ttft_limit_ms=3000))
    assert "What fits your limits" not in render(result)


def test_limits_name_the_longest_and_what_was_the_most_tried(result: RunResult) -> None:
    text = read(render(result)).text
    assert "The longest: 4K with 1 at once." in text
    assert re.search(r"what the next misses.*at 8: first token [\d.]+ s", text, re.DOTALL), "a limit that fails is named"
    config = LoadConfig(url="http://127.0.0.1:1", ttft_limit_ms=5000)
    add_fits(result, config)
    assert "8, the most tried" in read(render(result)).text
    add_fits(result, LoadConfig(url="http://127.0.0.1:1", accuracy_limit=0.9))
    result.settings |= {"ttft_limit_ms": None, "accuracy_limit": 0.9}
    assert "at 1: 7 of 8 right" in read(render(result)).text


def test_the_law_says_where_its_last_term_leads_also_beyond_the_picture(result: RunResult) -> None:
    result.fits["ttft"]["quadratic_from_tokens"] = 99_249
    assert "leads from 99,249 tokens on, beyond what was measured." in read(render(result)).text
    result.fits["ttft"]["quadratic_from_tokens"] = None
    assert "leads from" not in read(render(result)).text


def test_accuracy_carries_its_interval(result: RunResult) -> None:
    # Seven right of eight.
    assert "1024x18788%53% to 98%" in "".join(read(render(result)).text.split("\n"))


def test_throughput_law_is_told(result: RunResult) -> None:
    for load, rate in ((1, 95.0), (2, 182.0), (4, 333.0), (16, 889.0)):
        result.cells.append(cell(512, load).model_copy(update={"output_tokens_per_s": rate}))
    add_fits(result, LoadConfig(url="http://127.0.0.1:1"))
    (fit,) = result.fits["throughput"]
    assert round(fit["limit_tokens_per_s"], -1) == 2000
    assert "512 prompts: at most" in read(render(result)).text


def test_report_is_drawn_again_from_the_result_alone(result: RunResult, tmp_path: Path) -> None:
    fits, result.fits = result.fits, {}
    write_result(result, tmp_path)
    assert redraw.run(redraw.RedrawConfig(result=tmp_path / "result.json")) == 0
    assert {path.name for path in tmp_path.iterdir()} == {
        "result.json",
        "report.html",
        "summary.md",
        "cells.csv",
        "trace.jsonl",
    }
    result.fits = fits
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == render(result)
    named = (tmp_path / "result.json").rename(tmp_path / "load-h100.json")
    assert redraw.run(redraw.RedrawConfig(result=named)) == 0
    assert (tmp_path / "load-h100.html").read_text(encoding="utf-8") == render(result)
    assert len(list(tmp_path.iterdir())) == 6, "a result by a name of its own gets its page alone"
    with pytest.raises(DataError, match="cannot be read"):
        redraw.run(redraw.RedrawConfig(result=tmp_path / "elsewhere"))


def test_open_loop_leads_with_the_time_from_the_planned_arrival(result: RunResult) -> None:
    assert "Planned arrival" not in render(result)
    result.cells = [
        one.model_copy(
            update={"concurrency": None, "rate": float(one.concurrency or 0), "scheduled_ms": distribution([4321.0])}
        )
        for one in result.cells
    ]
    text = read(render(result)).text
    assert "Planned arrival to last token, median" in text
    assert "4.32 sfrom planned arrival to last token, 99th percentile, 1K prompts, 8 per second" in text


def test_trace_is_drawn_request_by_request_and_states_no_length(result: RunResult) -> None:
    result.cells = [result.cells[0].model_copy(update={"cell": "1024x1", "length": 0, "concurrency": None})]
    result.requests = records(1024, 1)
    page = render(result)
    text = read(page).text
    assert "Time to first token of each traced request" in text
    assert "to the first token, median, traced prompts, as in the trace" in text
    assert page.count("<svg") == 3


def test_refused_cell_shows_no_figure(result: RunResult) -> None:
    result.cells[0] = cell(1024, 1, refused="the prefix cache answered 5 of 10 prompt tokens", rate=None)
    add_fits(result, LoadConfig(url="http://127.0.0.1:1"))
    assert "the prefix cache answered 5 of 10" in read(render(result)).text
    row = next(line for line in summary_markdown(result).splitlines() if line.startswith("| 1024 | 1 |"))
    assert row.count("refused") == 12
    assert result.fits["ttft"] is None, "two lengths are left"


@pytest.mark.parametrize("cells", [0, 1])
def test_page_of_a_run_cut_short(result: RunResult, cells: int) -> None:
    result.cells, result.requests = result.cells[:cells], result.requests[: 8 * cells]
    result.status, result.kv, result.fits = "server_died", {}, {}
    assert "the server died" in read(render(result)).text


def test_trace_of_a_run_can_be_replayed(result: RunResult, tmp_path: Path) -> None:
    for number, record in enumerate(result.requests):
        record.planned_s = 7 + number / 4
    (tmp_path / "trace.jsonl").write_text(trace_jsonl(result), encoding="utf-8")
    arrivals = read_trace(tmp_path / "trace.jsonl", 100)
    assert [one.prompt_tokens for one in arrivals] == [record.prompt_tokens for record in result.requests]
    assert [one.at_s for one in arrivals[:3]] == [0, 0.25, 0.5]
    assert {one.output_tokens for one in arrivals} == {8}


def test_csv_has_a_row_for_each_cell(result: RunResult) -> None:
    rows = list(csv.DictReader(io.StringIO(cells_csv(result))))
    assert len(rows) == 6
    assert rows[0]["cell"] == "1024x1"
    assert float(rows[0]["ttft_ms_p50"]) == pytest.approx(515.5)
    assert rows[0]["accuracy"] == "0.875"
    assert rows[0]["output_tokens_each_s_p50"] == ""


@pytest.mark.parametrize(
    ("ms", "shown"), [(0.5, "0.5 ms"), (999.4, "999 ms"), (999.6, "1 s"), (12_345, "12.3 s"), (4e6, "4,000 s")]
)
def test_milliseconds(ms: float, shown: str) -> None:
    assert short_ms(ms) == shown


def test_large_figures_are_no_powers_of_ten() -> None:
    assert [short_number(value) for value in (0.0603, 21.64, 999.6, 12_345.6)] == ["0.0603", "21.6", "1,000", "12,346"]
    assert [short_bytes(value) for value in (1010 << 20, 5 << 30)] == ["0.986 GiB", "5 GiB"]


@pytest.mark.parametrize(("count", "shown"), [(512, "512"), (1024, "1K"), (65_536, "64K"), (61_440, "60K"), (8128, "7.9K")])
def test_counts(count: int, shown: str) -> None:
    assert short_count(count) == shown
