"""Options: the fields of a configuration, with what the command line, the checks and the documentation say of them.

A configuration comes from its defaults, a TOML file and flags; later ones win, and nothing unknown passes.
"""

import dataclasses
import keyword
import math
import os
import re
import sys
import tomllib
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_origin

from virnucpro_cli.errors import UserError, choose, unread

ABOVE_0, FINITE = math.ulp(0.0), sys.float_info.max
NUMBERS = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
TABLES = ("embed", "bench", "validate")
"""Commands that have a table in a TOML file."""
REMOVED = {
    "bio-embeddings": "keyed-h5 has a dataset for each protein, too, and reads its HDF5 files",
    "--virtual": "merge copies rows into one file, so leave it out",
    "--write": "the driver writes every row, and where that is the limit, --shard has a file for each job",
    "--golden": "golden files are no more, and validate --report FILE.json has every number",
    "--write-golden": "golden files are no more, and validate --report FILE.json has every number",
}
"""Options and values of earlier versions, and the way without them."""


def option(default: Any, panel: str, help: str, metavar: str = "", **more: Any) -> Any:
    """A field of a configuration. The rest: see Field."""
    return dataclasses.field(default=default, metadata={"panel": panel, "help": help, "metavar": metavar, **more})


@dataclass(frozen=True)
class Field:
    """A field of a configuration.

    kinds: types of its value, or of each of several; panel: its heading in --help; help: without the default;
    metavar: stands for its value; choices: the words that it, or each of several, may be; least, most: bounds;
    said: words for a default that its value does not tell; repeated: several values are given one by one;
    path: a leading ~ is the home folder; written: a path of a file to write; short: a letter;
    argument: it is given without an option. A field without a default must be given.
    """

    name: str
    default: Any
    kinds: tuple[type, ...]
    several: bool
    panel: str
    help: str
    metavar: str
    choices: tuple[Any, ...] = ()
    least: float | None = None
    most: float | None = None
    said: str = ""
    repeated: bool = False
    path: bool = False
    written: bool = False
    short: str = ""
    argument: bool = False

    @property
    def flag(self) -> str:
        """The long option: `--no-...` for a switch that is on by default."""
        return flag_of(f"no_{self.name}" if self.default is True else self.name)

    @property
    def is_switch(self) -> bool:
        return self.kinds == (bool,)

    @property
    def shown_default(self) -> str:
        """The default in words, empty if there is none to speak of."""
        if self.said or self.is_switch or self.default in (None, (), "", dataclasses.MISSING):
            return self.said
        return ",".join(map(str, self.default)) if self.several else str(self.default)

    def read(self, text: str) -> Any:
        """The value of a text from the command line. Text that is no number stays text, and is refused."""
        if self.several and not self.repeated:
            return tuple(dict.fromkeys(self._read(part.strip()) for part in text.split(",")))
        return self._read(text)

    def _read(self, text: str) -> Any:
        if int in self.kinds and re.fullmatch("-?[0-9]{1,18}", text):
            return int(text)
        with suppress(ValueError):
            return float(text) if float in self.kinds else text
        return text

    def fitting(self, value: Any, source: str) -> Any:
        """The value in the type of the field. Raises UserError, which names the source, for another type."""
        items = value if self.several and isinstance(value, list | tuple) else (value,)
        wanted = (*self.kinds, int) if float in self.kinds else self.kinds
        if any(not isinstance(item, wanted) or (isinstance(item, bool) and bool not in wanted) for item in items):
            names = " or ".join(NUMBERS[kind] for kind in self.kinds)
            name = self.name if source else self.flag
            raise UserError(f"{source}{name} is {value!r}, and must be {'a list of ' if self.several else ''}{names}.")
        return tuple(items) if self.several else items[0]

    def check(self, value: Any) -> None:
        """Raises UserError for a value that cannot be."""
        if value is None or self.is_switch:
            return
        if value == "" and self.name != "output":
            raise UserError(f"{self.flag} is empty.", "Give it a value, or leave it out.")
        for each in value if self.several else (value,):
            if each == "auto" and str in self.kinds and int in self.kinds:
                continue
            if self.least is not None and self.most is not None:
                if not isinstance(each, int | float) or not self.least <= each <= self.most:
                    raise UserError(f"{self.flag} is {each}.", f"Give {self._bounds()}.")
            elif self.choices and each not in self.choices:
                given, how = (f"has {each}", "any") if self.several else (f"is {each!r}", "one")
                words = [str(word) for word in self.choices]
                raise UserError(f"{self.flag} {given}.", choose(str(each), words, f"Choose {how} of"))

    def _bounds(self) -> str:
        lower = "above 0" if self.least == ABOVE_0 else f"from {self.least}"
        upper = "and finite" if self.most == FINITE else f"to {self.most}"
        return f"{'auto, or ' if str in self.kinds else ''}a number {lower} {upper}"


def fields_of(config: type[Any]) -> dict[str, Field]:
    """Every field of a configuration by its name, in order."""
    return {field.name: _field(field) for field in dataclasses.fields(config)}


@cache
def _field(field: dataclasses.Field[Any]) -> Field:
    several = get_origin(field.type) is tuple
    each = get_args(field.type)[0] if several else field.type
    kinds = tuple(kind for kind in (int, float, bool, str) if kind in (get_args(each) or (each,)))
    metavar = field.metadata["metavar"] or "|".join(map(str, field.metadata.get("choices", ())))
    return Field(field.name, field.default, kinds, several, **{**field.metadata, "metavar": metavar})


def flag_of(name: str) -> str:
    """The option of a field's name."""
    return f"{'-' if len(name) == 1 else '--'}{name.strip('_').replace('_', '-')}"


def refuse_removed(word: str) -> None:
    """Raise UserError for an option or a value that earlier versions knew."""
    if word in REMOVED:
        raise UserError(f"{word} is no longer supported: {REMOVED[word]}.")


def table_of(config: type[Any]) -> str:
    """The table of a configuration in a TOML file: the name of its command."""
    return config.__name__.removesuffix("Config").lower()


def resolve(config: type[Any], toml: str | None, flags: dict[str, Any]) -> Any:
    """A `config` from its defaults, the TOML file's table of its command, and the flags that are not None.

    Paths may be path objects, and a single value may stand for a list of one.
    Raises UserError for what is unknown or cannot be.
    """
    values = _fitting(config, _from_toml(config, Path(toml)), f"The config file {toml}: ") if toml is not None else {}
    values |= _fitting(config, {name: value for name, value in flags.items() if value is not None}, "")
    for name, field in fields_of(config).items():
        path = values.get(name) if field.written else None
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
    command = table_of(config)
    remedy = f"Options stand in a table [{command}]."
    for entry in content:
        if entry not in TABLES:
            raise UserError(f"The config file {path} has an unknown entry {entry!r}.", remedy)
    values = content.get(command, {})
    if not isinstance(values, dict):
        raise UserError(f"The config file {path} has {command} = {values!r}.", remedy)
    return values


def _fitting(config: type[Any], values: dict[str, Any], source: str) -> dict[str, Any]:
    """The values in the types of the fields. Raises UserError for an unknown name or a value of another type."""
    fields, fitting = fields_of(config), {}
    for key, value in values.items():
        key += "_" * keyword.iskeyword(key)
        if key not in fields:
            refuse_removed(flag_of(key))
            raise UserError(f"{source}there is no option {key!r}.", choose(key, list(fields), "Known:"))
        field = fields[key]
        fitting[key] = field.fitting(_as_text(value, field.path or field.written), source)
    return fitting


def _as_text(value: Any, expand: bool) -> Any:
    """Path objects as text, and ~ as the home folder where that is asked for."""
    if isinstance(value, list | tuple):
        return tuple(_as_text(item, expand) for item in value)
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    return os.path.expanduser(value) if expand and isinstance(value, str) else value
