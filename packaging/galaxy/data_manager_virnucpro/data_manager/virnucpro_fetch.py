"""Fetch weights into the folder of a data manager's job, and write the rows of the data table that describe them."""

import argparse
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

TABLE = "virnucpro_models"
HEADS = "virnucpro"
"""The name by which `virnucpro fetch` knows DNABERT-S and both heads."""
TYPES = {"DNABERT-S": "nucleotide", "LucaVirus": "protein,nucleotide"}
"""Families that do not read proteins alone."""
Row = dict[str, str]


def move(file: Path, folder: Path) -> None:
    """Move a file, or what a link of a cache leads to, into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.move(file.resolve(), folder / file.name)


def model(name: str, folder: Path, environment: dict[str, str]) -> Row:
    """Move the weights of a model, and what belongs to them, into folder/NAME. Returns its row."""
    shown = subprocess.run(
        ["virnucpro", "models", name, "--json"], env=environment, check=True, stdout=subprocess.PIPE, text=True
    )
    (known,) = json.loads(shown.stdout)
    place, path = Path(known["place"]), name
    if (place if place.is_dir() else place.parent).joinpath("config.json").is_file() and place.suffix != ".pth":
        files = list((place if place.is_dir() else place.parent).iterdir())  # a HuggingFace directory
    else:
        files, path = [place], f"{name}/{place.name}"
    for file in files:
        move(file, folder / name)
    label = name if known["full_name"] == name else f"{known['full_name']} ({name})"
    return {
        "value": name,
        "name": f"{known['family']}: {label}, {known['licence']}",
        "type": TYPES.get(known["family"], "protein"),
        "path": path,
    }


def heads(cache: Path, folder: Path) -> list[Row]:
    """Move both heads of VirNucPro. Returns their rows."""
    rows = []
    for chunk in (500, 300):
        value, file = f"head-{chunk}", cache / "virnucpro" / "heads" / f"{chunk}_model.safetensors"
        move(file, folder / value)
        name = f"VirNucPro, chunks of {chunk} bases"
        rows.append({"value": value, "name": name, "type": "head", "path": f"{value}/{file.name}"})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", help="names that virnucpro fetch takes, separated by commas")
    parser.add_argument("--accept-licence", action="store_true")
    parser.add_argument("--out", required=True, type=Path, help="the JSON file of the data manager")
    arguments = parser.parse_args()
    folder = Path(json.loads(arguments.out.read_text())["output_data"][0]["extra_files_path"])
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=".") as name:
        cache, rows = Path(name).resolve(), []
        places = {
            "XDG_CACHE_HOME": cache,
            "HF_HOME": cache / "hf",
            "HF_HUB_CACHE": cache / "hub",
            "TORCH_HOME": cache / "torch",
        }
        environment = os.environ | {variable: str(place) for variable, place in places.items()}
        accepted = ["--accept-licence"] * arguments.accept_licence
        for each in arguments.names.split(","):
            subprocess.run(["virnucpro", "fetch", each, *accepted], env=environment, check=True)
            if each == HEADS:
                rows += [model("dnabert-s", folder, environment), *heads(cache, folder)]
            else:
                rows.append(model(each, folder, environment))
    arguments.out.write_text(json.dumps({"data_tables": {TABLE: rows}}, indent=1))


if __name__ == "__main__":
    main()
