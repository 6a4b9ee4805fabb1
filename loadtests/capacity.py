"""The report's sections on capacity: what fits the memory, and what fits the limits that were given."""

from loadtests import plots
from loadtests.grids import grid
from loadtests.page import card, facts, rows, text
from loadtests.records import RunResult
from loadtests.units import short_bytes, short_length, short_ms


def memory(result: RunResult) -> str:
    """The section on the KV cache and the server's memory; empty where nothing is known of either."""
    kv = result.kv
    pairs: list[tuple[str, object]] = []
    if "bytes_per_token" in kv:
        pairs.append(("KV bytes per token, from config.json", f"{kv['bytes_per_token']:,} ({kv['kind']} attention)"))
    if "reported_bytes_per_token" in kv:
        pairs.append(("KV bytes per token, reported by the engine", f"{kv['reported_bytes_per_token']:,.1f}"))
    if "pool_tokens" in kv:
        pairs.append(("tokens that the KV cache holds", f"{kv['pool_tokens']:,}"))
    peaks = [cell.memory.server_rss_bytes for cell in result.cells if cell.memory.server_rss_bytes]
    if peaks:
        pairs.append(("server's process tree, peak resident memory", short_bytes(max(peaks))))
    if gpu := [cell.memory.gpu_bytes for cell in result.cells if cell.memory.gpu_bytes]:
        pairs.append(("GPU memory in use, peak, others' included", short_bytes(max(gpu))))
    lengths = kv.get("lengths", {})
    header = ("length", "fit at once", "preemption predicted at", "preemption seen at", "largest load without")
    body = [
        [short_length(int(length)), *("–" if row[key] is None else f"{row[key]:,}" for key in
         ("fits", "predicted_preemption_at", "observed_preemption_at", "largest_without"))]
        for length, row in lengths.items()
    ]  # fmt: skip
    ceiling = (
        "Below the line all requests hold their whole context at once. Above it some wait until others end, or, where their "
        "outputs outgrow the cache, are preempted: the engine throws a context away and computes it again."
    )
    above = "Cells above the line: a prompt that is half read holds memory too, and is not in the prediction."
    needed, used = (
        grid(title, result.cells, pick, lambda value: f"{value:.0%}", "cost", share=True)
        for title, pick in (
            ("KV cache needed by length and load, predicted", lambda cell: cell.memory.predicted_kv),
            ("KV cache used by length and load, observed", lambda cell: cell.memory.observed_kv),
        )
    )
    parts = [
        needed,
        used,
        card("What fits", plots.memory_surface(result), ceiling),
        card("Predicted and observed use", plots.kv_predicted_and_observed(result), above),
        card("Requests that fit, by length", rows(header, body) if body else ""),
        card("Figures", facts(pairs) if pairs else ""),
    ]
    shown = "".join(parts)
    return f'<h2>Memory</h2><div class="cards">{shown}</div>' if shown else ""


def limits(result: RunResult) -> str:
    """The section on what meets the limits that were given; empty without any, and where no concurrency was set."""
    found = result.fits.get("limits")
    if not found or not found["by_length"]:
        return ""
    settings = result.settings
    asked = [
        f"first token within {short_ms(settings['ttft_limit_ms'])}" if settings["ttft_limit_ms"] else "",
        f"at most {short_ms(settings['itl_limit_ms'])} per token" if settings["itl_limit_ms"] else "",
        f"at least {settings['accuracy_limit']:.0%} right" if settings["accuracy_limit"] else "",
    ]
    tried = {str(c.length): c.concurrency for c in sorted(result.cells, key=lambda c: c.concurrency or 0)}
    lengths, fitting = zip(*found["by_length"].items(), strict=True)
    shown = [
        "none" if not most else f"{most}, the most tried" if most == tried.get(length) else str(most)
        for length, most in zip(lengths, fitting, strict=True)
    ]
    missed = [_missed(result, int(length), most) for length, most in zip(lengths, fitting, strict=True)]
    best = found["longest"]
    answer = f"The longest: {short_length(best)} with {found['concurrency_at_longest']} at once." if best else "Nothing fits."
    intro = f"{answer} Asked of nine requests in ten: {', '.join(part for part in asked if part)}."
    table = rows(
        ("prompt tokens", *(short_length(int(length)) for length in lengths)),
        [
            ("largest concurrency within the limits", *shown),
            *([("what the next misses", *missed)] if any(part != "–" for part in missed) else []),
        ],
    )
    return f'<h2>What fits your limits</h2><p>{text(intro)}</p><div class="cards">{card("", table)}</div>'


def _missed(result: RunResult, length: int, most: int) -> str:
    """Which limits the first cell beyond `most` requests at once does not meet, and how far; a dash where none was tried."""
    beyond = [cell for cell in result.cells if cell.length == length and (cell.concurrency or 0) > most]
    if not beyond:
        return "–"
    cell, settings = min(beyond, key=lambda cell: cell.concurrency or 0), result.settings
    told = []
    if set(cell.outcomes) != {"ok"} or cell.ttft_ms is None:
        told.append("requests failed")
    if cell.ttft_ms and settings["ttft_limit_ms"] and cell.ttft_ms.p90 > settings["ttft_limit_ms"]:
        told.append(f"first token {short_ms(cell.ttft_ms.p90)}")
    if cell.tpot_ms and settings["itl_limit_ms"] and cell.tpot_ms.p90 > settings["itl_limit_ms"]:
        told.append(f"{short_ms(cell.tpot_ms.p90)} per token")
    if cell.accuracy and settings["accuracy_limit"] and cell.accuracy.rate < settings["accuracy_limit"]:
        told.append(f"{cell.accuracy.right} of {cell.accuracy.n} right")
    return f"at {cell.concurrency}: {', '.join(told)}" if told else "–"
