"""Ask a model what is hidden in long text: every needle task at every length and depth, batched, by greedy decoding."""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby, product
from pathlib import Path

from ard_serve.console import progress
from ard_serve.errors import DataError
from restore.evaluation.config import EvalConfig, NeedleTask
from restore.evaluation.haystack import Haystack, Prompt
from restore.evaluation.needles import needle_prompt
from restore.evaluation.reader import Reader
from restore.evaluation.reading import Reading
from restore.evaluation.results import NeedleScore

# From length, depth and sample number to a prompt.
_Maker = Callable[[int, float, int], Prompt]


def measure(reader: Reader, haystack: Haystack, config: EvalConfig, name: str) -> list[NeedleScore]:
    """Score `config.needle_samples` prompts of each task, length and depth.

    Raises:
        DataError: the text is too short for a length, or a file of questions cannot be used.
    """
    makers, lengths, samples = _makers(haystack, config), sorted(set(config.needle_lengths)), range(config.needle_samples)
    found: dict[tuple[str, int, float], list[float]] = {}
    with progress(f"{name}: needles", sum(lengths) * len(makers) * len(config.needle_depths) * len(samples)) as bar:
        # Prompts of a length together, whatever their tasks and depths: they are written in as many steps as one alone.
        for length in lengths:
            cells = list(product(makers, config.needle_depths))
            prompts = [makers[task](length, depth, sample) for task, depth in cells for sample in samples]
            scores = iter(_answer(reader, haystack, prompts, bar.advance))
            found |= {(task, length, depth): [next(scores) for _ in samples] for task, depth in cells}
    return [
        NeedleScore(task=task, length=length, depth=depth, samples=tuple(found[task, length, depth]))
        for task, length, depth in product(makers, lengths, config.needle_depths)
    ]


def check(haystack: Haystack, config: EvalConfig) -> None:
    """Make every prompt that `measure` would ask, and ask none; raises what it raises."""
    for make in _makers(haystack, config).values():
        for length, depth, sample in product(config.needle_lengths, config.needle_depths, range(config.needle_samples)):
            make(length, depth, sample)


def _makers(haystack: Haystack, config: EvalConfig) -> dict[str, _Maker]:
    makers: dict[str, _Maker] = {
        task: partial(_needle, haystack, task, config.seed) for task in dict.fromkeys(config.needle_tasks)
    }
    for path in map(Path, config.reading):
        reading = Reading(path, haystack.tokenizer, haystack)
        makers[reading.name] = partial(reading.prompt, seed=config.seed)
    return {task: partial(_named, task, make) for task, make in makers.items()}


def _needle(haystack: Haystack, task: NeedleTask, seed: int, length: int, depth: float, sample: int) -> Prompt:
    return needle_prompt(haystack, task, length, depth, sample, seed)


def _named(task: str, make: _Maker, length: int, depth: float, sample: int) -> Prompt:
    """The prompt; an error says which of many tasks it comes from."""
    try:
        return make(length, depth, sample)
    except DataError as error:
        raise DataError(f"{task}: {error}") from None


def _answer(reader: Reader, haystack: Haystack, prompts: Sequence[Prompt], advance: Callable[[int], None]) -> list[float]:
    """Score each prompt's greedy continuation; prompts of one shape are asked together, without padding."""
    scores: dict[int, float] = {}
    order = sorted(range(len(prompts)), key=lambda index: _shape(prompts[index]))
    for (_, new_tokens), same in groupby(order, key=lambda index: _shape(prompts[index])):
        indices = list(same)
        written = reader.continue_greedily([prompts[index].ids for index in indices], new_tokens, advance)
        for index, ids in zip(indices, written, strict=True):
            scores[index] = prompts[index].score(haystack.decode(ids))
    return [scores[index] for index in range(len(prompts))]


def _shape(prompt: Prompt) -> tuple[int, int]:
    return len(prompt.ids), prompt.new_tokens
