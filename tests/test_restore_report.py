"""A report tells the figures, says what got worse, and stands alone in light and dark."""

import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, get_args
from xml.etree import ElementTree

import pytest

from ard_serve.artifact import DataRecord, Quality, RecipeRecord
from ard_serve.errors import UsageError
from restore import evaluate, plots, report
from restore.config import Objective
from restore.evaluation.config import EvalConfig
from restore.evaluation.gate import Check
from restore.evaluation.results import (
    Evaluation,
    EvaluationReport,
    NeedleScore,
    PerplexityScore,
    PositionCurve,
    TaskScore,
)
from restore.page import html_page

NATIVE, STRETCHED, RESTORED = 3.4, 4.4, 3.5  # nats a token


def model(name: str, nll: float, right: int, found: float) -> Evaluation:
    correct = tuple(int(i < right) for i in range(100))
    return Evaluation(
        name=name,
        perplexity=tuple(PerplexityScore(length=n, window_nll=(nll, nll + 0.01, nll + 0.02)) for n in (2048, 8192)),
        by_position=PositionCurve(edges=(1, 64, 512, 4096, 8192), perplexity=(900.0, 80.0, 40.0, 35.0)),
        needles=tuple(
            NeedleScore(task="single", length=n, depth=d, samples=(found, 1.0)) for n in (2048, 8192) for d in (0.0, 1.0)
        ),
        tasks=tuple(
            TaskScore(name=task, metric="acc", metrics={"acc": right / 100}, correct=correct) for task in ("lambada", "piqa")
        ),
        seconds=3.0,
    )


@pytest.fixture
def found() -> EvaluationReport:
    models = [model("native", NATIVE, 60, 1.0), model("stretched", STRETCHED, 31, 0.0), model("restored", RESTORED, 47, 1.0)]
    return evaluate.make_report(models, EvalConfig(data=("held-out-book",), lengths=(2048, 8192)))


@pytest.fixture
def restoration() -> report.Restoration:
    recipe = RecipeRecord(
        name="default", objectives={"attention": 1.0, "lm": 0.5}, trainable="lora", steps=65, tokens=4259840, seed=3
    )
    data = DataRecord(source="books", documents=51, tokens=9_430_000, sha256="0")
    return report.Restoration("org/Tiny-1B", 2048, 8192, "yarn", recipe, data)


@pytest.fixture
def steps() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [
        {"step": 0, "tokens": 0, "validation": {"loss": 0.2, "attention": 0.2, "layer_kl": [0.3, 0.2, 0.1]}}
    ]
    rows += [
        {
            "step": number, "loss": 1.0, "attention": 0.2 / number, "lm": 3.0, "retrieval": 2.0, "layer_kl": [0.1] * 3,
            "grad_norm": 1.0, "seconds": 30.0, "tokens_per_s": 777.0, "peak_memory_bytes": 3 << 30,
        }
        for number in range(1, 11)
    ]  # fmt: skip
    rows[-1]["validation"] = {"loss": 0.02, "attention": 0.02, "layer_kl": [0.03, 0.02, 0.01]}
    return rows


class Text(HTMLParser):
    """All text of a page; fails on tags that do not close in order."""

    VOID = frozenset({"meta", "path", "use", "line", "rect", "circle"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.parts: list[str] = []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.parts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.parts).split())


def write(out: Path, found: EvaluationReport, **rest: Any) -> tuple[str, str]:
    paths = report.write(found, out, **rest)
    assert [path.name for path in paths] == ["evaluation.json", "report.md", "report.html"]
    return paths[1].read_text(), paths[2].read_text()


def test_json_reads_back_as_what_was_measured(found: EvaluationReport, tmp_path: Path) -> None:
    write(tmp_path, found)
    assert EvaluationReport.model_validate_json((tmp_path / "evaluation.json").read_bytes()) == found
    raw = json.loads((tmp_path / "evaluation.json").read_text())
    assert raw["models"][2]["tasks"][0]["correct"][:3] == [1, 1, 1]


def test_a_figure_that_is_no_number_reads_back(found: EvaluationReport, tmp_path: Path) -> None:
    """A model that breaks down at one length must not cost the whole evaluation, nor what `ard export --force` makes of it."""
    whole = PerplexityScore(length=512, window_nll=(1.0, 1.1, 1.2, 1.0, 1.1, 1.2))
    broken = PerplexityScore(length=512, window_nll=(math.nan,) * 6)
    native, restored = (
        found.models[0].model_copy(update={"name": name, "perplexity": (score,)})
        for name, score in (("native", whole), ("restored", broken))
    )
    write(tmp_path, evaluate.make_report([native, restored], EvalConfig(data=("x",))))
    back = report.read(tmp_path / "evaluation.json")
    assert math.isnan(back.models[1].perplexity[0].window_nll[0])
    assert [row.what for row in report.worsened(back)] == ["perplexity at 512"]
    json.loads((tmp_path / "evaluation.json").read_text(), parse_constant=pytest.fail)
    quality = Quality(native=back.models[1].scores)
    assert math.isnan(Quality.model_validate_json(quality.model_dump_json()).native.perplexity[512])  # type: ignore[union-attr]


def test_what_was_not_measured_is_not_explained(found: EvaluationReport) -> None:
    bare = found.models[0].model_copy(update={"needles": (), "haystack": None, "tasks": ()})
    told = report.how(found.model_copy(update={"models": (bare,), "config": found.config | {"windows": 1}}))
    assert "Needle" in report.how(found)
    assert "Needle" not in told
    assert "Short tasks" not in told
    assert "Perplexity: 1 window of" in told


def test_a_task_named_like_markup_stays_text(found: EvaluationReport, tmp_path: Path) -> None:
    few = found.models[0].tasks[0].model_copy(update={"name": "<b>few", "correct": (1, 0), "metrics": {}})
    pair = [found.models[0].model_copy(update={"name": name, "tasks": (few,)}) for name in ("native", "restored")]
    html = write(tmp_path, evaluate.make_report(pair, EvalConfig(data=("x",))))[1]
    assert "Too few windows or prompts to tell: &lt;b&gt;few" in html
    assert "<b>few" not in html


def test_a_file_that_is_no_evaluation_is_refused_in_one_line(found: EvaluationReport, tmp_path: Path) -> None:
    write(tmp_path, found)
    assert report.read(tmp_path / "evaluation.json") == found
    (tmp_path / "other.json").write_text('{"models": 3}')
    for name in ("other.json", "missing.json"):
        with pytest.raises(UsageError, match=rf"{name}: not an evaluation\.json") as caught:
            report.read(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_figures_are_in_markdown_and_html(
    found: EvaluationReport, restoration: report.Restoration, steps: list[dict[str, Any]], tmp_path: Path
) -> None:
    markdown, html = write(tmp_path, found, restoration=restoration, steps=steps)
    text = Text(html).text
    for evaluation in found.models:
        for value in evaluation.scores.perplexity.values():
            assert f"{value:.2f}" in markdown
            assert f"{value:.2f}" in text
        assert f"{evaluation.scores.tasks['piqa']:.3f} ± " in markdown
        assert f"{evaluation.scores.tasks['piqa']:.3f} ± " in text
    assert "| needle found at 8,192 tokens | 100% | 50% | 100% |" in markdown


def test_the_headline_says_what_was_kept_and_what_it_cost(
    found: EvaluationReport, restoration: report.Restoration, steps: list[dict[str, Any]], tmp_path: Path
) -> None:
    text = Text(write(tmp_path, found, restoration=restoration, steps=steps)[1]).text
    assert "Tiny-1B: 2,048 tokens stretched to 8,192, and restored" in text
    assert "78.3% of the native short-task score kept stretched 51.7%" in text
    assert "4,259,840 training tokens 65 steps, 5 minutes, 3.0 GiB at most" in text
    assert "10 steps at 777 tokens a second" in text
    quick = [row | {"seconds": 10.0, "tokens_per_s": 77.0} if row["step"] % 2 else row for row in steps]
    assert "10 steps at 602 tokens a second" in Text(html_page(found, restoration, quick)).text
    every = [row | dict.fromkeys(get_args(Objective), 1.0) for row in steps]
    explained = Text(html_page(found, restoration, every)).text
    assert not [objective for objective in get_args(Objective) if f"({objective})" not in explained]
    reached = replace(restoration, served_limit=4096, trained_on="NVIDIA H200")
    text = Text(write(tmp_path, found, restoration=reached, steps=steps)[1]).text
    assert "4,096 tokens served longest length that meets every limit" in text
    assert "3.0 GiB at most, NVIDIA H200" in text
    assert "divergence from native attention, by layer" in text
    assert text.count("retrieval") == 2, "in the plot's legend and in what explains it"
    assert "woven into long text (retrieval). Right: where" in text
    assert "(logits)" not in text, "what was not trained is not explained"


def test_what_got_worse_is_said_and_what_is_chance_is_not(found: EvaluationReport, tmp_path: Path) -> None:
    worse = {row.what for row in report.worsened(found)}
    assert {"lambada", "piqa"} <= worse
    assert all(row.model == "restored" for row in report.worsened(found))
    markdown, html = write(tmp_path, found)
    assert "lambada: 0.600 → 0.470 (p < 0.001)" in markdown
    assert "lambada: 0.600 → 0.470 (p < 0.001)" in Text(html).text
    assert "Short tasks: 100 items each, ± one standard error" in markdown
    same = evaluate.make_report(
        [found.models[0], found.models[0].model_copy(update={"name": "restored"})], EvalConfig(data=("x",))
    )
    assert report.worsened(same) == []
    assert "nothing that was measured" in report.markdown(same, None)


def test_a_page_needs_nothing_but_itself(
    found: EvaluationReport, restoration: report.Restoration, steps: list[dict[str, Any]], tmp_path: Path
) -> None:
    html = write(tmp_path, found, restoration=restoration, steps=steps)[1]
    assert not re.search(r'(src|href)="(?!#)', html.replace("xlink:href", "href").replace('href="#', ""))
    assert "<script" not in html
    assert "url(http" not in html
    assert "prefers-color-scheme: dark" in html
    assert not re.search(r"#[ab]1000\d", html), "a stand-in colour was left"
    assert html.count("<svg") == 4


def test_a_heat_map_has_a_cell_for_each_length_and_depth(found: EvaluationReport, tmp_path: Path) -> None:
    page = write(tmp_path, found)[1]
    section = page[page.index("Needle: single") :]
    section = section[: section.index("</section>")]
    assert section.count("fill: var(--heat)") == 12
    assert Text(section[section.index("<svg") :]).text.split().count("50") == 4


def test_one_model_alone_makes_a_report(found: EvaluationReport, tmp_path: Path) -> None:
    alone = Evaluation(name="<b>odd</b>", perplexity=found.models[0].perplexity[:1])
    markdown, html = write(tmp_path, evaluate.make_report([alone], EvalConfig(data=("x",))))
    assert "<b>odd</b>" not in html
    assert "Evaluation of <b>odd</b>" in Text(html).text
    assert "Against" not in markdown


def test_the_model_card_tells_what_was_done(found: EvaluationReport, restoration: report.Restoration) -> None:
    card = report.model_card(restoration, found, license_name="apache-2.0")
    front = card.split("---")[1]
    assert "base_model: org/Tiny-1B" in front
    assert "license: apache-2.0" in front
    for piece in (
        "2,048 tokens",
        "(yarn) to 8,192",
        "attention × 1, lm × 0.5",
        "65 steps over 4,259,840 tokens",
        "51 documents",
        "seed 3",
    ):
        assert piece in card
    assert f"{found.models[2].scores.perplexity[8192]:.2f}" in card
    assert "--force" not in card
    assert "Training took" not in card
    assert "[report.html](report.html)" in card
    assert "as it did before and to use text beyond them" in card
    repaired = replace(restoration, recipe=restoration.recipe.model_copy(update={"objectives": {"attention": 1.0}}))
    assert "as it did before. Recipe" in report.model_card(repaired, found)
    assert "Training took 2 minutes." in report.model_card(replace(restoration, trained_s=140.0), found)
    assert (report.duration(40), report.duration(7200)) == ("40 seconds", "2.0 hours")


def test_the_card_promises_no_more_than_what_was_measured(found: EvaluationReport, restoration: report.Restoration) -> None:
    card = report.model_card(replace(restoration, served_limit=4096), found)
    assert "Up to 4,096 tokens it meets every limit" in card
    assert "gateway, up to 4,096 tokens" in card
    assert "finds no needles" not in card
    lost = [NeedleScore(task="single", length=restoration.native_window, depth=0.5, samples=(0.0, 0.0))]
    blind = found.models[0].model_copy(update={"needles": tuple(lost)})
    vacuous = report.model_card(
        replace(restoration, served_limit=4096), found.model_copy(update={"models": (blind, *found.models[1:])})
    )
    assert "The native model finds no needles in its own window" in vacuous
    assert "alone, up to 8,192 tokens, whatever was measured" in card
    assert "not shown to be good at any length." in report.model_card(restoration, found)
    unmeasured = report.model_card(restoration)
    assert "not shown to be good at any length: nothing was measured." in unmeasured
    assert "report.html" not in unmeasured


def test_a_forced_or_unmeasured_export_says_so(found: EvaluationReport, restoration: report.Restoration) -> None:
    met, broken = (
        Check("perplexity at 2048", "29.00", "30.00", met=True, kind="most"),
        Check("perplexity at 8192", "99.00", "30.00", met=False, kind="most"),
    )
    missed = replace(restoration, checks=(met, broken))
    card = report.model_card(missed, found)
    assert "published with `--force`" in card
    assert "- perplexity at 8192 = 99.00, limit 30.00" in card
    assert "perplexity at 8192 = 99.00, limit 30.00" in report.markdown(found, missed)
    page = Text(html_page(found, missed)).text
    assert "Quality gate: failed, 1 of 2 limits missed" in page
    assert "perplexity at 8192 99.00 at most 30.00 missed perplexity at 2048 29.00 at most 30.00 met" in page
    passed = replace(restoration, checks=(met,))
    assert "Quality gate: passed" in Text(html_page(found, passed)).text
    assert "held to 1 limits against the native model, and meets all of them" in report.model_card(passed, found)
    assert "Nothing was measured" in report.model_card(restoration)


@pytest.mark.parametrize(("needles", "beside"), [(True, ("Needles found", "100%")), (False, ("lambada", "0.470"))])
def test_the_picture_of_the_readme_is_one_svg_with_its_own_theme(
    found: EvaluationReport, tmp_path: Path, needles: bool, beside: tuple[str, ...]
) -> None:
    models = [model.model_copy(update={} if needles else {"needles": ()}) for model in found.models]
    write(tmp_path, found.model_copy(update={"models": tuple(models)}))
    plots.main([str(tmp_path / "evaluation.json"), str(tmp_path / "images" / "before-after.svg")])
    root = ElementTree.fromstring((tmp_path / "images" / "before-after.svg").read_text())
    assert root.tag.endswith("svg")
    text = " ".join(root.itertext())
    assert "prefers-color-scheme: dark" in text
    for word in ("native", "stretched", "restored", *beside):
        assert word in text


def test_a_model_that_breaks_down_leaves_the_plot_and_is_named(found: EvaluationReport) -> None:
    broken = found.models[0].model_copy(
        update={
            "perplexity": (PerplexityScore(length=2048, window_nll=(3.4,)), PerplexityScore(length=8192, window_nll=(9.0,)))
        }
    )
    with plots.theme():
        drawing, axes = plots.figure(5, 3)
        plots.perplexity_by_length(axes[0], [broken, *found.models[1:]])
        assert axes[0].get_ylim()[1] < 200
        assert "native ↑ 8,103" in plots.to_svg(drawing, "test")
