"""An option: one field of a configuration, with what the command line, the checks and the documentation say of it."""

import dataclasses
import math
import re
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, get_args, get_origin, get_type_hints

from virnucpro_cli.errors import UserError, choose

ABOVE_0, FINITE = math.ulp(0.0), sys.float_info.max
NUMBERS = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}


@dataclass(frozen=True)
class Option:
    """What is known of a field beside its name, type and default.

    help: without the default; panel: the heading of --help that it stands under; metavar: what stands for its value, by default
    its choices; choices: the words that it, or each of several, may be; least, most: the bounds of a number; default: words for a
    default that its value does not tell; repeated: several values are given one by one, not with commas; path: a leading ~ is the
    home folder; written: a path of a file to write; short: a letter.
    """

    help: str
    panel: str
    metavar: str = ""
    choices: tuple[Any, ...] = ()
    least: float | None = None
    most: float | None = None
    default: str = ""
    repeated: bool = False
    path: bool = False
    written: bool = False
    short: str = ""


def option(
    default: Any,
    panel: str,
    help: str,
    metavar: str = "",
    said: str = "",
    path: bool = False,
    written: bool = False,
    **more: Any,
) -> Any:
    """A field of a configuration; said: words for a default that its value does not tell. The rest: see Option."""
    told = Option(help, panel, metavar, default=said, path=path or written, written=written, **more)
    return dataclasses.field(default=default, metadata={"option": told})


@dataclass(frozen=True)
class Field:
    """A field of a configuration. kinds: types of its value, or of each of several."""

    name: str
    default: Any
    kinds: tuple[type, ...]
    several: bool
    option: Option

    @property
    def flag(self) -> str:
        """The long option: `--no-...` for what is so unless it is given."""
        return flag_of(f"no_{self.name}" if self.default is True else self.name)

    @property
    def is_switch(self) -> bool:
        return self.kinds == (bool,)

    @property
    def said_default(self) -> str:
        """The default in words."""
        if self.option.default or self.is_switch:
            return self.option.default
        if self.several:
            return ",".join(map(str, self.default)) or "none"
        return "none" if self.default is None else f"{self.default}"

    @property
    def metavar(self) -> str:
        return self.option.metavar or "|".join(map(str, self.option.choices))

    def read(self, text: str) -> Any:
        """The value of a text from the command line; text that is no number stays as it is, and is refused with the field's name."""
        if self.several and not self.option.repeated:
            return tuple(dict.fromkeys(self._read(part.strip()) for part in text.split(",")))
        return self._read(text)

    def _read(self, text: str) -> Any:
        if int in self.kinds and re.fullmatch("-?[0-9]{1,18}", text):
            return int(text)
        if float in self.kinds:
            try:
                return float(text)
            except ValueError:
                return text
        return text

    def fitting(self, value: Any, where: str) -> Any:
        """The value in the type of the field. Raises UserError for another type."""
        items = value if self.several and isinstance(value, list | tuple) else (value,)
        wanted = (*self.kinds, int) if float in self.kinds else self.kinds
        if any(not isinstance(item, wanted) or (isinstance(item, bool) and bool not in wanted) for item in items):
            names = " or ".join(NUMBERS[kind] for kind in self.kinds)
            name = self.name if where else self.flag
            raise UserError(f"{where}{name} is {value!r}, and must be {'a list of ' if self.several else ''}{names}.")
        return tuple(items) if self.several else items[0]

    def check(self, value: Any) -> None:
        """Raises UserError for a value that cannot be."""
        if value is None or self.is_switch:
            return
        if value == "" and self.name != "output":
            raise UserError(f"{self.flag} is empty.", "Give it a value, or leave it out.")
        option = self.option
        for each in value if self.several else (value,):
            if each == "auto" and str in self.kinds and int in self.kinds:
                continue
            if option.least is not None and not self._is_within(each):
                raise UserError(f"{self.flag} is {each}.", f"Give {self._bounds()}.")
            if option.choices and each not in option.choices:
                words = tuple(map(str, option.choices))
                said = f"has {each}" if self.several else f"is {each!r}"
                how = "Choose any of" if self.several else "Choose one of"
                raise UserError(f"{self.flag} {said}.", choose(str(each), words, how))

    def _is_within(self, value: Any) -> bool:
        least, most = self.option.least, self.option.most
        return isinstance(value, int | float) and least is not None and most is not None and least <= value <= most

    def _bounds(self) -> str:
        assert self.option.least is not None and self.option.most is not None
        lower = "above 0" if self.option.least == ABOVE_0 else f"from {self.option.least}"
        upper = "and finite" if self.option.most == FINITE else f"to {self.option.most}"
        return f"{'auto, or ' if str in self.kinds else ''}a number {lower} {upper}"


_known: dict[type[Any], dict[str, Field]] = {}


def fields_of(config: type[Any]) -> dict[str, Field]:
    """Every field of a configuration by its name, in order."""
    if config not in _known:
        hints = get_type_hints(config)
        _known[config] = {field.name: _field(field, hints[field.name]) for field in dataclasses.fields(config)}
    return _known[config]


def _field(field: Any, hint: Any) -> Field:
    several = get_origin(hint) is tuple
    parts = set(_parts(get_args(hint)[0] if several else hint))
    kinds = tuple(kind for kind in (int, float, bool, str) if kind in parts)
    return Field(field.name, field.default, kinds, several, field.metadata["option"])


def _parts(hint: Any) -> Iterator[Any]:
    if isinstance(hint, types.UnionType):
        yield from get_args(hint)
    else:
        yield hint


def flag_of(name: str) -> str:
    """The option of a field's name."""
    return f"--{name.strip('_').replace('_', '-')}"


def choices_of(config: type[Any], name: str) -> tuple[Any, ...]:
    """The words that a field may be."""
    return fields_of(config)[name].option.choices
