"""Turn reports of `virnucpro bench --report` into the tables of docs/benchmarks.md.

python benchmarks/markdown.py 650M.json 8M.json >> docs/benchmarks.md
"""

import json
import sys
from pathlib import Path
from typing import Any

from virnucpro_cli.report import cell


def table(rows: list[dict[str, Any]]) -> list[str]:
    names = list(rows[0])
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    return [*lines, *("| " + " | ".join(cell(name, row[name]) for name in names) + " |" for row in rows), ""]


def main(paths: list[str]) -> None:
    for path in paths:
        found = json.loads(Path(path).read_text())
        about, config = found["environment"], found["environment"]["config"]
        print(f"## {about['model']}, {about['dtype']}\n")
        command = f"virnucpro bench --packed --unpacked --model {config['model']} --seconds {config['seconds']:g}"
        if config["dtype"] != "auto":
            command += f" --dtype {config['dtype']}"
        if config["peers"]:
            command += f" --peers {','.join(config['peers'])}"
        print(
            f"{about['device']}, torch {about['torch']}, attention `{about['attention']}`, {about['date']}. "
            f"`{command}`\n"
        )
        for title, rows in found["tables"].items():
            print(f"{title}:\n", *table(rows), sep="\n")
        print(*(f"* {note}" for note in found["notes"]), "", sep="\n")


if __name__ == "__main__":
    main(sys.argv[1:])
