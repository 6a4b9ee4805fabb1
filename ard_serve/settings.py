"""Settings: defaults, then a configuration file, then flags; every field validated, every unknown key refused."""

import argparse
import json
import tomllib
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Self, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from ard_serve.errors import UsageError


class Settings(BaseModel):
    """Base of every settings model: immutable, typed, and deaf to no key.

    A field's `description` is its help text on the command line; its constraints are its limits.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @classmethod
    def resolve(cls, config_file: Path | None, flags: dict[str, Any]) -> Self:
        """Merge defaults, `config_file` and the `flags` that were given (None means not given).

        Raises:
            UsageError: the file cannot be read, a key is unknown, or a value breaks its limits.
        """
        values = read_config(config_file) if config_file else {}
        values |= {key: value for key, value in flags.items() if value is not None}
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            source = f"{config_file}: " if config_file else ""
            raise UsageError(source + explain(error, cls)) from None

    def save(self, path: Path) -> None:
        """Write every field, defaults included, as YAML that `resolve` reads back."""
        path.write_text(yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False), encoding="utf-8")


def read_config(path: Path) -> dict[str, Any]:
    """Read a TOML, YAML or JSON mapping."""
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".toml":
            values: Any = tomllib.loads(text)
        elif path.suffix == ".json":
            values = json.loads(text)
        else:
            values = yaml.safe_load(text)
    except OSError as error:
        raise UsageError(f"{path}: cannot read the configuration file ({error.strerror})") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, json.JSONDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"{path}: not valid {path.suffix.lstrip('.') or 'YAML'}: {' '.join(str(error).split())}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UsageError(f"{path}: the file must hold a mapping of fields, found {type(values).__name__}")
    return values


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """Say the first validation problem in one line: field, value, limit; every missing field; or the nearest known ones."""
    first = error.errors()[0]
    name = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        near = get_close_matches(name, model.model_fields, n=1)
        return f"unknown field '{name}'; " + (
            f"did you mean '{near[0]}'?" if near else f"known fields: {', '.join(sorted(model.model_fields))}"
        )
    if first["type"] == "missing":
        missing = [str(problem["loc"][-1]) for problem in error.errors() if problem["type"] == "missing"]
        return f"required, as a flag or in --config: {', '.join(missing)}"
    message = first["msg"].removeprefix("Value error, ")
    message = f"{message[0].lower()}{message[1:]}"
    # A rule over several fields names them itself.
    return f"{name} = {first['input']!r}: {message}" if name else message


def add_flags(parser: argparse.ArgumentParser, model: type[Settings], *names: str) -> None:
    """Add one `--flag` for each named field of `model`, with the field's description and default as its help.

    A flag that is not given leaves None, so that the configuration file and then the field's default decide.
    """
    for name in names:
        field = model.model_fields[name]
        default = field.get_default(call_default_factory=True) if not field.is_required() else None
        shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
        help_text = (field.description or "") + (f" (default: {shown})" if shown not in (None, "") else "")
        help_text = help_text.replace("%", "%%")
        flag = "--" + name.replace("_", "-")
        if field.annotation is bool:
            parser.add_argument(flag, dest=name, action=argparse.BooleanOptionalAction, default=None, help=help_text)
        else:
            metavar = name.rsplit("_", 1)[-1].upper()
            nargs = "+" if get_origin(field.annotation) is tuple else None
            parser.add_argument(flag, dest=name, metavar=metavar, nargs=nargs, default=None, help=help_text)
