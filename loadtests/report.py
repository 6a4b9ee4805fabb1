"""`report.html`: what the run says, from the headline down to every figure, the settings and the machine."""

import json
from collections.abc import Callable
from typing import Any

from ard_serve.errors import UsageError
from loadtests import capacity, cost, plots
from loadtests.grids import grid, percentile, shown_length
from loadtests.metrics import accuracy
from loadtests.output import summary_table
from loadtests.page import Shade, card, facts, heat, page, rows, text, tile
from loadtests.records import CellResult, Distribution, RunResult
from loadtests.units import short_bytes, short_length, short_ms, short_number


def render(result: RunResult) -> str:
    """The report as one self-contained HTML document."""
    title = f"Load test of {result.server.get('model', 'a server')}"
    sections = (_tiles, _alarms, capacity.limits, _costs, _maps, _curves, _answers, capacity.memory, _all_figures, _conditions)
    return page(title, [_head(title, result), *filter(None, (section(result) for section in sections))])


def _head(title: str, result: RunResult) -> str:
    ran = {"time_limit": "stopped at its time limit", "server_died": "cut short: the server died"}.get(result.status)
    machine = result.machine
    engine = [result.server["engine"]] if result.server.get("engine") else []
    where = ", ".join([*engine, f"{machine['cpu']} × {machine['cores']}", *machine["gpus"]])
    left_out = f" Left out: {', '.join(result.not_run)}." if result.not_run else ""
    return (
        f"<h1>{text(title)}</h1><p class='faint'>{text(result.server.get('url', ''))} · {text(result.started_at)} · "
        f"{result.duration_s:.0f} s · {text(where)} · run {text(ran or result.status)}.{text(left_out)} "
        f"{text(result.detail)}</p>"
    )


def _tiles(result: RunResult) -> str:
    cells = [cell for cell in result.cells if not cell.refused and cell.ttft_ms]
    if not cells:
        return ""
    calm = min(cells, key=lambda cell: (cell.concurrency or 0, -cell.length))
    shortest = min(cells, key=lambda cell: (cell.concurrency or 0, cell.length))
    fastest = max(cells, key=lambda cell: cell.output_tokens_per_s or 0)
    assert calm.ttft_ms is not None
    assert shortest.ttft_ms is not None
    asked = f"{shown_length(calm.length)} prompts"
    tiles = [tile(short_ms(calm.ttft_ms.p50), f"to the first token, median, {asked}, {_load(calm)}")]
    if calm is not shortest:
        ratio, times = calm.ttft_ms.p50 / shortest.ttft_ms.p50, calm.length / shortest.length
        tiles.append(tile(f"× {ratio:.3g}", f"what × {times:.3g} the length costs, against {short_length(shortest.length)}"))
    if calm.itl_ms:
        tiles.append(tile(short_ms(calm.itl_ms.p50), f"between tokens, median, {asked}, {_load(calm)}"))
    busiest = max(cells, key=lambda cell: cell.rate or 0)
    if busiest.concurrency is None and busiest.scheduled_ms:
        waited = (
            f"from planned arrival to last token, 99th percentile, {shown_length(busiest.length)} prompts, {_load(busiest)}"
        )
        tiles.append(tile(short_ms(busiest.scheduled_ms.p99), waited))
    if fastest.output_tokens_per_s:
        made = f"output tokens/s at most, {shown_length(fastest.length)} prompts, {_load(fastest)}"
        tiles.append(tile(short_number(fastest.output_tokens_per_s), made))
    if right := accuracy(record for record in result.requests if record.role == "measured"):
        tiles.append(tile(f"{right.right} of {right.n}", f"hidden numbers found ({right.low:.0%} to {right.high:.0%} at 95%)"))
    if lengths := result.kv.get("lengths"):
        longest = max(lengths, key=int)
        tiles.append(tile(str(lengths[longest]["fits"]), f"prompts of {short_length(int(longest))} fit the KV cache at once"))
    if "ttft_added_p50_ms" in (client := result.client):
        own = f"of a first token are this client's own, {client['concurrency']} at once against a mock server"
        tiles.append(tile(short_ms(max(0, client["ttft_added_p50_ms"])), own))
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _alarms(result: RunResult) -> str:
    flags = [f"{cell.cell}: {flag}" for cell in result.cells for flag in cell.flags]
    boxes = [f'<div class="alarm"><b>Alarm.</b> {text(alarm)}</div>' for alarm in result.alarms]
    boxes += [f'<div class="card"><b>Note.</b> {text(flag)}</div>' for flag in flags]
    graded = any(cell.accuracy for cell in result.cells)
    if not result.alarms and graded and len({cell.concurrency for cell in result.cells}) > 1:
        boxes.append('<p class="calm"><b>No alarm:</b> answers do not get worse with concurrency beyond chance.</p>')
    return "".join(boxes)


def _costs(result: RunResult) -> str:
    """Each length at the lowest load, and the longest prompts against short ones; empty for a single length."""
    try:
        short, long = cost.chosen_lengths(result)
    except UsageError:
        return ""
    each, pair = rows(*cost.by_length(result)), rows(*cost.against(result, short, long))
    title = f"What {short_length(long)} tokens cost against {short_length(short)}"
    return (
        f"<h2>What a longer prompt costs</h2>{card(f'Each length, {cost.at_lowest(result)}', each)}"
        f'<p></p><details class="card"><summary>{text(title)}, at every load</summary>{pair}</details>'
    )


def _maps(result: RunResult) -> str:
    cells = result.cells
    maps = []
    if any(cell.concurrency is None for cell in cells):
        maps = [
            grid("Planned arrival to last token, median", cells, percentile("scheduled_ms", "p50"), short_ms, "cost"),
            grid("Planned arrival to last token, 99th percentile", cells, percentile("scheduled_ms", "p99"), short_ms, "cost"),
        ]
    maps += [
        grid("Time to first token, median", cells, percentile("ttft_ms", "p50"), short_ms, "cost"),
        grid("Time to first token, 99th percentile", cells, percentile("ttft_ms", "p99"), short_ms, "cost"),
        grid("Time between tokens, median", cells, percentile("itl_ms", "p50"), short_ms, "cost"),
        grid("Longest silence in a stream", cells, percentile("itl_ms", "max"), short_ms, "cost"),
        grid("Output tokens per second", cells, lambda c: c.output_tokens_per_s, short_number, "gain"),
        grid("Good requests per second", cells, lambda c: c.goodput_per_s, short_number, "gain"),
    ]
    intro = (
        "Rows are prompt lengths in tokens, columns the requests in flight or per second. The stronger the colour, the more."
    )
    return f'<h2>What length and load cost</h2><p>{intro}</p><div class="cards">{"".join(maps)}</div>'


def _curves(result: RunResult) -> str:
    fit = result.fits.get("ttft")
    law = ""
    if fit:
        law = (
            f"Line: {short_ms(fit['a_ms'])} + {short_ms(1000 * fit['b_ms'])} per 1,000 tokens + {short_ms(1e6 * fit['c_ms'])} "
            f"per (1,000 tokens)², least squares on {fit['requests']} requests at concurrency {fit['concurrency']}, with the "
            f"95% band of the mean. {_turn(fit)}Small dots are single requests."
        )
    pictures = [
        card("Time to first token against length", plots.ttft_by_length(result), law),
        card("Time to first token of each traced request", plots.ttft_of_trace(result)),
        card("Output tokens per second against concurrency",
             plots.curves_by_concurrency(result, "output_tokens_per_s", "output tokens/s", lambda v: f"{v:g}", False),
             _throughput_law(result)),
        card("Time between tokens, 99th percentile",
             plots.curves_by_concurrency(result, "itl_ms.p99", "time between tokens", short_ms, True),
             "High where long prompts are worked off between the tokens of others."),
        card("Over the run", plots.latency_over_time(result), "Cells run in shuffled order; drift would show as a slope."),
    ]  # fmt: skip
    shown = "".join(pictures)
    return f'<h2>Curves</h2><div class="cards">{shown}</div>' if shown else ""


def _turn(fit: dict[str, Any]) -> str:
    """From which length on the quadratic term leads, beyond the longest prompt too."""
    if not (turn := fit["quadratic_from_tokens"]):
        return ""
    beyond = ", beyond what was measured" if turn > fit["curve"][-1][0] else ""
    return f"Its last term leads from {short_number(turn)} tokens on{beyond}. "


def _throughput_law(result: RunResult) -> str:
    """What the fitted limit says, for the shortest and the longest prompts that have one."""
    fits = result.fits.get("throughput") or []
    told = [
        f"{short_length(fit['length'])} prompts: at most {short_number(fit['limit_tokens_per_s'])} tokens/s "
        f"({short_number(fit['low'])} to {short_number(fit['high'])} at 95%), half of that with "
        f"{short_number(fit['half_at'])} at once"
        for fit in [*fits[:1], *fits[1:][-1:]]
    ]
    return f"A step that serves C requests takes a + b C. {'; '.join(told)}." if told else ""


def _answers(result: RunResult) -> str:
    cells = [cell for cell in result.cells if cell.accuracy]
    if not cells:
        return ""
    loads = grid("Right answers by length and load", cells, lambda c: c.accuracy.rate if c.accuracy else None,
                  lambda v: f"{v:.0%}", "gain", share=True)  # fmt: skip
    intro = (
        "Each timed request hides a six-digit number in its text and asks for it at the end; the first number of the answer "
        "must be it. The same tasks are asked at every load, so that an answer lost under load is seen as such."
    )
    note = "How far each figure can be trusted is under All figures: ten right of ten leave room for 28% of wrong ones."
    shown = f'<div class="cards">{loads}{_by_depth(result)}</div>'
    return f"<h2>Right answers under load</h2><p>{intro} {note}</p>{shown}"


def _by_depth(result: RunResult) -> str:
    strata = int(result.settings["depths"])
    body: list[tuple[str, list[Shade]]] = []
    for length in sorted({cell.length for cell in result.cells if cell.length}):
        found = [[0, 0] for _ in range(strata)]
        for cell in result.cells:
            for at, one in enumerate(cell.accuracy_by_depth if cell.length == length else []):
                if one is not None:
                    found[at] = [found[at][0] + one.right, found[at][1] + one.n]
        body.append((short_length(length), [(f"{right}/{n}", right / n) if n else ("–", None) for right, n in found]))
    columns = [f"{100 * at / strata:.0f}–{(at + 1) / strata:.0%}" for at in range(strata)]
    table = heat("length \\ depth", columns, body, "gain") if body else ""
    return card("Right answers by length and depth", table, "0% is the start of the prompt, 100% its end; all loads together.")


def _all_figures(result: RunResult) -> str:
    spread = []
    for cell in result.cells:
        for name, values in (("TTFT", cell.ttft_ms), ("ITL", cell.itl_ms), ("TPOT", cell.tpot_ms), ("E2E", cell.e2e_ms),
                             ("scheduled", cell.scheduled_ms), ("sent late", cell.late_ms)):  # fmt: skip
            if values and not cell.refused:
                spread.append([cell.cell, name, *_spread(values, short_ms)])
        for name, values in (("output tokens, by second", cell.output_tokens_each_s),
                             ("good requests, by second", cell.good_requests_each_s)):  # fmt: skip
            if values and not cell.refused:
                spread.append([cell.cell, name, *_spread(values, short_number)])
    summary = rows(*summary_table(result.cells))
    detail = rows(("cell", "figure", "n", "mean", "p50", "p90", "p99", "max"), spread)
    outcomes = facts([(c.cell, ", ".join(f"{n} {k}" for k, n in c.outcomes.items())) for c in result.cells])
    graded = [[c.cell, str(c.accuracy.n), str(c.accuracy.right), f"{c.accuracy.rate:.0%}", f"{c.accuracy.low:.0%} to "
               f"{c.accuracy.high:.0%}"] for c in result.cells if c.accuracy]  # fmt: skip
    right = rows(("cell", "asked", "right", "share", "95% interval"), graded)
    folded = {"Percentiles of every figure": detail, "Right answers": right if graded else "", "Outcomes": outcomes}
    boxes = "".join(
        f'<p></p><details class="card"><summary>{name}</summary>{table}</details>' for name, table in folded.items() if table
    )
    return f'<h2>All figures</h2><div class="card">{summary}</div>{boxes}'


def _spread(values: Distribution, unit: Callable[[float], str]) -> list[str]:
    return [str(values.n), *(unit(value) for value in (values.mean, values.p50, values.p90, values.p99, values.max))]


def _conditions(result: RunResult) -> str:
    client = result.client
    told = ""
    # Results before November 2026 do not hold the client's share apart.
    if "ttft_added_p50_ms" in client:
        told = (
            f"At concurrency {client['concurrency']} against a mock server this client reports a median TTFT of "
            f"{client['ttft_p50_ms']:.1f} ms where {client['true_ttft_ms']:.0f} ms are true: the server gave "
            f"{client['mock_ttft_p50_ms']:.1f} ms, the client added {client['ttft_added_p50_ms']:.1f} ms (p99 "
            f"{client['ttft_added_p99_ms']:.1f} ms). Its median gap is {client['itl_p50_ms']:.1f} ms where "
            f"{client['true_itl_ms']:.0f} ms are true; it took {client['cpu_s']:.1f} "
            f"CPU-seconds and {short_bytes(client['rss_bytes'])}."
        )
    dumped = {"settings": result.settings, "server": result.server, "machine": result.machine}
    blocks = "".join(
        card(name, facts([(k, json.dumps(v) if isinstance(v, dict | list) else v) for k, v in values.items()]))
        for name, values in dumped.items()
    )
    return (
        f"<h2>Conditions</h2><p>{text(told)}</p><p>Command: <code>{text(result.command)}</code> "
        f"{f'at commit <code>{text(result.commit)}</code>' if result.commit else ''}</p>"
        f'<details><summary>Settings, server and machine</summary><div class="cards">{blocks}</div></details>'
        "<p class='faint'>TTFT: request written to first event with a token. ITL: between token-bearing events, pooled. TPOT: "
        "mean per token after the first. E2E: to the last token. Scheduled: from planned arrival to last token. Throughput "
        "counts tokens while the load is at its target. Good: within every limit given, and right.</p>"
    )


def _load(cell: CellResult) -> str:
    if cell.concurrency is not None:
        return "one at a time" if cell.concurrency == 1 else f"{cell.concurrency} at once"
    return f"{cell.rate:g} per second" if cell.rate else "as in the trace"
