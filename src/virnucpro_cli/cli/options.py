"""Options of the command line: made of the fields of a configuration, or shared by commands that have none."""

import inspect
from collections.abc import Callable
from dataclasses import MISSING
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from virnucpro_cli.config import EmbedConfig, resolve
from virnucpro_cli.config.options import TABLES, Field, fields_of, table_of
from virnucpro_cli.errors import UserError


class InPanels(TyperCommand):
    """A command whose --help has a heading for each panel of options, in the order of their first options."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """The words behind the command's name. Those of Typer for arguments change from version to version."""
        arguments = [param for param in self.get_params(ctx) if param.param_type_name == "argument"]
        return ["[OPTIONS]", *(_word_of(param) if param.required else f"[{_word_of(param)}]" for param in arguments)]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        panels: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            if record := param.get_help_record(ctx):
                plain = "Options"
                if param.param_type_name == "argument":
                    plain, record = "Arguments", (_word_of(param), record[1])
                panels.setdefault(getattr(param, "rich_help_panel", None) or plain, []).append(record)
        for heading, records in panels.items():
            with formatter.section(heading):
                formatter.write_dl(records)


def _word_of(argument: Any) -> str:
    return str(argument.metavar or argument.name.upper()).strip("[]")


def _info(field: Field, panel: str | None = None) -> Any:
    """A field as an option for typer."""
    default = f" [default: {field.shown_default}]" if field.shown_default else ""
    metavar, short = None if field.is_switch else field.metavar, [f"-{field.short}"] if field.short else []
    return typer.Option(field.flag, *short, metavar=metavar, help=field.help + default, rich_help_panel=panel)


ReportFile = Annotated[str | None, _info(fields_of(EmbedConfig)["report"])]
QcFile = Annotated[str | None, _info(fields_of(EmbedConfig)["qc"])]
Output = Annotated[str, _info(fields_of(EmbedConfig)["output"])]
Model = Annotated[str | None, _info(fields_of(EmbedConfig)["model"])]
Kind = Annotated[str | None, _info(fields_of(EmbedConfig)["kind"])]
Gaps = Annotated[str | None, _info(fields_of(EmbedConfig)["gaps"])]
Overwrite = Annotated[bool, _info(fields_of(EmbedConfig)["overwrite"])]


def of(config: type[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a command of a function (settings, ...).

    Its options are the fields of `config`, --config if a TOML file has a table for it, and further parameters.
    """
    fields = fields_of(config)

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        further = list(inspect.signature(function).parameters.values())[1:]

        def command(**given: Any) -> None:
            others = {parameter.name: given.pop(parameter.name) for parameter in further}
            toml = given.pop("config", None)
            flags = {name: _value(fields[name], value) for name, value in given.items()}
            function(resolve(config, toml, flags), **others)

        text = f"Options from a TOML file, table [{table_of(config)}]; flags win."
        toml = typer.Option("--config", metavar="FILE.toml", help=text, rich_help_panel="Input")
        parameters = [
            *(_parameter(field) for field in fields.values()),
            *([_keyword("config", Annotated[str | None, toml], None)] if table_of(config) in TABLES else []),
            *(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in further),
        ]
        command.__name__, command.__doc__ = function.__name__, function.__doc__
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return command

    return decorate


def _keyword(name: str, annotation: Any, default: Any = inspect.Parameter.empty) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _parameter(field: Field) -> inspect.Parameter:
    """The parameter that typer makes the option of a field of."""
    if field.argument:
        info = typer.Argument(metavar=field.metavar, help=field.help)
        return _keyword(field.name, Annotated[list[str] if field.several else str, info])
    info = _info(field, field.panel)
    if field.default in ("", MISSING):
        return _keyword(field.name, Annotated[str, info])
    if field.is_switch:
        return _keyword(field.name, Annotated[bool, info], False)
    return _keyword(field.name, Annotated[list[str] | None if field.repeated else str | None, info], None)


def _value(field: Field, given: Any) -> Any:
    """The field's value of what typer found; None where nothing was given."""
    if not given and (field.is_switch or field.repeated):
        return None
    if field.is_switch:
        return not field.default
    if field.repeated:
        return tuple(given)
    return None if given is None else field.read(given)


def numbers(text: str | None, option: str) -> tuple[int, ...] | None:
    """Numbers with commas between them. Raises UserError."""
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"{option} is {text!r}.", "Give numbers such as -1 or 0,6,-1.") from None
