"""Plans, arrivals and traces."""

import itertools
import json
from pathlib import Path

import pytest

from ard_serve.errors import DataError, UsageError
from loadtests.config import LoadConfig
from loadtests.scenario import Cell, arrivals, plan, schedule
from loadtests.traces import read_trace

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens\r
2023-11-16 18:17:03.9799600,4808,10\r
2023-11-16 18:17:04.0319600,3180,8\r
2023-11-16 18:17:05.9799600,110,27\r
"""


def config(**fields: object) -> LoadConfig:
    return LoadConfig.model_validate({"url": "http://127.0.0.1:1"} | fields)


def test_default_grid_runs_to_the_served_limit_and_past_a_full_cache() -> None:
    cells = plan(config(output_tokens=64), 8192, 93_056, 128)
    assert sorted({cell.length for cell in cells}) == [1024, 2048, 4096, 8128]
    # 11 requests of 8192 tokens fit: 16 is the first power of two that does not.
    assert [cell.concurrency for cell in cells if cell.length == 8128] == [1, 2, 4, 8, 16]
    assert [cell.concurrency for cell in cells if cell.length == 1024] == [1, 2, 4, 8, 16, 32, 64]


@pytest.mark.parametrize(
    ("fields", "says"),
    [({"arrival": "poisson"}, "arrival poisson needs rates; give --rates, in requests per second"),
     ({"arrival": "trace"}, "arrival trace needs a file; give --trace"),
     ({"lengths": [512, 0]}, "0: lengths, concurrencies and rates must be positive")],
)  # fmt: skip
def test_fields_that_do_not_go_together_are_one_plain_line(fields: dict[str, object], says: str) -> None:
    with pytest.raises(UsageError) as raised:
        LoadConfig.resolve(None, {"url": "http://127.0.0.1:1"} | fields)
    assert str(raised.value) == says


def test_cell_knows_how_many_requests_it_measures() -> None:
    few = config(requests_per_cell=8, trace_requests=60)
    assert [Cell(1024, 8, concurrency).requests(few) for concurrency in (1, 16)] == [8, 16]
    assert Cell(1024, 8, rate=2.0).requests(few) == 8
    assert Cell(0, 8).requests(few) == 60


def test_short_window_is_one_length() -> None:
    assert {cell.length for cell in plan(config(output_tokens=64), 512, None, 16)} == {448}


def test_unknown_window_asks_for_lengths() -> None:
    with pytest.raises(UsageError, match="--lengths"):
        plan(config(), None, None, 16)
    assert len(plan(config(lengths=(100,), concurrencies=(1,)), None, None, 16)) == 1


def test_each_repeat_visits_every_cell_in_an_order_of_its_own() -> None:
    cells = [Cell(length, 8, 1) for length in range(1, 9)]
    order = schedule(cells, config(repeats=3, seed=1))
    assert [sorted(cell.length for repeat, cell in order if repeat == r) for r in range(3)] == [list(range(1, 9))] * 3
    assert len({tuple(cell.length for repeat, cell in order if repeat == r) for r in range(3)}) == 3
    assert order == schedule(cells, config(repeats=3, seed=1))


def test_arrivals_have_their_rate() -> None:
    cell = Cell(100, 8, rate=10)
    constant = arrivals(cell, config(arrival="constant", rates=(10,), requests_per_cell=50), 0)
    assert constant[-1].at_s == pytest.approx(4.9)
    poisson = arrivals(cell, config(arrival="poisson", rates=(10,), requests_per_cell=2000), 0)
    gaps = [b.at_s - a.at_s for a, b in itertools.pairwise(poisson)]
    assert sum(gaps) / len(gaps) == pytest.approx(0.1, rel=0.1)
    # Memoryless: the mean gap's share of gaps beyond it is 1/e.
    assert sum(gap > 0.1 for gap in gaps) / len(gaps) == pytest.approx(0.368, abs=0.04)


@pytest.mark.parametrize("fields", [{"arrival": "poisson"}, {"arrival": "trace"}, {"lengths": (0,)}, {"rates": (0.0,)}])
def test_settings_that_contradict_are_refused(fields: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        LoadConfig.resolve(None, {"url": "http://127.0.0.1:1"} | fields)


def test_azure_trace(tmp_path: Path) -> None:
    path = tmp_path / "azure.csv"
    path.write_text(AZURE, encoding="utf-8", newline="")
    scaled = read_trace(path, 10, speed=2, length_scale=0.5)
    assert [(one.prompt_tokens, one.output_tokens) for one in scaled] == [(2404, 5), (1590, 4), (55, 14)]
    assert [one.at_s for one in scaled] == pytest.approx([0, 0.026, 1], abs=1e-4)
    assert len(read_trace(path, 2)) == 2


def test_mooncake_trace(tmp_path: Path) -> None:
    path = tmp_path / "mooncake.jsonl"
    lines = [{"timestamp": 3000 + 500 * n, "input_length": 6758, "output_length": 500, "hash_ids": [0]} for n in range(3)]
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    assert [arrival.at_s for arrival in read_trace(path, 10)] == [0, 0.5, 1]


@pytest.mark.parametrize(
    ("name", "text", "complaint"),
    [("a.csv", AZURE + "yesterday,1,2\n", "a.csv:5"), ("a.csv", "x,y\n1,2\n", "a.csv:2"), ("a.jsonl", "{}\n", "a.jsonl:1"),
     ("a.jsonl", '{"timestamp": 0, "input_length": 5, "output_length": 1}\nnot json\n', "a.jsonl:2"),
     ("a.jsonl", "", "holds no request")],
)  # fmt: skip
def test_bad_lines_are_named(tmp_path: Path, name: str, text: str, complaint: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=complaint):
        read_trace(tmp_path / name, 10)
