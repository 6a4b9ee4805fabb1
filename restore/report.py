"""What a stranger reads about a restored model: evaluation.json, a Markdown card, and one HTML page with its plots."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Self

from pydantic import ValidationError

from ard_serve.artifact import DataRecord, Manifest, RecipeRecord
from ard_serve.console import print_table
from ard_serve.errors import UsageError
from restore.config import LEARNS_TEXT, LONG
from restore.evaluation.compare import BEYOND_GUESSING, MEAN
from restore.evaluation.gate import Check
from restore.evaluation.results import SIGNIFICANT, Comparison, Evaluation, EvaluationReport

TESTS = (
    "p: McNemar's exact test where an item or prompt is right or wrong, else a paired sign-flip test over windows, documents, "
    "prompts or items, exact up to 13 of them. Of as many figures as stand here one in twenty is below 0.05 by chance alone."
)
_PICTURES = (
    "[report.html](report.html), beside this card, has the same as pictures: perplexity by length and by position, a map of "
    "the needles by length and depth, training, and what was wrong with each layer before and after."
)


@dataclass(frozen=True)
class Restoration:
    """What was done to a model, as its card tells it, and what came of it."""

    base_name: str
    native_window: int
    target_length: int
    rope_type: str
    recipe: RecipeRecord
    data: DataRecord | None = None
    checks: tuple[Check, ...] = ()
    """What the quality gate held to limits."""
    served_limit: int | None = None
    trained_on: str | None = None
    trained_s: float = 0.0

    @property
    def failures(self) -> list[str]:
        """The limits that were missed, in words."""
        return [str(check) for check in self.checks if not check.met]

    @classmethod
    def from_manifest(cls, manifest: Manifest) -> Self:
        """The facts of an export."""
        return cls(
            base_name=manifest.base.name,
            native_window=manifest.base.native_window,
            target_length=manifest.rope.target_length,
            rope_type=manifest.rope.rope_type,
            recipe=manifest.recipe,
            data=manifest.data,
            served_limit=manifest.quality.served_limit,
        )


def write(
    found: EvaluationReport, out: Path, restoration: Restoration | None = None, steps: Sequence[dict[str, Any]] = ()
) -> list[Path]:
    """Write evaluation.json, report.md and report.html to `out` and return their paths in this order.

    Args:
        found: what was measured.
        out: an existing folder.
        restoration: what was done to the restored model, where there is one.
        steps: rows of the training run's metrics.jsonl.
    """
    from restore.page import html_page

    contents = {
        "evaluation.json": found.model_dump_json(indent=1) + "\n",
        "report.md": markdown(found, restoration),
        "report.html": html_page(found, restoration, steps),
    }
    for name, content in contents.items():
        (out / name).write_text(content, encoding="utf-8")
    return [out / name for name in contents]


def read(path: Path) -> EvaluationReport:
    """Read an evaluation.json.

    Raises:
        UsageError: it is missing or of another kind.
    """
    try:
        return EvaluationReport.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise UsageError(f"{path}: not an evaluation.json of `ard eval` ({str(error).splitlines()[0]})") from None


def print_summary(found: EvaluationReport) -> None:
    """Print the table of headline figures on stdout."""
    header, rows = score_table(found.models)
    print_table("what each model does", header, rows)


def markdown(found: EvaluationReport, restoration: Restoration | None) -> str:
    """The report as Markdown: figures, what got worse, how it was measured."""
    header, rows = score_table(found.models)
    parts = ["# Evaluation", *([_what_was_done(restoration), _gate(restoration)] if restoration else []), _table(header, rows)]
    parts += [_differences(found), how(found)]
    return "\n\n".join(part for part in parts if part) + "\n"


def model_card(restoration: Restoration, found: EvaluationReport | None = None, license_name: str | None = None) -> str:
    """README.md of an export, with the metadata block that model hubs read.

    Args:
        restoration: what was done.
        found: the evaluation of native, stretched and restored, where one was made.
        license_name: the base model's licence, as its own card states it.
    """
    front = ["---", "library_name: transformers", f"base_model: {restoration.base_name}", "pipeline_tag: text-generation"]
    front += [f"license: {license_name}"] if license_name else []
    name = Path(restoration.base_name).name
    parts = [
        "\n".join([*front, "---"]),
        f"# {name}, restored to {restoration.target_length:,} tokens",
        _what_was_done(restoration),
        "**The quality gate failed; this export was published with `--force`.**" if restoration.failures else "",
        _gate(restoration),
        _adapted(restoration),
    ]
    if found:
        header, rows = score_table(found.models)
        parts += ["## Before and after", _PICTURES, _table(header, rows), _differences(found), how(found)]
    else:
        parts.append("Nothing was measured on this export; `ard eval` does it.")
    parts += ["## Use", _use(restoration, found)]
    return "\n\n".join(part for part in parts if part) + "\n"


def score_table(models: Sequence[Evaluation]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: one row a figure, one column a model."""
    scores = [model.scores for model in models]
    lengths, depths = _keys([score.perplexity for score in scores]), _keys([score.needle for score in scores])
    names = _keys([score.tasks for score in scores])
    sliding = [{score.title: score.value for score in model.sliding} for model in models]
    rows = [
        *([f"perplexity at {n:,} tokens", *(_cell(score.perplexity.get(n), ",.2f") for score in scores)] for n in lengths),
        *([title, *(_cell(values.get(title), ",.2f") for values in sliding)] for title in dict.fromkeys(chain(*sliding))),
        *([f"needle found at {n:,} tokens", *(_cell(score.needle.get(n), ".0%") for score in scores)] for n in depths),
        *([name, *(_task_cell(model, name) for model in models)] for name in names),
    ]
    if len(names) > 1:
        rows.append([MEAN, *(_cell(model.short_mean, ".3f") for model in models)])
    return ["", *(model.name for model in models)], rows


def subject(found: EvaluationReport) -> Evaluation:
    """The model that the report is about: the restored one where there is one, else the last."""
    return next((model for model in found.models if model.name == "restored"), found.models[-1])


def worsened(found: EvaluationReport) -> list[Comparison]:
    """What the report's subject does worse than the first model, by more than chance explains."""
    return [row for row in found.comparisons if row.model == subject(found).name and _worse(row) and _significant(row)]


def told(row: Comparison) -> str:
    """One figure that changed, in a line."""
    return f"{row.what}: {row.before:.3f} → {row.after:.3f} (p {_chance(row)})"


def undecided(found: EvaluationReport) -> list[str]:
    """The figures of the report's subject that too few windows or prompts are behind to tell a difference from chance."""
    return [row.what for row in found.comparisons if row.model == subject(found).name and row.too_few]


def _chance(row: Comparison) -> str:
    if row.p_value is None:
        return "–"
    if row.too_few:
        return f"{row.pairs} pairs: too few"
    return "< 0.001" if row.p_value < 0.001 else f"{row.p_value:.3f}"


def _worse(row: Comparison) -> bool:
    # A perplexity that is no number is worse than any.
    return not row.after <= row.before if row.what.startswith("perplexity") else row.after < row.before


def _significant(row: Comparison) -> bool:
    return row.p_value is not None and row.p_value < SIGNIFICANT


def _differences(found: EvaluationReport) -> str:
    rows = [row for row in found.comparisons if row.model == subject(found).name]
    if not rows:
        return ""
    header = ["", rows[0].reference, rows[0].model, "ratio", "p"]
    body = [[row.what, f"{row.before:.3f}", f"{row.after:.3f}", _cell(row.ratio, ".3f"), _chance(row)] for row in rows]
    worse = [told(row) for row in worsened(found)]
    verdict = f"Worse than {rows[0].reference}, beyond chance: {'; '.join(worse) if worse else 'nothing that was measured'}."
    parts = [f"### Against {rows[0].reference}, on the same items", _table(header, body), verdict, f"{TESTS}{_meant(rows)}"]
    return "\n\n".join(parts)


def _meant(rows: Sequence[Comparison]) -> str:
    if not any(row.what == BEYOND_GUESSING for row in rows):
        return ""
    return (
        f" {BEYOND_GUESSING.capitalize()}: the mean, less what guessing scores, of the tasks that the first model does better "
        "than guessing by two standard errors; the others have nothing to lose."
    )


def _what_was_done(restoration: Restoration) -> str:
    recipe = restoration.recipe
    objectives = ", ".join(f"{name} × {weight:g}" for name, weight in recipe.objectives.items())
    read = f" from {restoration.data.documents} documents ({restoration.data.source})" if restoration.data else ""
    took = f" Training took {duration(restoration.trained_s)}." if restoration.trained_s else ""
    further = " and to use text beyond them" if LONG & recipe.objectives.keys() else ""
    return (
        f"`{restoration.base_name}` reads {restoration.native_window:,} tokens. Its rotary position embeddings were stretched "
        f"({restoration.rope_type}) to {restoration.target_length:,} tokens, which by itself damages what it could do; it was "
        f"then taught to attend and predict as it did before{further}. Recipe `{recipe.name}` ({objectives}), "
        f"{recipe.trainable}, {recipe.steps} steps over {recipe.tokens:,} tokens{read}, seed {recipe.seed}.{took}"
    )


def _adapted(restoration: Restoration) -> str:
    """What a reader must know who finds the restored model better than the native one."""
    if not LEARNS_TEXT & restoration.recipe.objectives.keys():
        return ""
    return (
        "It also learned from the text it was trained on. Where it reads text of that kind better than the native model, or "
        "does a task better, that is the text's doing as much as repair."
    )


def duration(seconds: float) -> str:
    """In the unit that a reader would choose."""
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"


def _gate(restoration: Restoration) -> str:
    if not restoration.checks:
        return ""
    missed = [f"- {failure}" for failure in restoration.failures]
    if missed:
        return "\n".join(["### Limits that were missed", "", *missed])
    return f"It was held to {len(restoration.checks)} limits against the native model, and meets all of them."


def _use(restoration: Restoration, found: EvaluationReport | None) -> str:
    limit, target = restoration.served_limit, restoration.target_length
    if limit is not None:
        reach = (
            f"Up to {limit:,} tokens it meets every limit on perplexity and needles; beyond, it fails one or was not measured."
        )
        if found and _needles_limit_nothing(found.models[0], restoration.native_window):
            reach += " The native model finds no needles in its own window, so that finding none would have met that limit."
    else:
        reach = f"It is not shown to be good at any length{': nothing was measured.' if found is None else '.'}"
    return (
        f"{reach} config.json carries the stretched RoPE, so nothing needs to be set:\n\n```bash\n"
        f"ard serve DIR          # vLLM behind a gateway{'' if limit is None else f', up to {limit:,} tokens'}\n"
        f"vllm serve DIR         # vLLM alone, up to {target:,} tokens, whatever was measured\n```"
    )


def _needles_limit_nothing(native: Evaluation, native_window: int) -> bool:
    inside = [score for length, score in native.scores.needle.items() if length <= native_window]
    return bool(inside) and not any(inside)


def how(found: EvaluationReport) -> str:
    """How the figures came about, in plain words."""
    windows = f"{found.config['windows']} window{'s' * (found.config['windows'] != 1)}"
    slid = any(model.sliding for model in found.models)
    served = [f" {model.name}: as the server at {model.server} answered." for model in found.models if model.server]
    cut, haystack = found.models[0].window_documents, found.models[0].haystack
    origin = f", from {len(set(cut))} documents" if len(set(cut)) > 1 else f" ({cut[0]})" if cut else ""
    hidden = f"a book ({haystack})" if haystack else "a book"
    asked = f"Needle: a six-digit number hidden in {hidden}, right when it is the first number the model writes. "
    sought = any(model.scores.needle for model in found.models)
    short = f"Short tasks{_items(found)} ± one standard error." if any(model.tasks for model in found.models) else ""
    return (
        f"Measured {found.created_at} with ard-serve {found.ard_serve_version} on {found.machine}, {found.config['dtype']}, "
        f"in {sum(model.seconds for model in found.models):.0f} s. Perplexity: {windows} of held-out text for each "
        f"length{origin}, over the same 1,024 tokens (half of the longest window where that is less), the last of the longest "
        "windows. "
        f"{asked if sought else ''}"
        f"{'Sliding: every token of whole documents, once. ' if slid else ''}"
        f"{short}{''.join(served)}"
    ).rstrip()


def _items(found: EvaluationReport) -> str:
    counts = {len(task.correct) for model in found.models for task in model.tasks}
    if not counts:
        return ""
    least, most = f"{min(counts):,}", f"{max(counts):,}"
    return f": {least if least == most else f'{least} to {most}'} items each,"


def _task_cell(model: Evaluation, name: str) -> str:
    if (score := model.task(name)) is None:
        return "–"
    return f"{score.value:.3f}" + (f" ± {score.stderr:.3f}" if score.stderr is not None else "")


def _cell(value: float | None, style: str) -> str:
    return "–" if value is None else format(value, style)


def _keys(mappings: Sequence[dict[Any, float]]) -> list[Any]:
    return sorted({key for mapping in mappings for key in mapping})


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---", *("---:" for _ in header[1:])], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
