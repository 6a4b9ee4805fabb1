"""The HTML report: one self-contained page that a stranger understands, from the headline down to the exact settings."""

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from restore import plots, report
from restore.config import Objective
from restore.evaluation.compare import BEYOND_GUESSING
from restore.evaluation.results import Evaluation, EvaluationReport

Steps = Sequence[dict[str, Any]]

_STYLE = """\
* { box-sizing: border-box }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto,
  "Helvetica Neue", Arial, sans-serif; --page: #f4f6f8 }
main { max-width: 1060px; margin: 0 auto; padding: 48px 24px 80px }
h1 { font-size: 30px; line-height: 1.2; letter-spacing: -.02em; margin: 0 0 12px }
h2 { font-size: 19px; letter-spacing: -.01em; margin: 0 0 4px }
p { margin: 0 0 12px; max-width: 72ch } .lead { color: var(--quiet); margin-bottom: 28px } small, .note { color: var(--quiet) }
.note { font-size: 14px; margin-bottom: 14px; max-width: 110ch }
section { background: var(--panel); border: 1px solid var(--grid); border-radius: 12px; padding: 24px; margin-top: 20px;
  overflow-x: auto }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(180px, 1fr)); gap: 16px }
.card { background: var(--panel); border: 1px solid var(--grid); border-radius: 12px; padding: 18px 20px }
.card b { display: block; font-size: 27px; letter-spacing: -.02em; line-height: 1.25; font-variant-numeric: tabular-nums }
.card span { display: block; font-size: 14px } .card small { font-size: 13px }
svg { display: block; width: 100%; height: auto }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: 15px }
th, td { text-align: right; padding: 7px 12px; border-bottom: 1px solid var(--grid); white-space: nowrap }
th:first-child, td:first-child { text-align: left; padding-left: 0 } th { color: var(--quiet); font-weight: 500 }
tr:last-child td { border-bottom: 0 }
ul { margin: 0; padding-left: 20px } pre { font-size: 13px; overflow-x: auto; margin: 12px 0 0 } summary { cursor: pointer }
@media (prefers-color-scheme: dark) { body { --page: #0e1114 } }
"""


def html_page(found: EvaluationReport, restoration: "report.Restoration | None" = None, steps: Steps = ()) -> str:
    """The whole page; `steps` are the rows of the run's metrics.jsonl, for training curves and cost."""
    subject = report.subject(found)
    title = _title(restoration, subject)
    with plots.theme():
        body = [
            f"<h1>{escape(title)}</h1>",
            f'<p class="lead">{_lead(restoration)}</p>',
            f'<div class="cards">{"".join(_cards(found, restoration, steps))}</div>',
            *_gate(restoration),
            *_perplexity(found, restoration),
            *_tasks(found),
            *_needles(found),
            *_worse(found),
            *_training(steps),
            *_tables(found),
        ]
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(title)}</title>'
    style = f"<style>{plots.THEME}{_STYLE}</style>"
    return f'<!doctype html><html lang="en"><head>{head}{style}</head><body><main>{"".join(body)}</main></body></html>\n'


def _title(restoration: "report.Restoration | None", subject: Evaluation) -> str:
    if restoration is None:
        return f"Evaluation of {subject.name}"
    name = Path(restoration.base_name).name
    return f"{name}: {restoration.native_window:,} tokens stretched to {restoration.target_length:,}, and restored"


def _lead(restoration: "report.Restoration | None") -> str:
    if restoration is None:
        return "The same held-out text and the same items for every model."
    return (
        "A language model finds its place in a text by rotary position embeddings, made for one window length. "
        f"Stretching them ({escape(restoration.rope_type)}) lets it read further and damages what it could do; a short "
        "training then teaches it to attend and predict as it did before. Below: the model as it was (native), stretched with "
        "its weights untouched, and restored."
    )


def _cards(found: EvaluationReport, restoration: "report.Restoration | None", steps: Steps) -> list[str]:
    subject = report.subject(found)
    scores, others = subject.scores, [model for model in found.models if model.name != subject.name]
    cards = []
    if length := max(scores.perplexity, default=0):
        rest = ", ".join(f"{o.name} {_number(o.scores.perplexity[length])}" for o in others if length in o.scores.perplexity)
        cards.append(_card(_number(scores.perplexity[length]), f"perplexity at {length:,} tokens", rest))
    mean = subject.short_mean
    if mean is not None and others and (before := others[0].short_mean):
        kept = [f"{o.name} {m / before:.1%}" for o in others[1:] if (m := o.short_mean) is not None]
        compared = (row for row in found.comparisons if row.model == subject.name and row.what == BEYOND_GUESSING)
        kept += [f"beyond guessing {row.ratio:.1%}" for row in compared if row.ratio is not None]
        cards.append(_card(f"{mean / before:.1%}", f"of the {others[0].name} short-task score kept", ", ".join(kept)))
    if length := max(scores.needle, default=0):
        rest = ", ".join(f"{o.name} {o.scores.needle[length]:.0%}" for o in others if length in o.scores.needle)
        cards.append(_card(f"{scores.needle[length]:.0%}", f"of needles found in {length:,} tokens", rest))
    if restoration is not None and restoration.served_limit:
        what = "longest length that meets every limit on perplexity and needles"
        card = _card(f"{restoration.served_limit:,}", "tokens served", what)
        cards.insert(0, card)
    if restoration is not None:
        seconds = sum(row.get("seconds", 0.0) for row in steps)
        spent = [f"{restoration.recipe.steps} steps", *([report.duration(seconds)] if seconds else [])]
        if peak_bytes := max((row.get("peak_memory_bytes", 0) for row in steps), default=0):
            spent.append(f"{peak_bytes / 2**30:.1f} GiB at most")
        spent += [restoration.trained_on] if restoration.trained_on else []
        cards.append(_card(f"{restoration.recipe.tokens:,}", "training tokens", ", ".join(spent)))
    return cards


def _gate(restoration: "report.Restoration | None") -> list[str]:
    if restoration is None or not restoration.checks:
        return []
    missed = len(restoration.failures)
    verdict = f"failed, {missed} of {len(restoration.checks)} limits missed" if missed else "passed"
    note = (
        "The result is held to limits against the native model before it is published; a length beyond the native window is "
        "held to the longest inside it. A mean below its limit by less than two standard errors may be chance and passes; a "
        "task fails where it is worse with a p-value below its limit."
    )
    rows = [
        [check.what, check.measured, f"at {check.kind} {check.limit}", "met" if check.met else "missed"]
        for check in sorted(restoration.checks, key=lambda check: check.met)
    ]
    return [_section(f"Quality gate: {verdict}", note, _table(["", "measured", "limit", ""], rows))]


def _perplexity(found: EvaluationReport, restoration: "report.Restoration | None") -> list[str]:
    native_window = restoration.native_window if restoration else None
    drawing, axes = plots.figure(10.6, 4.3, 2)
    plots.perplexity_by_length(axes[0], found.models)
    plots.perplexity_by_position(axes[1], found.models, native_window)
    axes[0].set_title("by window length")
    axes[1].set_title("by position in the longest window")
    plots.legend(drawing, axes[0])
    note = (
        "How surprised the model is by held-out text; lower is better, and more context should never make it worse. "
        "Left: the same 1,024 tokens at every length (half of the longest window where that is less), bars one standard error; "
        "only the text before them differs. Right: every position of the longest window."
    )
    return [_section("Perplexity", note, plots.to_svg(drawing, "Perplexity by window length and by position"))]


def _tasks(found: EvaluationReport) -> list[str]:
    names = {score.name for model in found.models for score in model.tasks}
    if not names:
        return []
    drawing, axes = plots.figure(10.6, 0.9 + len(names) * 0.26 * len(found.models))
    plots.task_bars(axes[0], found.models)
    plots.legend(drawing, axes[0])
    note = "What the model did before it was stretched must still be there; higher is better, lines are one standard error."
    return [_section("Short tasks", note, plots.to_svg(drawing, "Scores of the short tasks"))]


def _needles(found: EvaluationReport) -> list[str]:
    sections = []
    for task in dict.fromkeys(needle.task for model in found.models for needle in model.needles):
        models = [model for model in found.models if any(needle.task == task for needle in model.needles)]
        depths = len({needle.depth for model in models for needle in model.needles})
        drawing, axes = plots.figure(10.6, 0.9 + 0.42 * depths, len(models))
        for place, model in zip(axes, models, strict=True):
            plots.needle_map(place, model, task)
            place.set_xlabel("prompt, tokens")
        axes[0].set_ylabel("depth")
        samples = len(next(needle for needle in models[0].needles if needle.task == task).samples)
        kind, meaning = ("Needle", _NEEDLE_NOTES[task]) if task in _NEEDLE_NOTES else ("Reading", _READING_NOTE)
        note = f"{meaning} In percent; depth 0% is the beginning of the prompt. Prompts a cell: {samples}."
        title = f"{kind}: {task.replace('_', ' ')}"
        sections.append(_section(title, note, plots.to_svg(drawing, f"{title}, by prompt length and depth")))
    return sections


_NEEDLE_NOTES = {
    "single": "A six-digit number is hidden in a book; a cell is the share of prompts answered with exactly that number.",
    "multi_key": "Four numbers under four names are hidden; the model is asked for one of them.",
    "multi_value": "Four numbers under one name are hidden; a cell is the share of them that the model wrote.",
    "multi_query": "Four numbers under four names are hidden and all are asked for; a cell is the share of them found.",
    "variable_tracking": "A value is handed along a chain of four variables; a cell is the share of them named.",
    "common_words": "A list repeats ten words more often than the others; a cell is the share of them named.",
}
_READING_NOTE = "The evidence for a question is hidden in long text; a cell is the share of questions answered right."


def _worse(found: EvaluationReport) -> list[str]:
    if not found.comparisons:
        return []
    rows = report.worsened(found)
    reference = escape(found.models[0].name)
    listed = "".join(f"<li>{escape(report.told(row))}</li>" for row in rows)
    text = f"<ul>{listed}</ul>" if rows else "<p>Nothing that was measured.</p>"
    few = report.undecided(found)
    untold = f" Too few windows or prompts to tell: {escape('; '.join(few))}." if few else ""
    note = (
        f"Against {reference}, on the same items, by more than chance explains (p below 0.05). {escape(report.TESTS)}{untold}"
    )
    return [_section("What got worse", note, text)]


def _training(steps: Steps) -> list[str]:
    held = [row["validation"] for row in steps if "validation" in row]
    trained = [row for row in steps if "loss" in row]
    if not trained:
        return []
    compared = [values for values in held if values.get("layer_kl")]
    best = min(compared, key=lambda values: values["loss"], default=None)
    drawing, axes = plots.figure(10.6, 4.0, 2 if len(compared) > 1 else 1)
    plots.training_curves(axes[0], steps)
    axes[0].set_title("objectives")
    axes[0].legend()
    if best is not None and len(compared) > 1:
        plots.layer_kl(axes[1], compared[0]["layer_kl"], best["layer_kl"])
        axes[1].set_title(f"divergence from native {'attention' if 'attention' in trained[0] else 'relations'}, by layer")
        axes[1].legend()
    # Of all together: steps without a long window are much quicker.
    rate = sum(row["tokens_per_s"] * row["seconds"] for row in trained) / sum(row["seconds"] for row in trained)
    minimized = "; ".join(f"{meaning} ({name})" for name, meaning in _OBJECTIVE_NOTES.items() if name in trained[0])
    right = (
        " Right: where in the model the damage was and what is left of it with the exported weights, on held-out text."
        if len(compared) > 1
        else ""
    )
    note = f"{len(trained)} steps at {rate:,.0f} tokens a second. Left, what training minimizes: {minimized}.{right}"
    return [_section("Training", note, plots.to_svg(drawing, "Training curves and divergence by layer"))]


_OBJECTIVE_NOTES: dict[Objective, str] = {
    "attention": "how far the rows of attention are from the frozen native model's",
    "self_relation": "how far queries, keys and values relate otherwise to their own kind than in the frozen native model",
    "logits": "how far the predictions of the next word are from the native model's",
    "hidden": "how far its hidden states are from the native model's",
    "short_lm": "how surprising the text of native windows is",
    "lm": "how surprising long text is",
    "retrieval": "how surprising the answers to facts are that were woven into long text",
}


def _tables(found: EvaluationReport) -> list[str]:
    header, rows = report.score_table(found.models)
    settings = escape(json.dumps(found.config, indent=2))
    details = f"<details><summary>Settings of this evaluation</summary><pre>{settings}</pre></details>"
    return [_section("Every figure", escape(report.how(found)), _table(header, rows)), f"<section>{details}</section>"]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _section(title: str, note: str, content: str) -> str:
    return f'<section><h2>{escape(title)}</h2><p class="note">{note}</p>{content}</section>'


def _card(figure: str, what: str, rest: str) -> str:
    return f'<div class="card"><b>{escape(figure)}</b><span>{escape(what)}</span><small>{escape(rest)}</small></div>'


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}"
