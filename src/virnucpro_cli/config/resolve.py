"""A configuration from its defaults, a TOML file and flags; later ones win, and nothing unknown passes."""

import keyword
import os
import tomllib
from pathlib import Path
from typing import Any

from virnucpro_cli.config.options import fields_of, flag_of
from virnucpro_cli.errors import UserError, choose, unread


def resolve(config: type[Any], toml: str | None, flags: dict[str, Any]) -> Any:
    """A `config` from its defaults, the TOML file's table of its command, and the flags that are not None.

    Paths may be path objects, and a single value may stand for a list of one. Raises UserError for what is unknown or cannot be.
    """
    values = _fitting(config, _from_toml(config, Path(toml)), f"The config file {toml}: ") if toml is not None else {}
    values |= _fitting(config, {name: value for name, value in flags.items() if value is not None}, "")
    for name, field in fields_of(config).items():
        path = values.get(name) if field.option.written else None
        if toml is not None and path is not None and os.path.realpath(path) == os.path.realpath(toml):
            raise UserError(f"{field.flag} {path} would overwrite the config file of this run.", "Choose another name.")
    return config(**values)


def _from_toml(config: type[Any], path: Path) -> dict[str, Any]:
    try:
        content = tomllib.loads(path.read_bytes().decode("utf-8-sig"))
    except OSError as error:
        raise UserError(f"The config file {unread(str(path), error)}.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"The config file {path} is not TOML: {error}.") from None
    command = config.__name__.removesuffix("Config").lower()
    tables = [key for key in content if key not in ("embed", "bench", "validate")]
    if tables:
        raise UserError(
            f"The config file {path} has an unknown entry {tables[0]!r}.", f"Options stand in a table [{command}]."
        )
    values = content.get(command, {})
    if not isinstance(values, dict):
        raise UserError(f"The config file {path} has {command} = {values!r}.", f"Options stand in a table [{command}].")
    return values


def _fitting(config: type[Any], values: dict[str, Any], where: str) -> dict[str, Any]:
    """The values in the types of the fields. Raises UserError for an unknown name or a value of another type."""
    fields, fitting = fields_of(config), {}
    for key, value in values.items():
        key += "_" * keyword.iskeyword(key)
        if key not in fields:
            from virnucpro_cli.config.removed import refuse_removed

            refuse_removed(flag_of(key))
            raise UserError(f"{where}there is no option {key!r}.", choose(key, list(fields), "Known:"))
        fitting[key] = fields[key].fitting(_as_text(value, fields[key].option.path), where)
    return fitting


def _as_text(value: Any, expand: bool) -> Any:
    """Path objects as text, and ~ as the home folder where that is asked for."""
    if isinstance(value, list | tuple):
        return tuple(_as_text(item, expand) for item in value)
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    return os.path.expanduser(value) if expand and isinstance(value, str) else value
