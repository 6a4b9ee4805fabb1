"""Recorded arrivals: the Azure LLM inference traces (CSV) and Mooncake's (JSONL), scaled in time and length."""

import csv
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from ard_serve.errors import DataError


@dataclass(frozen=True)
class Arrival:
    """One request to come: seconds from the start, tokens in and tokens out."""

    at_s: float
    prompt_tokens: int
    output_tokens: int


def read_trace(path: Path, requests: int, speed: float = 1, length_scale: float = 1) -> list[Arrival]:
    """The first `requests` arrivals of a trace, played `speed` times faster with lengths times `length_scale`.

    Azure: columns TIMESTAMP, ContextTokens, GeneratedTokens. Mooncake: timestamp (ms), input_length, output_length.

    Raises:
        DataError: the file cannot be read, or a line of it; names the line.
    """
    read = _azure if path.suffix == ".csv" else _mooncake
    try:
        with path.open(encoding="utf-8", newline="") as file:
            recorded = list(itertools.islice(read(path, file), requests))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot read the trace ({error})") from None
    if not recorded:
        raise DataError(f"{path}: holds no request; a trace has one line for each")
    start_s = min(arrival.at_s for arrival in recorded)
    return sorted(
        (
            Arrival(
                (arrival.at_s - start_s) / speed,
                max(1, round(arrival.prompt_tokens * length_scale)),
                max(1, round(arrival.output_tokens * length_scale)),
            )
            for arrival in recorded
        ),
        key=lambda arrival: arrival.at_s,
    )


def _azure(path: Path, lines: Iterator[str]) -> Iterator[Arrival]:
    for number, row in enumerate(csv.DictReader(lines), start=2):
        try:
            at_s = datetime.fromisoformat(row["TIMESTAMP"]).timestamp()
            yield Arrival(at_s, int(row["ContextTokens"]), int(row["GeneratedTokens"]))
        except (KeyError, ValueError, TypeError):
            raise DataError(f"{path}:{number}: not TIMESTAMP,ContextTokens,GeneratedTokens as in the Azure traces") from None


def _mooncake(path: Path, lines: Iterator[str]) -> Iterator[Arrival]:
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            yield Arrival(row["timestamp"] / 1000, int(row["input_length"]), int(row["output_length"]))
        except (KeyError, ValueError, TypeError):
            raise DataError(f"{path}:{number}: not timestamp, input_length, output_length as in Mooncake's traces") from None
