"""What long prompts cost: tables from a result, and the same tables in the documentation."""

from pathlib import Path

import pytest

from ard_serve.errors import UsageError
from loadtests.cost import CostConfig, against, by_length, chosen_lengths, markdown, run
from loadtests.metrics import accuracy, distribution
from loadtests.output import write_result
from loadtests.records import CellResult, RequestRecord, RunResult
from scripts import load_tables


def cell(length: int, concurrency: int, **fields: object) -> CellResult:
    graded = [RequestRecord(cell="c", repeat=0, index=n, role="measured", outcome="ok", prompt_tokens=length, planned_s=0,
                            sent_s=0, correct=n < 7) for n in range(8)]  # fmt: skip
    usual = {"cell": f"{length}x{concurrency}", "length": length, "concurrency": concurrency, "requests": 8,
             "outcomes": {"ok": 8}, "ttft_ms": distribution([length * concurrency / 10, length * concurrency / 5]),
             "itl_ms": distribution([20.0, 30.0]), "e2e_ms": distribution([5000.0]), "output_tokens_per_s": 8e5 / length,
             "prompt_tokens_per_s": 1000.0, "accuracy": accuracy(graded)}  # fmt: skip
    return CellResult.model_validate(usual | fields)


@pytest.fixture
def result() -> RunResult:
    cells = [cell(length, load) for length in (1024, 8192, 61_440) for load in (1, 4)]
    kv = {"bytes_per_token": 23_040, "lengths": {"8192": {"fits": 120}, "61440": {"fits": 16}},
          "request_bytes": {"8192": 190 << 20, "61440": 1350 << 20}}  # fmt: skip
    return RunResult(started_at="now", command="ard", settings={"output_tokens": 64}, server={}, machine={}, cells=cells, kv=kv)


def test_long_against_short_at_every_load_that_both_ran(result: RunResult) -> None:
    result.cells = [*result.cells[:-1], cell(61_440, 16)]
    assert chosen_lengths(result) == (8192, 61_440)
    header, rows = against(result, 8192, 61_440)
    assert header == ["", "at once", "8K", "60K", "times"]
    assert ["first token, median", "1", "1.23 s", "9.22 s", "× 7.5"] in rows
    assert not [row for row in rows if row[1] in ("4", "16")], "a load that one of them did not run"
    assert ["KV of a request", "", "190 MiB", "1.32 GiB", ""] in rows
    assert ["fit at once", "", "120", "16", ""] in rows
    assert ["right answers", "all", "14/16", "14/16", ""] in rows


def test_each_length_at_the_lowest_load(result: RunResult) -> None:
    _, rows = by_length(result)
    assert [row[0] for row in rows] == ["1K", "8K", "60K"]
    assert rows[1] == ["8K", "2", "1.23 s", "1.64 s", "× 8", "1,000", "25 ms", "190 MiB", "120", "14/16"]
    # A result that states no bytes of a request states those of a token.
    assert rows[0][7:9] == ["23.9 MiB", "–"]


def test_what_a_server_does_not_tell_is_left_out(result: RunResult) -> None:
    result.kv = {}
    header, rows = by_length(result)
    assert header[-2:] == ["gap, median", "right"]
    assert {len(row) for row in rows} == {len(header)}
    assert not {"KV of a request", "fit at once"} & {row[0] for row in against(result, 8192, 61_440)[1]}


def test_refused_cells_and_open_loops_are_no_ground(result: RunResult) -> None:
    for one in result.cells[2:4]:
        one.refused = "the prefix cache answered"
    assert chosen_lengths(result) == (1024, 61_440)
    with pytest.raises(UsageError, match="8192: not a length of this run; it measured 1024, 61440"):
        chosen_lengths(result, short=8192)
    result.cells = [cell(8192, 1).model_copy(update={"concurrency": None, "rate": 1.0})]
    with pytest.raises(UsageError, match="fewer than two lengths"):
        chosen_lengths(result)


def test_command_prints_markdown(result: RunResult, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_result(result, tmp_path)
    assert run(CostConfig(result=tmp_path)) == 0
    shown = capsys.readouterr().out
    assert "What each length costs, one request at a time:" in shown
    assert "What 60K tokens cost against 8K:" in shown
    assert markdown(against(result, 8192, 61_440)) in shown


def test_page_is_filled_from_results_and_waits_for_those_to_come(result: RunResult, tmp_path: Path) -> None:
    page = "<!-- cost load-x.json 8192 61440 -->\nnot measured yet\n<!-- end -->\n<!-- lengths load-x.json -->\n<!-- end -->\n"
    assert load_tables.filled(page, tmp_path) == page
    write_result(result, tmp_path)
    (tmp_path / "result.json").rename(tmp_path / "load-x.json")
    filled = load_tables.filled(page, tmp_path)
    assert "not measured yet" not in filled
    assert markdown(against(result, 8192, 61_440)) in filled
    assert markdown(by_length(result)) in filled
    assert load_tables.filled(filled, tmp_path) == filled
    with pytest.raises(UsageError, match="4096: not a length of this run"):
        load_tables.filled(page.replace("8192", "4096"), tmp_path)


def test_documentation_shows_what_the_results_say() -> None:
    page = load_tables.PAGE.read_text(encoding="utf-8")
    assert load_tables.filled(page) == page, "run python -m scripts.load_tables"
