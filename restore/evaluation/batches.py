"""Batches of bounded size from items that were sorted by length."""

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")


def cut(items: Sequence[T], size: Callable[[T], int], batch_tokens: int) -> Iterator[list[T]]:
    """Cut items, longest first, into batches whose padded size stays within `batch_tokens`; one item at least."""
    batch: list[T] = []
    for item in items:
        if batch and size(batch[0]) * (len(batch) + 1) > batch_tokens:
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch
