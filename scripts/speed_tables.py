"""Write the tables of docs/results/kernel-*.json and engine-*.json into the pages that show them.

    python -m scripts.speed_tables

A page marks a table's place with two comments, `<!-- KIND FILE -->` and `<!-- end -->`; KIND is kernel, hopper, engine or
peers. A test fails when a page and its results differ.
"""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "docs" / "kernel.md", ROOT / "docs" / "training.md"]
_PLACE = re.compile(r"(<!-- (kernel|hopper|engine|peers) (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
# Lengths shown of all but the self-relation at 128 channels, which is shown whole.
_OTHERS = (8192, 131_072)
# What a row may have beside ours, all with its gradient: the prefix of its figures, its name, whether its memory is shown.
_BESIDE = (("1024_rows", "1,024 of its rows", True), ("reference", "LinearARD", True), ("dense", "dense", False),
           ("compiled", "compiled", False), ("flex", "FlexAttention", True))  # fmt: skip
Row = dict[str, Any]


def main() -> None:
    for page in PAGES:
        page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")


def filled(text: str) -> str:
    """The page with every table as its results file has it now."""
    return _PLACE.sub(lambda place: f"{place[1]}{_table(_TABLES[place[2]], place[3])}{place[4]}", text)


def _table(lines: Callable[[Any], Iterator[list[str]]], file: str) -> str:
    results = json.loads((ROOT / "docs" / "results" / file).read_text(encoding="utf-8"))
    head, *rows = lines(results)
    told = [f"| {' | '.join(cells)} |\n" for cells in (head, *rows)]
    return "".join([told[0], "|---" * len(head) + "|\n", *told[1:]])


def _kernel(results: Any) -> Iterator[list[str]]:
    beside = [found for found in _BESIDE if any(f"{found[0]}_fwd_bwd_ms" in row for row in results["rows"])]
    heads = [head for _, title, memory in beside for head in [f"{title}, ms"] + ["MiB"] * memory]
    yield ["relation", "D", "T", "ours, ms", "MiB", "TFLOP/s", "share", *heads]
    for row in results["rows"]:
        first = (row["op"], row["head_dim"]) == ("self_relation", 128)
        if not first and row["T"] not in _OTHERS:
            continue
        name = "self" if row["op"] == "self_relation" else f"attention, {row['kv_heads']} key heads"
        yield [
            name, f"{row['head_dim']}", f"{row['T']:,}", f"{row['fwd_ms']:,.2f} / {row['fwd_bwd_ms']:,.2f}",
            f"{row['extra_mib']:,.0f}", f"{row['tflops']:.0f}", f"{row['of_matmul']:.2f}",
            *(cell for prefix, _, memory in beside for cell in _beside(row, prefix, memory)),
        ]  # fmt: skip


def _beside(row: Row, prefix: str, memory: bool) -> list[str]:
    if f"{prefix}_fwd_bwd_ms" not in row:
        return [""] * (1 + memory)
    return [f"{row[f'{prefix}_fwd_bwd_ms']:,.1f}"] + [f"{row[f'{prefix}_extra_mib']:,.0f}"] * memory


def _hopper(results: Any) -> Iterator[list[str]]:
    yield ["D", "T", "Triton: forward, gradient, ms", "Hopper: forward, gradient, ms", "Hopper's time to Triton's",
           "share, Triton", "share, Hopper"]  # fmt: skip
    for row in results["rows"]:
        triton, hopper = ([row[f"{kind}_{part}_ms"] for part in ("forward", "self_backward")] for kind in ("triton", "hopper"))
        counted = 8 * row["T"] ** 2 * row["channels"] * 32 / 1e9
        shares = [f"{counted / sum(times) / row['matmul_tflops']:.2f}" for times in (triton, hopper)]
        told = [", ".join(f"{time:.2f}" for time in times) for times in (triton, hopper)]
        yield [f"{row['channels']}", f"{row['T']:,}", *told, f"{sum(hopper) / sum(triton):.2f}", *shares]


def _engine(results: Any) -> Iterator[list[str]]:
    yield ["shape", "recipe", "native window", "long window", "layers kept", "seconds a step", "tokens/s", "share",
           "with recomputation", "peak, GiB", "forecast, GiB"]  # fmt: skip
    rows = [row for run in results["runs"] for row in run["rows"] if "seconds" in row and "engine" not in row]
    for row in sorted(rows, key=_order):
        shape = row["shape"].upper() + (f" in {row['quantize'].replace('bit', ' bit')}" if row["quantize"] else "")
        shape += f", {row['memory_gib']:g} GiB" if "memory_gib" in row else ""
        shape += f", {row['processes']} GPUs" * (row["processes"] > 1) + ", sharded" * row.get("shard", False)
        kept = f"{_both(row, 'kept')} of {row['layers']}"
        kept += f", attention of {_both(row, 'kept_attention')}" if any(row.get("kept_attention", ())) else ""
        yield [
            shape, row["recipe"], *(f"{row[kind]:,}" if row[kind] else "" for kind in ("window", "long_window")),
            kept, f"{row['seconds']:.2f}", f"{row['tokens_per_s']:,.0f}", f"{row['of_matmul']:.2f}",
            f"{row['tflops_with_recomputation'] / row['matmul_tflops']:.2f}", f"{row['peak_gib']:.2f}",
            f"{row['forecast_gib']:.2f}",
        ]  # fmt: skip


def _order(row: Row) -> tuple[Any, ...]:
    """Wide models first, of each the recipes that distil before those that only read, of those one GPU and a whole base."""
    return (
        -row["hidden_size"],
        row["recipe"] != "default",
        row["recipe"] == "linearard",
        row["window"] == 0,
        row["window"] or row["long_window"],
        row["processes"],
        row["quantize"] or "",
        row.get("shard", False),
    )


def _both(row: Row, name: str) -> str:
    """Layers in a distillation and in a long window, of those that the row has."""
    return " and ".join(str(count) for kind, count in zip(("window", "long_window"), row[name], strict=True) if row[kind])


def _peers(results: Any) -> Iterator[list[str]]:
    yield ["part of a step", "shape", "by", "ms, forward and backward", "MiB beside what is there", "error of the gradient"]
    rows = [row for run in results["runs"] for row in run["rows"] if "error" not in row]
    for row in sorted(rows, key=lambda row: (list(_PARTS).index(row["part"]), -row.get("hidden_size", 0))):
        yield [
            _PARTS[row["part"]].format(**row),
            row["shape"].upper(), row["peer"], f"{row['fwd_bwd_ms']:.1f}", f"{row['extra_mib']:,.0f}",
            f"{row['gradient_error']:.1%}" if "gradient_error" in row else "",
        ]  # fmt: skip


_PARTS = {"lm": "next-token loss", "logits": "logits' KL", "both": "both at once", "layers": "{layers} layers"}
_TABLES = {"kernel": _kernel, "hopper": _hopper, "engine": _engine, "peers": _peers}


if __name__ == "__main__":
    main()
