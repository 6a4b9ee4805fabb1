"""An export is the student, whole, durable and readable, or it is not there at all."""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from ard_serve import artifact, cli
from ard_serve.artifact import DataRecord, Manifest, Quality, RecipeRecord, Scores
from ard_serve.errors import ModelError, NumericsError, QualityGateError, ResourceError
from restore import merge
from restore.config import RestoreConfig
from restore.export import Assessment, Delta, Provenance, Reference, check_room, export
from restore.inspection import Checkpoint, inspect
from restore.loading import load, load_tokenizer
from restore.model import TwoFaced
from restore.rope import RopePlan, plan_rope

MakeCheckpoint = Callable[..., Path]
IDS = torch.arange(3, 200)[None] % 250
TARGET = 512
QUALITY = Quality(restored=Scores(perplexity={512: 9.5}), served_limit=512)
RECIPE = RecipeRecord(name="default", objectives={"logits": 1.0}, trainable="lora", steps=3, tokens=30, seed=1)
PROVENANCE = Provenance("org/tiny", RECIPE, DataRecord(source="books", documents=2, tokens=9, sha256="0" * 64))


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tiny matrices lose more to the threads' meeting than they gain."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Student:
    """A checkpoint with random adapters on it, and what `export` needs to know of it."""

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float32, rope_type: Any = "yarn", **settings: Any) -> None:
        self.base: Checkpoint = inspect(folder)
        self.plan: RopePlan = plan_rope(self.base.config, TARGET, rope_type)
        values = {"model": str(folder), "target_length": TARGET, "data": ("x",), "out": Path("x"), "rank": 4, **settings}
        model = load(folder, dtype, config=self.plan.native_config(self.base.config))
        faces = TwoFaced(model, self.plan, RestoreConfig.model_validate(values))
        generator = torch.Generator().manual_seed(1)
        for parameter in faces.adapters.parameters():
            parameter.data.normal_(0, 0.05, generator=generator)
        self.delta: Delta = faces.adapters.delta
        with torch.no_grad():
            logits = faces.student(IDS) @ faces.head_weight_VC.T
        self.reference = Reference(IDS, logits.float(), dtype)

    def export(self, out: Path, **changes: Any) -> Manifest:
        arguments: dict[str, Any] = {
            "base": self.base, "plan": self.plan, "delta": self.delta, "out": out, "provenance": PROVENANCE,
            "reference": self.reference, "assess": lambda folder: Assessment("# Card\n", QUALITY), "compare_vllm": False,
        }  # fmt: skip
        return export(**arguments | changes)


@pytest.fixture(scope="module")
def student(make_checkpoint: MakeCheckpoint) -> Student:
    return Student(make_checkpoint("llama3", "60KB"))


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def assert_nothing_changed(out: Path, before: dict[str, bytes]) -> None:
    assert snapshot(out) == before
    assert [path.name for path in out.parent.iterdir()] == [out.name]


@pytest.mark.parametrize(("max_shard_size", "trainable"), [("5GB", "lora"), ("60KB", "full")])
def test_export_is_the_student_for_every_family(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, family: str, max_shard_size: str, trainable: str
) -> None:
    student = Student(make_checkpoint(family, max_shard_size), trainable=trainable)
    manifest = student.export(tmp_path / "out")
    out = inspect(tmp_path / "out")
    assert {name: t.shape for name, t in out.tensors.items()} == {name: t.shape for name, t in student.base.tensors.items()}
    changed = {name for name in out.tensors if student.delta(name) is not None}
    assert changed == {name for name in out.tensors if any(f"{p}_proj.weight" in name for p in ("q", "k", "v", "o"))}
    logits = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(IDS).logits
    torch.testing.assert_close(logits, student.reference.logits_BTV, atol=1e-4, rtol=1e-4)
    artifact.verify(tmp_path / "out", manifest)


def test_what_is_written(student: Student, tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text("<p>fine")
    assess = lambda folder: Assessment("# Card\n", QUALITY, [tmp_path / "report.html"], forced=True)  # noqa: E731
    manifest = student.export(tmp_path / "exports" / "out", assess=assess)
    out = tmp_path / "exports" / "out"
    assert artifact.read_manifest(out) == manifest
    assert {"README.md", "report.html", "config.json", "tokenizer.json", "generation_config.json"} <= set(snapshot(out))
    assert {record.path for record in manifest.files} == set(snapshot(out)) - {artifact.MANIFEST_NAME}
    assert (out / "README.md").read_text() == "# Card\n"
    assert (manifest.quality, manifest.forced, manifest.data) == (QUALITY, True, PROVENANCE.data)
    assert (manifest.rope.target_length, manifest.rope.factor, manifest.base.native_window) == (TARGET, 4.0, 128)
    assert len(manifest.base.weights_sha256) == 64
    config = json.loads((out / "config.json").read_text())
    assert config["rope_parameters"] == student.plan.parameters
    assert config["rope_scaling"] | {"rope_theta": config["rope_theta"]} == student.plan.parameters
    assert config["dtype"] == config["torch_dtype"] == "float32"
    assert json.loads((out / "tokenizer_config.json").read_text())["model_max_length"] == TARGET
    tokenizer = load_tokenizer(out)
    assert tokenizer.model_max_length == TARGET
    assert tokenizer.chat_template == load_tokenizer(student.base.folder).chat_template
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == student.base.size_bytes
    assert index["weight_map"] == {name: tensor.file.name for name, tensor in student.base.tensors.items()}


@pytest.mark.parametrize(("written", "name"), [(torch.bfloat16, "BF16"), (torch.float16, "F16")])
def test_weights_are_summed_in_fp32_and_rounded_once(student: Student, tmp_path: Path, written: torch.dtype, name: str) -> None:
    student.export(tmp_path / "out", dtype=written)
    assert inspect(tmp_path / "out").dtype == name
    tensors = {k: v for file in (tmp_path / "out").glob("*.safetensors") for k, v in load_file(file).items()}
    base = {k: v for file in student.base.folder.glob("*.safetensors") for k, v in load_file(file).items()}
    weight = "model.layers.1.self_attn.q_proj.weight"
    assert torch.equal(tensors[weight], (base[weight].double() + student.delta(weight).double()).float().to(written))  # type: ignore[union-attr]
    assert torch.equal(tensors["model.norm.weight"], base["model.norm.weight"].to(written))


def test_bf16_checkpoint_with_bf16_student(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(make_checkpoint("llama-tied"), tmp_path / "base"))
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
    Student(folder, torch.bfloat16).export(tmp_path / "out")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


def anonymous_bytes() -> int:
    """Memory of this process that is not a mapped file's."""
    return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) * 1024


def test_merge_holds_one_tensor_at_a_time(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    base = inspect(make_checkpoint("llama3", hidden_size=512, intermediate_size=1024, num_hidden_layers=8))
    before_bytes = anonymous_bytes()
    seen_bytes: list[int] = []

    def delta(name: str) -> torch.Tensor | None:
        seen_bytes.append(anonymous_bytes())
        return torch.ones(base.tensors[name].shape) if "proj.weight" in name else None

    merge.write_merged(base, tmp_path, delta)
    assert base.size_bytes > 70e6
    assert max(seen_bytes) - before_bytes < base.size_bytes / 4


def test_merged_weight_that_overflows_is_named(student: Student, tmp_path: Path) -> None:
    huge: Delta = lambda name: torch.full((64, 64), 1e5) if name.endswith("1.self_attn.q_proj.weight") else None  # noqa: E731
    with pytest.raises(NumericsError, match=r"layers\.1\.self_attn\.q_proj\.weight.*not finite in torch.float16"):
        student.export(tmp_path / "out", delta=huge, dtype=torch.float16)
    assert not list(tmp_path.iterdir())


@pytest.mark.fault("E3")
def test_weights_that_are_not_base_plus_adapter_are_refused(student: Student, tmp_path: Path) -> None:
    """An adapter that gives another delta each time it is asked, as a layer in training mode with dropout would."""
    student.export(tmp_path / "out")
    before = snapshot(tmp_path / "out")
    asked: list[str] = []

    def drifting(name: str) -> torch.Tensor | None:
        asked.append(name)
        change = student.delta(name)
        return None if change is None else change + 0.25 * asked.count(name)

    with pytest.raises(ModelError, match=r"differs from base \+ adapter by up to 0\.25, must be 0") as caught:
        student.export(tmp_path / "out", delta=drifting)
    assert caught.value.exit_code == 3
    assert_nothing_changed(tmp_path / "out", before)


@pytest.mark.fault("E3")
def test_bit_that_flips_on_the_disk_is_seen(student: Student, tmp_path: Path) -> None:
    merge.write_merged(student.base, tmp_path, student.delta)
    merge.verify_merged(student.base, tmp_path, student.delta)
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    body = bytearray(shard.read_bytes())
    body[-2] ^= 0x40
    shard.write_bytes(body)
    with pytest.raises(ModelError, match="differs from base"):
        merge.verify_merged(student.base, tmp_path, student.delta)


@pytest.mark.fault("E4")
def test_failed_gate_publishes_nothing(student: Student, tmp_path: Path) -> None:
    student.export(tmp_path / "out")
    before = snapshot(tmp_path / "out")
    seen: list[bool] = []

    def gate(folder: Path) -> Assessment:
        seen.append(bool(torch.isfinite(AutoModelForCausalLM.from_pretrained(folder)(IDS).logits).all()))
        raise QualityGateError("perplexity at 512 = 99: the limit is 20")

    with pytest.raises(QualityGateError):
        student.export(tmp_path / "out", assess=gate)
    assert seen == [True], "the gate measures a whole, loadable folder"
    assert_nothing_changed(tmp_path / "out", before)


@pytest.fixture
def open_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder that every user may enter; pytest's own are private."""
    folder = Path("/tmp") / f"ard-export-{os.getpid()}"
    folder.mkdir(mode=0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.fault("E5")
def test_another_user_reads_the_export(student: Student, open_folder: Path) -> None:
    previous = os.umask(0o077)
    try:
        student.export(open_folder / "out")
    finally:
        os.umask(previous)
    paths = sorted((open_folder / "out").rglob("*"))
    assert {oct(path.stat().st_mode & 0o777) for path in paths if path.is_file()} == {"0o644"}
    assert (open_folder / "out").stat().st_mode & 0o777 == 0o755
    if os.geteuid() != 0:
        pytest.skip("needs root to become another user; the modes were checked")
    read = subprocess.run(["cat", *paths], user=65534, group=65534, extra_groups=[], capture_output=True, check=True)
    assert read.stdout == b"".join(path.read_bytes() for path in paths)


@pytest.mark.fault("E6")
@pytest.mark.parametrize("wrong", ["rope", "adapter", "NaN"])
def test_reloaded_export_with_other_logits_is_refused(student: Student, tmp_path: Path, wrong: str) -> None:
    student.export(tmp_path / "out")
    before = snapshot(tmp_path / "out")
    changes: dict[str, Any] = {}
    if wrong == "rope":
        changes["plan"] = plan_rope(student.base.config, TARGET, "linear")
    elif wrong == "adapter":
        changes["delta"] = lambda name: None if "layers.1" in name else student.delta(name)
    else:
        changes["reference"] = replace(student.reference, logits_BTV=student.reference.logits_BTV * torch.nan)
    with pytest.raises(ModelError, match="logits differ from the student's by") as caught:
        student.export(tmp_path / "out", **changes)
    assert caught.value.exit_code == 3
    assert_nothing_changed(tmp_path / "out", before)


@pytest.mark.vllm
@pytest.mark.fault("E7")
def test_config_that_vllm_reads_otherwise_is_refused(student: Student, tmp_path: Path) -> None:
    pytest.importorskip("vllm.version", reason="vLLM is not installed")
    capped = replace(student.plan, max_position_embeddings=128)
    with pytest.raises(ModelError, match=f"vLLM would serve 128 tokens instead of {TARGET}") as caught:
        student.export(tmp_path / "out", plan=capped, compare_vllm=True)
    assert caught.value.exit_code == 3
    assert not list(tmp_path.iterdir())


@pytest.mark.fault("R11")
def test_output_that_cannot_be_written_is_refused_before_any_work(student: Student, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ResourceError, match="cannot be written") as caught:
        check_room(student.base, tmp_path / "file" / "out")
    assert caught.value.exit_code == 5


@pytest.mark.fault("R11")
def test_too_little_disk_is_refused_with_both_sizes(student: Student, tmp_path: Path) -> None:
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", tmp_path], capture_output=True, check=False)
    if mounted.returncode != 0:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        with pytest.raises(ResourceError, match=r"needs 0\.1 GB, .* has 0\.0 GB free") as caught:
            check_room(student.base, tmp_path / "deep" / "out")
        assert caught.value.exit_code == 5
        assert not list(tmp_path.iterdir())
    finally:
        subprocess.run(["umount", tmp_path], check=True)


@pytest.mark.fault("R11")
def test_a_disk_without_room_for_the_checkpoints_is_refused_before_training(
    student: Student, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The export would fit; three checkpoints of 4M trained weights would not."""
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200m", "tmpfs", tmp_path], capture_output=True, check=False)
    if mounted.returncode != 0:
        pytest.skip("needs the right to mount a tmpfs")
    words = [
        "restore",
        str(student.base.folder),
        "--target-length",
        "512",
        "--data",
        str(texts),
        "--out",
        str(tmp_path / "run"),
    ]
    try:
        assert cli.main([*words, "--rank", "4000", "--steps", "1", "--no-evaluate", "--device", "cpu"]) == 5
        said = capsys.readouterr().err.splitlines()[-1]
        assert re.search(r"needs 0\.1 GB and the checkpoints 0\.\d GB, .* has 0\.2 GB free", said), said
        assert not (tmp_path / "run" / "metrics.jsonl").exists()
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_vllm_that_cannot_be_imported_is_a_warning(
    student: Student, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    broken = tmp_path / "site" / "vllm"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise ImportError('libcudart.so.99: cannot open shared object file')")
    monkeypatch.syspath_prepend(broken.parent)
    monkeypatch.setenv("PYTHONPATH", str(broken.parent))
    student.export(tmp_path / "out", compare_vllm=True)
    assert "vLLM cannot be imported here (libcudart.so.99" in caplog.text
