"""Pages of the site that are made when it is built: command line, configuration, changelog, contributing.

The options come from the command line itself, so that no page can name one that does not exist.
"""

import dataclasses
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer.main

from virnucpro_cli import config as configs
from virnucpro_cli.cli import COMMANDS, program

ROOT = Path(__file__).resolve().parent.parent
TABLES = {"embed": configs.EmbedConfig, "validate": configs.ValidateConfig, "bench": configs.BenchConfig}
"""Tables of a configuration file, and the dataclass that each fills."""
NOT_IN_A_FILE = ("inputs", "output", "config")


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages to the site."""
    from mkdocs.structure.files import File

    pages = {
        "reference/cli.md": cli_page(),
        "reference/config.md": config_page(),
        "changelog.md": moved_into_docs("CHANGELOG.md"),
        "contributing.md": moved_into_docs("CONTRIBUTING.md"),
    }
    for path, text in pages.items():
        files.append(File.generated(config, path, content=text))
    return files


def moved_into_docs(name: str) -> str:
    """A page of the repository's root, with its links to docs/ as the site has them."""
    return (ROOT / name).read_text().replace("](docs/", "](")


# --- command line ----------------------------------------------------------------------------------------------------


def commands() -> dict[str, Any]:
    """Every command by its name, in the order of --help."""
    group: Any = typer.main.get_command(program(*COMMANDS))
    return {name: command for name, command in group.commands.items() if not command.hidden}


def cli_page() -> str:
    """The reference of the command line, in Markdown."""
    parts = [
        "# Command line",
        "This page is made from the program itself. `virnucpro COMMAND --help` shows the same.",
        "| command | |\n|---|---|\n"
        + "\n".join(f"| [`{name}`](#{name}) | {cell(first_line(command))} |" for name, command in commands().items()),
    ]
    for name, command in commands().items():
        parts += [f"## {name} {{ #{name} }}", *about(name, command)]
    return "\n\n".join(parts) + "\n"


def about(name: str, command: Any) -> Iterator[str]:
    """Paragraphs and tables for a command."""
    if command.context_settings.get("allow_extra_args"):  # it reads its arguments itself
        yield f"```text\n{shown_help(name)}\n```"
        return
    yield from re.split(r"\n\s*\n", re.sub(r"(?m)^[ \t]+", "", command.help or ""))
    shown = [each for each in command.params if not getattr(each, "hidden", False)]
    for panel in dict.fromkeys(panel_of(each) for each in shown):
        rows = [row(each) for each in shown if panel_of(each) == panel]
        yield f"**{panel}**"
        yield "| | |\n|---|---|\n" + "\n".join(rows)
    if command.epilog:
        yield command.epilog


def panel_of(parameter: Any) -> str:
    """The heading under which --help lists a parameter."""
    named = getattr(parameter, "rich_help_panel", None)
    return named or ("Arguments" if parameter.param_type_name == "argument" else "Options")


def row(parameter: Any) -> str:
    """A line of a table: how the parameter is written, and its help."""
    if parameter.param_type_name == "argument":
        written = f"`{parameter.metavar or parameter.name.upper()}`"
    else:
        names = ", ".join(f"`{each}`" for each in (*parameter.opts, *parameter.secondary_opts))
        value = "" if parameter.is_flag else f" `{parameter.metavar or parameter.type.name.upper()}`"
        written = names + value
    text = parameter.help or ""
    if parameter.required and "required" not in text:
        text += " [required]"
    elif "[default" not in text and isinstance(parameter.default, int | float | str) and not is_flag(parameter):
        text += f" [default: {parameter.default}]"
    return f"| {written} | {cell(text.strip())} |"


def is_flag(parameter: Any) -> bool:
    return bool(getattr(parameter, "is_flag", False))


def first_line(command: Any) -> str:
    return (command.help or "").strip().partition("\n")[0]


def cell(text: str) -> str:
    """Text that neither ends a cell of a table nor is taken for HTML."""
    return text.replace("|", r"\|").replace("<", "&lt;").replace("\n", " ")


def shown_help(name: str) -> str:
    """The text of `virnucpro NAME --help`."""
    command = [sys.executable, "-m", "virnucpro_cli", name, "--help"]
    environment = {**os.environ, "COLUMNS": "100"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()


# --- configuration ---------------------------------------------------------------------------------------------------


def config_page() -> str:
    """The reference of configuration files, in Markdown, from the dataclasses that they fill."""
    parts = [
        "# Configuration files",
        "`--config FILE.toml` of `embed`, `validate` and `bench` reads options from a table of the command's name. "
        "An option of the command line wins over the file. A key that does not exist is an error, with the nearest "
        "that does.",
        "`configs/` of the source holds examples. `virnucpro bench --save-config here.toml` writes one for this "
        "machine.",
        f"```toml\n{(ROOT / 'configs' / 'virnucpro-3b.toml').read_text().strip()}\n```",
    ]
    for name, kind in TABLES.items():
        rows = list(config_rows(name, kind))
        parts += [f"## [{name}] {{ #{name} }}", "| key | default | |\n|---|---|---|\n" + "\n".join(rows)]
    return "\n\n".join(parts) + "\n"


def config_rows(name: str, kind: Any) -> Iterator[str]:
    """A line for every key of a table: key, default, help."""
    options = {each.name: each for each in commands()[name].params if not getattr(each, "hidden", False)}
    for field in dataclasses.fields(kind):
        option = options.get(field.name) or options.get(f"no_{field.name}")
        if field.name in NOT_IN_A_FILE or option is None:
            continue
        key = field.name.strip("_")
        text = re.sub(r" ?\[default: [^\]]*\]", "", option.help or "")
        if "|" in (option.metavar or ""):
            text += f" One of {option.metavar.replace('|', ', ')}."
        if field.default is True:
            text = f"`false` is `{option.opts[0]}`: {text[:1].lower()}{text[1:]}"
        yield f"| `{key}` | {shown(field.default)} | {cell(text)} |"


def shown(value: Any) -> str:
    """A default as TOML has it; nothing for an option that is off unless given."""
    if value is None or value in ((), ""):
        return ""
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, tuple):
        return f"`[{', '.join(shown(each).strip('`') for each in value)}]`"
    return f'`"{value}"`' if isinstance(value, str) else f"`{value}`"
