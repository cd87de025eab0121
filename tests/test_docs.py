"""The README, the pages of docs/ and the program say the same."""

import re
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
import yaml

import virnucpro_cli
from conftest import ROOT, module_of
from virnucpro_cli import EmbeddingFile

DOCS = ROOT / "docs"
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
GENERATED = {"reference/cli.md", "reference/config.md", "changelog.md", "contributing.md"}
API = (DOCS / "reference" / "api.md").read_text()
NO_MORE = ("--virtual", "--write ", "--golden", "--write-golden", "bio-embeddings")
"""Options and layouts that an earlier version had."""


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    """The module that makes pages when the site is built."""
    return module_of(DOCS / "hooks.py")


def test_the_readme_is_read_in_three_minutes() -> None:
    assert len(README.splitlines()) <= 150


def anchors(page: Path) -> set[str]:
    """Where links into a page may lead: its headings as GitHub and the site name them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.S), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    for link in links:
        if re.match(r"https?:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if target.is_relative_to(DOCS) and target.relative_to(DOCS).as_posix() in GENERATED:
            continue  # mkdocs build --strict follows these
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_every_page_has_its_place_on_the_site() -> None:
    text = (ROOT / "mkdocs.yml").read_text()
    listed = set(re.findall(r": (\S+\.md)$", text.partition("\nnav:")[2], re.M))
    assert listed == {page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")} | GENERATED


def test_the_reference_names_every_option_of_every_command(hooks: ModuleType) -> None:
    page = hooks.cli_page()
    for name, command in hooks.commands().items():
        section = page.partition(f"## {name} {{")[2].partition("\n## ")[0]
        if command.context_settings.get("allow_extra_args"):  # it reads its arguments itself
            assert f"Usage: virnucpro {name}" in section
            continue
        for parameter in command.params:
            if parameter.param_type_name == "option" and not parameter.hidden:
                assert all(f"`{option}`" in section for option in parameter.opts), (name, parameter.opts)


def test_the_reference_names_every_key_of_a_configuration_file(hooks: ModuleType) -> None:
    sections = {text.partition("]")[0]: text for text in hooks.config_page().split("\n## [")[1:]}
    assert set(sections) == {"embed", "validate", "bench"}
    for path in (ROOT / "configs").glob("*.toml"):
        for table, values in tomllib.loads(path.read_text()).items():
            assert all(f"| `{key}` |" in sections[table] for key in values), path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_options_on_a_page_exist(page: Path, hooks: ModuleType) -> None:
    """Commands are read from code blocks and code in the text; each option is one of its command's."""
    if page.name == "CHANGELOG.md":
        return
    known = {
        name: {each for parameter in command.params for each in parameter.opts} | {"--help"}
        for name, command in hooks.commands().items()
        if not command.context_settings.get("allow_extra_args")
    }
    for line in re.findall(r"virnucpro (\w+ [^\n`|#]*)", page.read_text()):
        name, *words = line.split()
        for word in words if name in known else []:
            if word.startswith("--"):
                assert word.rstrip(".,;:)") in known[name], line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_what_was_removed_is_told_by_the_changelog_alone(page: Path) -> None:
    there = [name for name in NO_MORE if name in page.read_text()]
    assert (there == []) != (page.name == "CHANGELOG.md")


def test_every_public_name_is_in_the_reference_and_says_what_it_is() -> None:
    for name in virnucpro_cli.__all__:
        assert f"::: virnucpro_cli.{name}\n" in API
    for name, member in vars(EmbeddingFile).items():
        assert name.startswith("_") or (getattr(member, "__doc__", None) or "").strip(), name


def test_the_citation_is_of_this_version_and_licence() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert (citation["version"], citation["license"]) == (project["version"], project["license"])
    assert citation["references"][0]["doi"] in README
