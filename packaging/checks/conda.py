"""Conda recipes and environments, as four of conda's own libraries read them: conda.py OURS GRAYSKULLS ENVIRONMENT...

Grayskull derives a recipe from the sdist: ours must ask for the same. What Bioconda's guidelines
ask of a recipe follows, as far as it needs no channel.
"""

import hashlib
import re
import sys
from pathlib import Path

from conda_lock.src_parser.environment_yaml import parse_environment_file
from rattler import MatchSpec
from souschef.recipe import Recipe

ADDED = {"zstandard"}
"""Packages of pip's extras, of which grayskull knows nothing."""


def words(recipe: Recipe, *path: str) -> list[str]:
    section = recipe
    for name in path:
        section = section[name]
    return [str(each.value) for each in section if each.value]


def compare(ours: Recipe, derived: Recipe) -> list[str]:
    wrong = []
    for part in ("host", "run"):
        have, wanted = set(words(ours, "requirements", part)), set(words(derived, "requirements", part))
        if have - ADDED != wanted:
            wrong.append(f"requirements/{part}: {sorted(have ^ wanted)} differ from grayskull's")
    for part, name in (("source", "url"), ("source", "sha256"), ("about", "license"), ("about", "summary")):
        if str(ours[part][name].value) != str(derived[part][name].value):
            wrong.append(f"{part}/{name}: {ours[part][name].value} is not grayskull's {derived[part][name].value}")
    return wrong


def bioconda(path: Path, recipe: Recipe) -> list[str]:
    """What is broken of Bioconda's guidelines, for a noarch Python package with one source."""
    text = path.read_text()
    about = re.findall(r"^  (\w+): \S", text.partition("\nabout:\n")[2].partition("\nextra:")[0], re.MULTILINE)
    broken = {
        "missing_home": "home" not in about,
        "missing_summary": "summary" not in about,
        "missing_license": "license" not in about,
        "license_file_missing": "license_file" not in about,
        "doc_url_missing": "doc_url" not in about,
        "dev_url_missing": "dev_url" not in about,
        "missing_run_exports": "run_exports" not in text,
        "missing_build_number": not re.search(r"^  number: \d+$", text, re.MULTILINE),
        "missing_hash": hashlib.sha256(Path(str(recipe["source"]["url"].value)[7:]).read_bytes()).hexdigest()
        != recipe["source"]["sha256"].value,
        "no_tests": not words(recipe, "test", "commands"),
        "noarch_uses_selectors": bool(re.search(r"# *\[", text)),
        "uses_setup_py": "setup.py" in text,
        "pip_install_needs_no_deps": "--no-deps --no-build-isolation --no-cache-dir" not in text,
        "has_blanks": "@" in text,
        "version_constraints_missing_whitespace": bool(re.search(r"^ +- [\w.-]+[<>=]", text, re.MULTILINE)),
        "empty_lines_or_tabs": "\t" in text or bool(re.search(r" +$", text, re.MULTILINE)),
    }
    return [name for name, is_broken in broken.items() if is_broken]


def main(ours: str, derived: str, environments: list[str]) -> int:
    recipe, wrong = Recipe(load_file=ours), []
    wrong += compare(recipe, Recipe(load_file=derived)) + bioconda(Path(ours), recipe)
    asked = [spec for part in ("host", "run") for spec in words(recipe, "requirements", part)]
    for file in environments:
        (parsed,) = {
            str(sorted(f"{each.name} {each.version}" for each in listed))
            for listed in parse_environment_file(Path(file), ["linux-64"], mapping_url="").dependencies.values()
        }
        print(f"{file}: {parsed}")
        asked += re.findall(r"^  - ([\w-]+::[^ #\n]+)", Path(file).read_text(), re.MULTILINE)
    for spec in asked:
        print(f"{spec} -> {MatchSpec(spec, strict=True)}")
    print("\n".join(wrong) or "grayskull, souschef, rattler and conda-lock agree; Bioconda's guidelines are kept")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], sys.argv[3:]))
