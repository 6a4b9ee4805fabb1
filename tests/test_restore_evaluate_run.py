"""`ard eval` end to end on tiny models: an export beside its native and its untouched stretched self."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ard_serve import artifact
from ard_serve.errors import DataError, ModelError, ResourceError, UsageError
from restore import evaluate, job, loading
from restore.config import RestoreConfig
from restore.evaluation import preflight
from restore.evaluation.config import EvalConfig
from restore.evaluation.results import Evaluation, EvaluationReport
from restore.inspection import read_config
from restore.rope import plan_rope

MakeCheckpoint = Callable[..., Path]


@pytest.fixture(scope="module")
def base(make_checkpoint: MakeCheckpoint) -> Path:
    return make_checkpoint("llama3", seed=1)


@pytest.fixture(scope="module")
def exported(make_checkpoint: MakeCheckpoint, base: Path) -> Path:
    """Other weights in the base's shape, with a stretched config.json and the manifest of an export."""
    folder = make_checkpoint("llama3", seed=2)
    config, plan = read_config(folder), plan_rope(read_config(folder), 512, "linear")
    (folder / "config.json").write_text(json.dumps(plan.target_config(config)))
    manifest = artifact.Manifest(
        created_at="2026-01-01T00:00:00+00:00",
        ard_serve_version="0",
        base=artifact.BaseModelRecord(name=str(base), architecture="llama", weights_sha256="", native_window=128),
        rope=artifact.RopeRecord(rope_type="linear", factor=4.0, target_length=512, parameters=plan.parameters),
        recipe=artifact.RecipeRecord(
            name="default", objectives={"logits": 1.0}, trainable="full", steps=7, tokens=4321, seed=0
        ),
        files=artifact.describe_files(folder),
        tensors=artifact.describe_tensors(folder),
    )
    artifact.write_manifest(folder, manifest)
    return folder


def settings(texts: Path, **fields: Any) -> EvalConfig:
    tasks = texts.parent / f"tasks-{texts.name}"
    tasks.mkdir(exist_ok=True)
    items = [{"query": f"{i} times 2 is", "choices": [str(2 * i), str(i)], "gold": 0} for i in range(6)]
    (tasks / "sums.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    defaults = {
        "data": (str(texts),), "tasks": (str(tasks),), "lengths": (64, 512), "windows": 3, "needle_lengths": (512,),
        "needle_depths": (0.5,), "needle_samples": 2, "sliding": (128,), "dtype": "fp32", "device": "cpu",
    }  # fmt: skip
    return EvalConfig.model_validate(defaults | fields)


def read(out: Path) -> EvaluationReport:
    return EvaluationReport.model_validate_json((out / "evaluation.json").read_bytes())


def test_an_export_is_measured_beside_native_and_stretched(base: Path, exported: Path, texts: Path, tmp_path: Path) -> None:
    config = settings(texts)
    assert evaluate.run(str(exported), config, tmp_path / "out") == 0
    models = {model.name: model for model in read(tmp_path / "out").models}
    assert list(models) == ["native", "stretched", "restored"]
    native = perplexity(base, None, config)
    stretched = perplexity(base, read_config(exported), config)
    restored = perplexity(exported, None, config)
    assert len({tuple(native.values()), tuple(stretched.values()), tuple(restored.values())}) == 3
    for name, expected in (("native", native), ("stretched", stretched), ("restored", restored)):
        assert models[name].scores.perplexity == pytest.approx(expected, rel=1e-4)
        assert set(models[name].scores.tasks) == {"sums"}
        assert set(models[name].scores.needle) == {512}
        assert len(models[name].sliding[0].nll) == 4, "every document"
        assert len(models[name].window_documents) == 3
        assert {Path(source).parent for source in models[name].window_documents} == {texts}
        assert models[name].haystack == str(max(texts.iterdir(), key=lambda book: book.stat().st_size))
    assert {row.model for row in read(tmp_path / "out").comparisons} == {"stretched", "restored"}
    title = "perplexity, sliding over 128 tokens, long documents"
    page = (tmp_path / "out" / "report.html").read_text()
    assert "tokens served" in page or "Quality gate: failed" in page, "the figures are held to the default limits"
    assert title in {row.what for row in read(tmp_path / "out").comparisons}
    report = (tmp_path / "out" / "report.md").read_text()
    assert f"| {title} | " in report
    assert f"hidden in a book ({models['native'].haystack})" in report


@torch.no_grad()
def perplexity(folder: Path, config: dict[str, Any] | None, settings: EvalConfig) -> dict[int, float]:
    """By transformers' own loss over what the windows that `evaluate` cuts predict."""
    from restore import data
    from restore.evaluation.perplexity import cut_windows

    model, tokenizer = loading.load(folder, torch.float32, "cpu", config), loading.load_tokenizer(folder)
    documents = [tokenizer(d.text, add_special_tokens=False)["input_ids"] for d in data.read_documents(settings.data)]
    windows = cut_windows([torch.tensor(ids).numpy() for ids in documents], [256], settings.lengths, settings.windows)
    found = {}
    for length, cuts in windows.items():
        losses = []
        for cut in cuts:
            labels = torch.full_like(cut.ids_WT, -100)
            labels[:, cut.scored] = cut.ids_WT[:, cut.scored]
            losses.append(float(model(cut.ids_WT, labels=labels).loss))
        assert len({len(cut.scored) for cut in cuts}) == 1, "losses of as many tokens each"
        found[length] = math.exp(sum(losses) / len(losses))
    return found


def test_the_report_is_written_and_the_table_printed(
    exported: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate.run(str(exported), settings(texts, needle_samples=0, tasks=()), tmp_path / "out", stretched=False)
    found = read(tmp_path / "out")
    assert [model.name for model in found.models] == ["native", "restored"]
    value = f"{found.models[1].scores.perplexity[512]:.2f}"
    for name in ("report.md", "report.html"):
        assert value in (tmp_path / "out" / name).read_text()
    assert value in capsys.readouterr().out
    assert found.config["lengths"] == [64, 512]


def test_other_folders_are_measured_too(base: Path, make_checkpoint: MakeCheckpoint, texts: Path, tmp_path: Path) -> None:
    other = make_checkpoint("qwen2", seed=4)
    config = settings(texts, lengths=(), needle_samples=0, tasks=())
    evaluate.run(str(base), config, tmp_path / "out", against=[str(other)])
    found = read(tmp_path / "out")
    assert [model.name for model in found.models] == [base.name, other.name]
    assert list(found.models[0].scores.perplexity) == [128], "up to what the model serves"
    with pytest.raises(UsageError, match=f"two models are called '{base.name}'"):
        evaluate.run(str(base), config, tmp_path / "out", against=[str(base)])


def test_a_base_that_moved_is_named_and_can_be_given(
    base: Path, exported: Path, texts: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    manifest = artifact.read_manifest(exported)
    assert manifest is not None
    moved = manifest.model_copy(update={"base": manifest.base.model_copy(update={"name": "/moved/away"})})
    artifact.write_manifest(exported, moved)
    config = settings(texts, needle_samples=0, tasks=())
    evaluate.run(str(exported), config, tmp_path / "alone")
    assert [model.name for model in read(tmp_path / "alone").models] == ["restored"]
    assert "/moved/away" in caplog.text
    assert "--base" in caplog.text
    evaluate.run(str(exported), config, tmp_path / "both", base=str(base))
    assert [model.name for model in read(tmp_path / "both").models] == ["native", "stretched", "restored"]
    artifact.write_manifest(exported, manifest)


def test_text_shorter_than_a_window_is_refused(base: Path, texts: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the longest window 100000"):
        evaluate.run(str(base), settings(texts, lengths=(100_000,)), tmp_path / "out")
    with pytest.raises(UsageError, match="name held-out text"):
        evaluate.run(str(base), settings(texts, data=()), tmp_path / "out")


def test_tasks_are_read_before_any_model_is(base: Path, texts: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    with pytest.raises(DataError, match="nowhere: neither a task file"):
        evaluate.run(str(base), settings(texts, tasks=("nowhere",)), tmp_path / "out")
    with pytest.raises(UsageError, match="lm-eval"):
        evaluate.run(str(base), settings(texts, harness=("no such task",)), tmp_path / "out")
    assert "measured in" not in caplog.text


def towns(path: Path, count: int) -> str:
    items = [
        {"title": f"Town {i}", "context": f"It has {i} mills.", "question": "How many?", "answers": [f"{i}"]}
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return str(path)


@pytest.mark.parametrize(
    ("fields", "refusal"),
    [
        ({"lengths": (64, 100_000)}, "the longest window 100000"),
        ({"sliding": (100_000,)}, "the longest sliding window 100000"),
        ({"needle_lengths": (512, 100_000)}, "single: the longest document: .* a prompt of 100000 needs"),
        ({"reading": ("towns.jsonl",)}, r"towns: .*towns\.jsonl, paragraphs of titles other than .* a prompt of 512 needs"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_any_model_is_loaded(
    base: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any], refusal: str
) -> None:
    """Needles came after minutes of perplexity, and the longest of them last."""
    loaded: list[Path] = []
    monkeypatch.setattr(loading, "load", lambda folder, *_: loaded.append(folder))
    monkeypatch.setattr("restore.job.load", loading.load)
    towns(tmp_path / "towns.jsonl", 12)
    monkeypatch.chdir(tmp_path)
    config = settings(texts, **fields)
    with pytest.raises(DataError, match=refusal):
        evaluate.run(str(base), config, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    # A restoration that is to be measured on its own held-out documents, and one that names its text.
    shared = {
        "model": str(base), "data": [str(texts)], "target_length": 512, "batch_tokens": 512, "window": 128, "long_window": 256,
        "rank": 2, "steps": 2, "dtype": "fp32", "device": "cpu", "validation_share": 0.3, "out": tmp_path / "run",
    }  # fmt: skip
    for data in ([], [str(texts)]):
        evaluation = config.model_dump(exclude_unset=True) | {"data": data}
        with pytest.raises(DataError, match=refusal):
            job.run(RestoreConfig.resolve(None, shared | {"evaluation": evaluation}))
    assert loaded == []


def test_models_that_share_a_tokenizer_are_checked_once(
    base: Path, exported: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It reads all of the text, which takes a while."""
    checked: list[int] = []
    monkeypatch.setattr(preflight, "check", lambda tokenizer, _, vocab_size: checked.append(len(tokenizer)))
    other = tmp_path / "other"
    shutil.copytree(base, other)
    words = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(words + "\n")
    preflight.check_folders([base, base, exported, other], settings(texts))
    assert len(checked) == 2


def test_one_loaded_model_can_be_measured_as_it_is(base: Path, texts: Path) -> None:
    model, tokenizer = loading.load(base, torch.float32), loading.load_tokenizer(base)
    found = evaluate.evaluate(model, tokenizer, settings(texts, lengths=(64,), needle_samples=0), name="student")
    assert isinstance(found, Evaluation)
    assert found.name == "student"
    assert found.by_position is not None
    assert len(found.tasks[0].correct) == 6
    assert found.seconds > 0


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"rope_parameters": None, "rope_scaling": {"rope_type": "linear", "factor": 4.0}}, [512]),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 4.0}}, [512]),
        ({"max_position_embeddings": None}, "max_position_embeddings = None in config.json"),
        ({"max_position_embeddings": "128"}, "max_position_embeddings = '128' in config.json"),
    ],
)
def test_a_model_is_measured_up_to_what_its_config_says(
    base: Path, texts: Path, tmp_path: Path, fields: dict[str, Any], says: list[int] | str
) -> None:
    """Also where an older tool wrote the type of RoPE under another name."""
    model = Path(shutil.copytree(base, tmp_path / "model"))
    (model / "config.json").write_text(json.dumps(read_config(base) | fields))
    config = settings(texts, lengths=(), needle_samples=0, tasks=(), sliding=(), windows=1)
    if isinstance(says, str):
        with pytest.raises(ModelError, match=says):
            evaluate.run(str(model), config, tmp_path / "out")
    else:
        evaluate.run(str(model), config, tmp_path / "out")
        assert read(tmp_path / "out").config["lengths"] == says


def test_a_token_the_model_cannot_embed_is_refused(make_checkpoint: MakeCheckpoint, texts: Path, tmp_path: Path) -> None:
    small = make_checkpoint("llama3", vocab_size=100, bos_token_id=1, eos_token_id=2, pad_token_id=None)
    with pytest.raises(DataError, match=r"book-0\.txt: token id \d+, but the model has 100 embeddings"):
        evaluate.run(str(small), settings(texts, lengths=(64,), needle_samples=0, tasks=(), sliding=()), tmp_path / "out")


def test_models_are_called_by_what_was_asked_for(
    base: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub's cache calls a folder by its commit, and Python calls the folder `.` by nothing."""
    snapshot = Path(shutil.copytree(base, tmp_path / "snapshots" / "0a1b2c"))
    here = loading.resolve
    monkeypatch.setattr(loading, "resolve", lambda model: snapshot if model == "org/name" else here(model))
    monkeypatch.chdir(base)
    config = settings(texts, lengths=(64,), needle_samples=0, tasks=(), sliding=(), windows=1)
    evaluate.run(".", config, tmp_path / "out", against=["org/name"])
    assert [model.name for model in read(tmp_path / "out").models] == [base.name, "name"]


def test_a_report_that_cannot_be_written_is_one_line(base: Path, texts: Path, tmp_path: Path) -> None:
    config = settings(texts, lengths=(64,), needle_samples=0, tasks=(), sliding=(), windows=1)
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ResourceError, match="cannot be made"):
            evaluate.run(str(base), config, out)
    (tmp_path / "out" / "report.md").mkdir(parents=True)
    with pytest.raises(ResourceError, match="the report cannot be written"):
        evaluate.run(str(base), config, tmp_path / "out")


def test_a_server_that_cannot_be_asked_is_one_line(
    base: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(texts, lengths=(64,), needle_samples=0, tasks=(), sliding=())
    with pytest.raises(UsageError, match="no vLLM answers there"):
        evaluate.run(str(base), config, tmp_path / "out", server="http://[::1")

    class Short:
        window = 32

    monkeypatch.setattr(evaluate, "Served", lambda url: Short())
    with pytest.raises(UsageError, match="serves 32 tokens, the longest window has 64"):
        evaluate.run(str(base), config, tmp_path / "out", server="http://127.0.0.1:1")
