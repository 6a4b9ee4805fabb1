"""Defaults, file, flags: which wins, what is refused, and how the refusal reads."""

import argparse
from pathlib import Path

import pytest
from pydantic import Field

from ard_serve.errors import UsageError
from ard_serve.settings import Settings, add_flags


class Example(Settings):
    rate: float = Field(0.5, gt=0, le=1, description="share of 100% that is kept")
    names: tuple[str, ...] = Field(("a", "b"), description="which ones")
    strict: bool = Field(False, description="whether to be strict")
    limit: int | None = Field(None, description="at most this many")


@pytest.mark.parametrize(
    ("suffix", "content"),
    [
        (".yaml", "rate: 0.25\nnames: [x]\n"),
        (".toml", 'rate = 0.25\nnames = ["x"]\n'),
        (".json", '{"rate": 0.25, "names": ["x"]}'),
    ],
)
def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path: Path, suffix: str, content: str) -> None:
    path = tmp_path / f"settings{suffix}"
    path.write_text(content)
    resolved = Example.resolve(path, {"rate": "0.75", "names": None, "strict": None, "limit": None})
    assert resolved == Example(rate=0.75, names=("x",), strict=False)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("ratte: 0.5", "unknown field 'ratte'; did you mean 'rate'?"),
        ("colour: red", "unknown field 'colour'; known fields: limit, names, rate, strict"),
        ("rate: 1.5", "rate = 1.5: input should be less than or equal to 1"),
        ("rate: .nan", "rate = nan: input should be a finite number"),
        ("rate: high", "rate = 'high': input should be a valid number"),
        ("- 1", "must hold a mapping of fields, found list"),
        ("rate: [", "not valid yaml"),
    ],
)
def test_a_bad_field_is_named_with_its_value_and_limit(tmp_path: Path, content: str, says: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(content)
    with pytest.raises(UsageError) as refusal:
        Example.resolve(path, {})
    assert says in str(refusal.value)
    assert str(refusal.value).startswith(str(path))
    assert "\n" not in str(refusal.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"none\.yaml: cannot read"):
        Example.resolve(tmp_path / "none.yaml", {})


def test_saved_settings_come_back_equal(tmp_path: Path) -> None:
    settings = Example(rate=0.1, names=("p", "q"), limit=3)
    settings.save(tmp_path / "saved.yaml")
    assert Example.resolve(tmp_path / "saved.yaml", {}) == settings


def test_flags_carry_type_help_and_default() -> None:
    parser = argparse.ArgumentParser()
    add_flags(parser, Example, "rate", "names", "strict", "limit")
    given = vars(parser.parse_args(["--names", "x", "y", "--no-strict"]))
    assert Example.resolve(None, given) == Example(names=("x", "y"), strict=False)
    shown = " ".join(parser.format_help().split())
    assert "share of 100% that is kept (default: 0.5)" in shown
    assert "which ones (default: a b)" in shown
    assert "at most this many --" not in shown
