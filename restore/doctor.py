"""`ard doctor`: lint a checkpoint folder before an engine misreads it, and repair what has one right answer."""

import json
import logging
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ard_serve import artifact, weights
from ard_serve.artifact import FileRecord, Manifest
from ard_serve.console import out, print_table
from ard_serve.errors import ModelError
from restore.inspection import read_config, read_json
from restore.publish import replace_file
from restore.rope import served_length, write_rope
from restore.rope_lint import Finding, diagnose, examine, notes

__all__ = ["Finding", "diagnose", "repair", "run"]

_CONFIG, _TOKENIZER_CONFIG = "config.json", "tokenizer_config.json"
_READ_BY_ALL, _ENTER_BY_ALL = 0o444, 0o555
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Examination:
    """What is wrong with a folder, the JSON files that would repair it, and what other users cannot read."""

    config: dict[str, Any]
    findings: list[Finding]
    rewritten: dict[Path, dict[str, Any]]
    unreadable: list[Path]


def run(folder: Path, fix: bool, target_length: int | None = None) -> int:
    """Print what is wrong with a checkpoint and, with `fix`, repair it.

    Args:
        folder: any Hugging Face model folder.
        fix: repair what can be repaired; the old files are kept beside the new ones.
        target_length: tokens the model was stretched to, where no manifest says so.

    Returns:
        The exit code: 0 when nothing is (any longer) wrong, 3 otherwise.

    Raises:
        UsageError: not a model folder.
    """
    found = examine_folder(folder, target_length)
    _report(folder, found)
    if fix and any(finding.repairable for finding in found.findings):
        for path in _apply(folder, found):
            out.print(f"repaired {path}", soft_wrap=True, highlight=False)
        found = examine_folder(folder, target_length)
        _report(folder, found)
    return ModelError.exit_code if found.findings else 0


def repair(folder: Path, target_length: int | None = None) -> list[Path]:
    """Repair what can be repaired, each file in one step and with a backup; returns what was changed."""
    return _apply(folder, examine_folder(folder, target_length))


def examine_folder(folder: Path, target_length: int | None = None) -> Examination:
    """Lint config.json, the tokenizer's limit, the weights' headers, the manifest and the file modes of a folder."""
    config = read_config(folder)
    findings, manifest = _read_manifest(folder)
    rope_findings, repaired = _examine_rope(config, manifest, target_length)
    rewritten = {} if repaired is config else {folder / _CONFIG: repaired}
    findings += rope_findings
    if all(finding.repairable for finding in rope_findings):
        for finding, tokenizer_config in _examine_tokenizer(folder, served_length(repaired)):
            findings.append(finding)
            rewritten[folder / _TOKENIZER_CONFIG] = tokenizer_config
    findings += _examine_files(folder, manifest)
    unreadable = [path for path in (folder, *sorted(folder.rglob("*"))) if not _readable_by_all(path)]
    findings += [Finding(path.name, "other users cannot read it", "open its mode") for path in unreadable]
    return Examination(config, findings, rewritten, unreadable)


def _report(folder: Path, found: Examination) -> None:
    rows = [(f.where, f.problem, f.remedy, "yes" if f.repairable else "no") for f in found.findings]
    if rows:
        print_table(f"{folder}", ("where", "what is wrong", "what to do", "--fix does it"), rows, text_columns=4)
    else:
        out.print(f"{folder}: nothing wrong, vLLM serves {served_length(found.config)} tokens", soft_wrap=True)
    for note in notes(found.config):
        out.print(f"note: {note}", soft_wrap=True, highlight=False)


def _apply(folder: Path, found: Examination) -> list[Path]:
    changed = list(found.rewritten)
    for path, content in found.rewritten.items():
        backup = _backup_path(path)
        shutil.copy2(path, backup)
        replace_file(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
        _log.info("%s: rewritten, the old one is %s", path, backup.name)
        changed.append(backup)
    for path in found.unreadable:
        path.chmod(path.stat().st_mode | (_ENTER_BY_ALL if path.is_dir() else _READ_BY_ALL))
    if found.rewritten and (manifest := artifact.read_manifest(folder)):
        _record(folder, manifest, changed)
    return [*found.rewritten, *found.unreadable]


def _read_manifest(folder: Path) -> tuple[list[Finding], Manifest | None]:
    try:
        return [], artifact.read_manifest(folder)
    except ModelError as error:
        return [_broken(artifact.MANIFEST_NAME, error)], None


def _examine_rope(
    config: dict[str, Any], manifest: Manifest | None, target_length: int | None
) -> tuple[list[Finding], dict[str, Any]]:
    if manifest is None:
        return examine(config, target_length)
    # An export's manifest knows every value, so nothing is left to guess.
    rope = manifest.rope
    positions = manifest.base.native_window if rope.rope_type == "linear" else rope.target_length
    recorded = write_rope(config, rope.parameters, positions)
    findings = [replace(finding, repairable=True) for finding in diagnose(config, rope.target_length)]
    if not findings and recorded != config:
        findings = [Finding(_CONFIG, f"its RoPE is not the one {artifact.MANIFEST_NAME} records", "write the recorded one")]
    return findings, recorded if findings else config


def _examine_tokenizer(folder: Path, served: int) -> Iterator[tuple[Finding, dict[str, Any]]]:
    path = folder / _TOKENIZER_CONFIG
    if not path.exists():
        return
    content = read_json(path)
    limit = content.get("model_max_length")
    if isinstance(limit, int | float) and limit < served:
        problem = f"model_max_length {limit:g}: transformers warns or truncates there, vLLM serves {served}"
        yield Finding(_TOKENIZER_CONFIG, problem, f"write {served}"), content | {"model_max_length": served}


def _examine_files(folder: Path, manifest: Manifest | None) -> Iterator[Finding]:
    try:
        if not weights.read_headers(folder):
            yield Finding(str(folder), "no safetensors weights", "copy or convert them", repairable=False)
        if manifest is not None:
            artifact.verify(folder, manifest)
    except ModelError as error:
        yield _broken("files", error)


def _record(folder: Path, manifest: Manifest, changed: list[Path]) -> None:
    """Bring the manifest's records of the files that were rewritten, and of their backups, up to date; of no others."""
    paths = {path.relative_to(folder).as_posix(): path for path in changed}
    kept = [record for record in manifest.files if record.path not in paths]
    added = [
        FileRecord(path=name, size_bytes=path.stat().st_size, sha256=artifact.sha256_of(path)) for name, path in paths.items()
    ]
    files = tuple(sorted([*kept, *added], key=lambda record: record.path))
    updated = manifest.model_copy(update={"files": files})
    replace_file(folder / artifact.MANIFEST_NAME, updated.model_dump_json(indent=2) + "\n")


def _backup_path(path: Path) -> Path:
    numbered = (path.with_name(f"{path.name}.{number}.bak") for number in range(1, 1000))
    return next(candidate for candidate in (path.with_name(f"{path.name}.bak"), *numbered) if not candidate.exists())


def _readable_by_all(path: Path) -> bool:
    needed = _ENTER_BY_ALL if path.is_dir() else _READ_BY_ALL
    return path.stat().st_mode & needed == needed


def _broken(where: str, error: ModelError) -> Finding:
    return Finding(where, str(error), "copy the folder again, or export again", repairable=False)
