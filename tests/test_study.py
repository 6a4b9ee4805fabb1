"""A study goes on where it stopped, measures what runs share once, and puts every finished run on record once."""

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from ard_serve import cli
from ard_serve.artifact import RecipeRecord
from restore.config import RestoreConfig
from restore.evaluate import Candidate, make_report
from restore.evaluation.config import EvalConfig
from restore.evaluation.results import Evaluation, NeedleScore, PerplexityScore, SlidingScore, TaskScore
from scripts import code_text, record_quality, study


@pytest.fixture(scope="module")
def settings(make_checkpoint: Callable[..., Path], texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    shared = {
        "target_length": 512, "data": [str(texts)], "batch_tokens": 512, "window": 128, "long_window": 256, "rank": 2,
        "steps": 2, "dtype": "fp32", "device": "cpu",
    }  # fmt: skip
    fields = {
        "model": str(make_checkpoint("llama3")),
        "restore": shared,
        "evaluation": {"data": [str(texts)], "lengths": [64, 512], "windows": 2, "needle_samples": 0, "dtype": "fp32"},
        "recipes": {"ours": {}, "paper": {"recipe": "linearard"}},
        "rope_types": ["yarn", "linear"],
        "seeds": [3, 4],
    }
    path = tmp_path_factory.mktemp("study") / "study.yaml"
    path.write_text(yaml.safe_dump(fields))
    return path


def test_every_recipe_runs_once_before_the_next_seed(settings: Path, tmp_path: Path) -> None:
    work = study.Work(study.Study.resolve(settings, {}), tmp_path, tmp_path, "command", 0.0)
    runs = dict(work.runs())
    assert list(runs)[:4] == ["ours-yarn-3", "paper-yarn-3", "ours-linear-3", "paper-linear-3"]
    assert len(runs) == 8
    assert (runs["paper-linear-4"].recipe, runs["paper-linear-4"].rope_type, runs["paper-linear-4"].seed) == (
        "linearard",
        "linear",
        4,
    )
    assert runs["paper-linear-4"].out == tmp_path / "paper-linear-4"


def test_a_study_is_done_in_pieces(settings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[str] = []
    original = Candidate.measure

    def counted(self: Candidate, config: Any) -> Any:
        measured.append(self.name)
        return original(self, config)

    # In this process and without vLLM; as a command a restoration takes 10 s more.
    monkeypatch.setattr("restore.export.verify_rotary", lambda *_: None)
    monkeypatch.setattr(study.Work, "ard", lambda self, *words: cli.main(words))
    monkeypatch.setattr(Candidate, "measure", counted)
    words = [str(settings), "--out", str(tmp_path / "work"), "--results", str(tmp_path)]
    assert study.main([*words, "--minutes", "0"]) == study.MORE_TO_DO
    monkeypatch.setattr(study.Work, "runs", lambda self, all_runs=study.Work.runs: list(all_runs(self))[:2])
    assert study.main(words) == 0
    assert measured == ["native", "stretched", "restored", "restored"], "what two runs share is measured once"
    results = next(tmp_path.glob("quality-*.json"))
    assert study.main([*words, "--runs", "ours-yarn-3"]) == 0
    assert study.main([*words, "--runs", "ours-theta-3"]) == 2, "no such run"
    assert study.main(words) == 0
    entries = json.loads(results.read_text())["runs"]
    assert [entry["remark"] for entry in entries] == ["ours-yarn-3", "paper-yarn-3"]
    assert len(measured) == 4
    native, stretched, restored = entries[1]["rows"]
    assert (native["recipe"], stretched["recipe"], restored["recipe"]) == ("native", "none", "paper"), "the study's name for it"
    assert (restored["seed"], restored["steps"], restored["rope"]) == (3, 2, "yarn")
    assert restored["ppl"].keys() == {"64", "512"}
    assert (tmp_path / "work" / "ours-yarn-3" / "report.html").exists()


def test_what_cannot_be_measured_is_refused_before_a_run_and_asked_once(
    settings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A study trained two models, and then its longest questions had too little text."""
    commands: list[str] = []

    def diverges(self: study.Work, *words: str) -> int:
        commands.append(words[0])
        return 6

    monkeypatch.setattr(study.Work, "ard", diverges)
    fields = yaml.safe_load(settings.read_text())
    fields["evaluation"] |= {"needle_samples": 1, "needle_lengths": [600, 100_000]}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(fields))
    words = [str(tmp_path / "study.yaml"), "--out", str(tmp_path / "work"), "--results", str(tmp_path)]
    assert study.main(words) == 4
    assert "study: single: the longest document: " in capsys.readouterr().err
    assert commands == []

    fields["evaluation"]["needle_lengths"] = [600]
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(fields))
    checked: list[EvalConfig] = []
    monkeypatch.setattr("restore.evaluation.preflight.check_folders", lambda _, settings: checked.append(settings))
    assert study.main([*words, "--runs", "ours-yarn-3"]) == 0
    assert study.main([*words, "--runs", "ours-yarn-4"]) == 0
    assert (commands, [each.needle_lengths for each in checked]) == (["restore"] * 2, [(600,)])


def test_a_run_that_diverges_is_left_out_and_any_other_mistake_ends_the_study(
    settings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def diverges_once(self: study.Work, *words: str) -> int:
        asked.append(Path(words[2]).name)
        return 6 if len(asked) == 1 else 4

    # Names with a dot, that are alike in front of it.
    fields = yaml.safe_load(settings.read_text()) | {"recipes": {"rate-0.5": {}, "rate-0.25": {"learning_rate": 0.25}}}
    (tmp_path / "dots.yaml").write_text(yaml.safe_dump(fields, sort_keys=False))
    monkeypatch.setattr(study.Work, "ard", diverges_once)
    words = [str(tmp_path / "dots.yaml"), "--out", str(tmp_path), "--results", str(tmp_path)]
    assert study.main(words) == 3
    assert asked == ["rate-0.5-yarn-3.yaml", "rate-0.25-yarn-3.yaml"]
    assert (tmp_path / "rate-0.5-yarn-3.failed").exists()
    study.main(words)
    assert asked[2:] == ["rate-0.25-yarn-3.yaml"]


def test_a_row_has_every_figure_of_its_model() -> None:
    def model(name: str, right: int) -> Evaluation:
        answers = (1,) * right + (0,) * (100 - right)
        return Evaluation(
            name=name,
            perplexity=(PerplexityScore(length=64, window_nll=(3.0, 3.2)),),
            sliding=(SlidingScore(documents="long", length=64, nll=(3.0,)),),
            needles=tuple(NeedleScore(task=task, length=64, depth=0.5, samples=(1.0, 0.5)) for task in ("single", "squad")),
            tasks=(
                *(TaskScore(name=task, metric="acc", metrics={}, correct=answers, chance=0.25) for task in ("a", "b")),
                TaskScore(name="mc2", metric="mc2", metrics={}, correct=(0.4,)),
            ),
        )

    report = make_report([model("native", 75), model("restored", 65)], EvalConfig(data=("x",)))
    config = RestoreConfig.resolve(None, {"model": "m/tiny", "target_length": 512, "data": ["x"], "out": "o"})
    done = RecipeRecord(name="default", objectives={"lm": 1.0}, trainable="lora", steps=2, tokens=9, seed=3)
    native, restored = record_quality.rows(report, config, done, 4.0)
    assert (native["retention"], native["beyond_guessing"]) == (1.0, 1.0)
    assert (restored["short_mean"], restored["retention"]) == (0.65, pytest.approx(65 / 75)), (
        "the share is told and not counted"
    )
    assert restored["beyond_guessing"] == pytest.approx(0.4 / 0.5)
    assert restored["short"].keys() == {"a", "b", "mc2"}
    assert (restored["needle"], restored["uses"]) == ({64: 0.75}, {"squad": {64: 0.75}})
    assert restored["sliding"] == {"perplexity, sliding over 64 tokens, long documents": pytest.approx(20.09, rel=1e-3)}


def test_results_of_another_machine_are_merged_once(tmp_path: Path) -> None:
    here, there = tmp_path / "quality-x.json", tmp_path / "other.json"
    first, second = ({"date": day, "settings": {"seed": 1}} for day in ("monday", "tuesday"))
    record_quality.append(here, first)
    record_quality.append(there, first)
    record_quality.append(there, second)
    for entry in record_quality.read(there):
        record_quality.append(here, entry)
    assert record_quality.read(here) == [first, second]


def test_a_command_is_stopped_when_the_piece_is_over(settings: Path, tmp_path: Path) -> None:
    work = study.Work(study.Study.resolve(settings, {}), tmp_path, tmp_path, "command", time.monotonic())
    assert work.ard("eval", "--help") == -signal.SIGTERM


@pytest.mark.parametrize("example", sorted((study.ROOT / "examples").glob("study-*.yaml")), ids=lambda path: path.stem)
def test_the_examples_are_studies(example: Path) -> None:
    found = study.Study.resolve(example, {})
    names = [name for name, _ in study.Work(found, Path("out"), Path("out"), "", 0.0).runs()]
    assert len(set(names)) == len(names)
    ropes = {recipe: {changes.get("rope_type", rope) for rope in found.rope_types} for recipe, changes in found.recipes.items()}
    assert set(names) == {f"{recipe}-{rope}-{seed}" for recipe in ropes for rope in ropes[recipe] for seed in found.seeds}


def test_a_recipe_with_a_rope_of_its_own_runs_once(settings: Path, tmp_path: Path) -> None:
    """As the twin does: the native model after the same text, which nothing stretches."""
    fields = yaml.safe_load(settings.read_text())
    fields["recipes"] = {"ours": {}, "twin": {"recipe": "cpt", "rope_type": "none", "target_length": 128}}
    found = study.Study.model_validate(fields)
    runs = dict(study.Work(found, tmp_path, tmp_path, "command", 0.0).runs())
    assert list(runs) == ["ours-yarn-3", "twin-none-3", "ours-linear-3", "ours-yarn-4", "twin-none-4", "ours-linear-4"]
    assert runs["twin-none-3"].rope_type == "none"


def test_a_control_is_restored_and_measured_beside_its_native_self(
    settings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = yaml.safe_load(settings.read_text())
    fields["recipes"] = {"twin": {"recipe": "cpt", "rope_type": "none", "target_length": 128, "long_window": 128}}
    fields["evaluation"]["lengths"] = [64, 128]
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(fields | {"seeds": [3]}))
    monkeypatch.setattr("restore.export.verify_rotary", lambda *_: None)
    monkeypatch.setattr(study.Work, "ard", lambda self, *words: cli.main(words))
    assert study.main([str(path), "--out", str(tmp_path / "work"), "--results", str(tmp_path)]) == 0
    (entry,) = json.loads(next(tmp_path.glob("quality-*.json")).read_text())["runs"]
    assert [row["recipe"] for row in entry["rows"]] == ["native", "twin"]
    assert [row["rope"] for row in entry["rows"]] == [None, "none"]


def test_program_text_becomes_documents_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "project" / "package"
    source.mkdir(parents=True)
    for name in "cab":
        (source / f"{name}.py").write_text(f"# {name}\n" * 30_000)
    (source / "notes.txt").write_text("no program")
    monkeypatch.setattr("sys.argv", ["code_text", str(tmp_path / "out"), str(tmp_path / "project"), "--mb", "0.2"])
    monkeypatch.setattr(code_text, "_DOCUMENT_BYTES", 200_000)
    code_text.main()
    (document,) = (tmp_path / "out").iterdir()
    lines = document.read_text().splitlines()
    assert (lines[0], lines[-1], len(lines)) == ("# a", "# b", 60_001), "two files are a document, which is enough"
