"""Options and values of earlier versions, and the way without them."""

from virnucpro_cli.errors import UserError

REMOVED = {
    "bio-embeddings": "keyed-h5 has a dataset for each protein, too, and reads its HDF5 files",
    "--virtual": "merge copies rows into one file, so leave it out",
    "--write": "the driver writes every row, and where that is the limit, --shard has a file for each job",
    **dict.fromkeys(
        ("--golden", "--write-golden"), "golden files are no more, and validate --report FILE.json has every number"
    ),
}


def refuse_removed(word: str) -> None:
    """Raise UserError for an option or a value that earlier versions knew."""
    if word in REMOVED:
        raise UserError(f"{word} is no longer supported: {REMOVED[word]}.")
