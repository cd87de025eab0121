"""Options of the command line: made of the fields of a configuration, or shared by commands that have none."""

import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from virnucpro_cli.config import resolve
from virnucpro_cli.config.options import Field, fields_of
from virnucpro_cli.errors import UserError

ReportFile = Annotated[str | None, typer.Option("--report", metavar="FILE.json", help="Write the report as JSON.")]
QcFile = Annotated[
    str | None, typer.Option("--qc", metavar="FILE.tsv", help="Write a line for each protein: what became of it.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a finished output file.")]


class InPanels(TyperCommand):
    """A command whose --help has a heading for each panel of options, in the order of their first options."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        panels: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is not None:
                heading = getattr(param, "rich_help_panel", None)
                panels.setdefault(
                    heading or ("Arguments" if param.param_type_name == "argument" else "Options"), []
                ).append(record)
        for heading, records in panels.items():
            with formatter.section(heading):
                formatter.write_dl(records)


def of(config: type[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a command of a function (settings, ...): its options are the fields of `config`, --config, and its own further ones."""
    fields = fields_of(config)

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        further = list(inspect.signature(function).parameters.values())[1:]

        def command(**given: Any) -> None:
            own = {parameter.name: given.pop(parameter.name) for parameter in further}
            toml = given.pop("config")
            flags = {name: _value(fields[name], value) for name, value in given.items()}
            function(resolve(config, toml, flags), **own)

        table = config.__name__.removesuffix("Config").lower()
        toml = typer.Option(
            "--config",
            metavar="FILE.toml",
            help=f"Options from a TOML file, table [{table}]; flags win.",
            rich_help_panel="Input",
        )
        parameters = [
            *(_parameter(field) for field in fields.values()),
            inspect.Parameter(
                "config", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[str | None, toml]
            ),
            *(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in further),
        ]
        command.__name__, command.__doc__ = function.__name__, function.__doc__
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return command

    return decorate


def _parameter(field: Field) -> inspect.Parameter:
    """The parameter that typer makes the option of a field of."""
    option = field.option
    kind = inspect.Parameter.KEYWORD_ONLY
    if field.name == "inputs":
        argument = typer.Argument(metavar=option.metavar, help=option.help)
        return inspect.Parameter(field.name, kind, annotation=Annotated[list[str], argument])
    required = field.name == "output"
    known = field.said_default
    info = typer.Option(
        field.flag, *([f"-{option.short}"] if option.short else []), metavar=None if field.is_switch else field.metavar,
        help=option.help + (f" [default: {known}]" if known not in ("", "none") and not required else ""), rich_help_panel=option.panel,
    )  # fmt: skip
    hint: Any = str if required else bool if field.is_switch else list[str] | None if option.repeated else str | None
    default: Any = inspect.Parameter.empty if required else False if field.is_switch else None
    return inspect.Parameter(field.name, kind, default=default, annotation=Annotated[hint, info])


def _value(field: Field, given: Any) -> Any:
    """The field's value of what typer found; None where nothing was given."""
    if field.is_switch:
        return (not field.default) if given else None
    if field.option.repeated:
        return tuple(given) if given else None
    return None if given is None else field.read(given)


def numbers(text: str | None, option: str = "--layers") -> tuple[int, ...] | None:
    """Numbers with commas between them. Raises UserError."""
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"{option} is {text!r}.", "Give numbers such as -1 or 0,6,-1.") from None
