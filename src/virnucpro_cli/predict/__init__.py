"""The predict workflow: contigs, or an embeddings file with VirNucPro's two halves, to tables of scores and calls.

`run` reads top to bottom as the steps of a run. All that can be refused is refused before an encoder is loaded.
"""

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
from rich.console import Console

from virnucpro_cli import embed, report, store
from virnucpro_cli.config import EmbedConfig
from virnucpro_cli.config.predict import PredictConfig
from virnucpro_cli.errors import NoProteins, UserError, absent, counted, shell_word, unread
from virnucpro_cli.model import locate, weights
from virnucpro_cli.model.families import by_name
from virnucpro_cli.predict import compare, contigs, fetching, frames, tables
from virnucpro_cli.predict import head as heads
from virnucpro_cli.predict.frames import Frames, Scored
from virnucpro_cli.predict.head import Head
from virnucpro_cli.stopping import resumable
from virnucpro_cli.store import disk

EMBEDDINGS, MADE_OF = "embeddings.h5", "predict.json"
SHARED = (
    "inputs", "model", "nucleotide_model", "dtype", "device", "workers", "attention", "token_budget", "store_dtype",
    "cache", "cache_size", "restart", "verbose", "quiet", "shard", "engine", "ray_address",
)  # fmt: skip
"""Settings that are embed's, too."""
OF_ENCODERS = tuple(name for name in SHARED if name not in ("inputs", "verbose", "quiet"))
DEFAULT_CHUNK = 500
NOT_SCORED = "frames without a score"


@dataclass
class PredictRun:
    """A run of predict. embedded: the embeddings file that was given, or that is made; is_given: which of both.

    without: names of contigs of which none has a frame; None for others.
    """

    config: PredictConfig
    folder: Path
    embedded: Path
    is_given: bool
    head: Head
    other: compare.Other | None
    out: Console
    clock: report.Clock
    summary: report.RunReport = field(default_factory=lambda: report.RunReport("predict"))
    without: list[str] | None = None


def run(config: PredictConfig, out: Console | None = None, since: float | None = None) -> report.RunReport:
    """Do what `virnucpro predict` does and return its report. Raises UserError for what the user can put right.

    since: the moment (`time.perf_counter`) at which the program began, from which on its seconds are reported.
    """
    clock = report.Clock(since)
    with clock.stage("plan"):
        begun = _decided(config, out or report.console(config.quiet), clock)
    if not begun.is_given:
        _embed(begun)
    if config.shard is None:
        with resumable(True):  # the embeddings and whole tables are there
            _predict(begun)
    else:
        whole = shell_word(begun.embedded)
        begun.out.print(f"then, once all shards are there: virnucpro merge {whole}, and this command without --shard")
    begun.summary.seconds = clock.spent() | clock.meanwhile
    begun.summary.meanwhile = list(clock.meanwhile)
    if config.report:
        report.save(config.report, begun.summary.to_json())
    return begun.summary


# --- decisions -------------------------------------------------------------------------------------------------------


def _decided(config: PredictConfig, out: Console, clock: report.Clock) -> PredictRun:
    """Open all that is read, and see that all can be written. Raises UserError."""
    folder, given = Path(config.output), _given_embeddings(config)
    embedded = given or folder / EMBEDDINGS
    chunk = config.chunk
    if given is not None:
        chunk = _chunk_of(given, chunk)
    head = heads.for_chunk(heads.read(config.head), chunk) if config.head else _published(chunk, out)
    out.print(f"head: {head.name}")
    if given is None:
        _check_width(head, config)
    _check_folder(folder)
    written = [folder / name for name in (*_writers(config), compare.COMPARED, MADE_OF)]
    read = [name for name in (*config.inputs, config.head, config.compare) if name not in (None, "-")]
    report.check_places({"report": config.report}, [*map(str, read), *written, embedded], config.overwrite)
    for path in written:
        if any(path.exists() and Path(name).exists() and path.samefile(name) for name in read if name):
            raise UserError(f"{path} is read by this run, and would be written.", "Choose another -o.")
    other = compare.read(config.compare) if config.compare else None
    return PredictRun(config, folder, embedded, given is not None, head, other, out, clock)


def _given_embeddings(config: PredictConfig) -> Path | None:
    """The embeddings file that was given instead of contigs. Raises UserError for one among other inputs."""
    given = [name for name in config.inputs if name != "-" and _is_hdf5(name)]
    if not given:
        return None
    if len(config.inputs) > 1:
        raise UserError(f"{given[0]} is an embeddings file, and not the only input.", "Give it alone, or contigs.")
    if idle := config.given(*OF_ENCODERS):
        options = " and ".join(idle)
        raise UserError(f"{given[0]} is embedded already: nothing is left for {options}.", f"Leave {options} out.")
    return Path(given[0])


def _is_hdf5(name: str) -> bool:
    try:
        with open(name, "rb") as file:
            return Path(name).is_file() and file.read(len(store.HDF5_MAGIC)) == store.HDF5_MAGIC
    except FileNotFoundError:
        raise UserError(f"{absent(name)}.", "Name FASTA or FASTQ files, or a file of embed.") from None
    except OSError as error:
        raise UserError(f"{unread(name, error)}.", "Name FASTA or FASTQ files, or a file of embed.") from None


def _chunk_of(path: Path, asked: int | None) -> int:
    """The chunk length of an embeddings file. Raises UserError if another was asked for."""
    opened = frames.opened(path)
    opened.file.close()
    if asked not in (None, opened.chunk):
        raise UserError(f"{path} is of chunks of {opened.chunk} bases, not {asked}.", "Leave --chunk out.")
    return opened.chunk


def _published(chunk: int | None, out: Console) -> Head:
    try:
        return fetching.fetched(chunk or DEFAULT_CHUNK, lambda text: out.print(text))
    except UserError as error:
        raise UserError(error.what, f"{error.remedy}\nOr give --head FILE.") from None


def _check_width(head: Head, config: PredictConfig) -> None:
    """Raise UserError if the head takes other features than both models give."""
    widths = [_width(model) for model in (config.nucleotide_model, config.model)]
    if sum(widths) != head.features:
        refusal = f"{head.place} takes {head.features:,} features, and the models give {widths[0]:,} + {widths[1]:,}."
        raise UserError(refusal, "Take the models that the head was trained with: --model, --nucleotide-model.")


def _width(model: str) -> int:
    """Dimensions of a row of a model, which need not be here if it has a name."""
    located = locate.locate(model)
    spec = by_name(model) if located is None else weights.spec_of(located)
    assert spec is not None
    return spec.hidden


def _check_folder(folder: Path) -> None:
    """Have the folder of the tables. Raises UserError if nothing can be written there."""
    place = folder.resolve()  # a link may name a folder that is not there yet
    try:
        place.mkdir(exist_ok=True)
    except OSError as error:
        if not place.parent.exists():
            raise UserError(f"The folder of {folder} does not exist.", f"mkdir -p {shell_word(place)}") from None
        raise UserError(f"The folder {folder} cannot be made: {error.strerror}.", "Choose another -o.") from None
    disk.check_destination(folder / tables.FRAMES)


# --- steps -----------------------------------------------------------------------------------------------------------


def _embed(run: PredictRun) -> None:
    """Have the embeddings file, or the shard of it. Raises UserError."""
    config = run.config
    told = EmbedConfig(
        output=str(run.embedded), from_="contigs", genes=frames.CALLER, chunk=run.head.chunk or 0, nucleotide=True,
        **{name: getattr(config, name) for name in SHARED},
    )  # fmt: skip
    with run.clock.stage("embed"):
        try:
            done = embed.run(told, run.out)
        except NoProteins as error:
            if config.shard is not None or run.embedded.exists():
                raise
            run.without = error.contigs
            run.out.print("no contig has a frame: all are listed as such, and nothing is scored", style="yellow")
            return
        except UserError as error:
            remedies = {
                "--overwrite": f"Choose another -o, or remove {run.folder / 'embeddings.*'} if nobody needs it.",
                "--from contigs": "predict reads contigs or reads: nucleotides.",
                "by itself": "Give each contig a name of its own.",
                "--layers": f"Make room there, or choose another -o. --store-dtype fp16 halves {run.embedded.name}.",
            }
            remedy = next((own for word, own in remedies.items() if word in error.remedy), None)
            if remedy is None:
                raise
            raise UserError(error.what, remedy) from None
    run.summary.counts |= done.counts
    run.summary.missed += done.missed
    run.summary.environment, run.summary.notes = done.environment, list(done.notes)


def _predict(run: PredictRun) -> None:
    """Have the tables that are asked for. Those that are there, of the same head and file, stay.

    Raises UserError if another run writes them now.
    """
    lock = disk.lock_of(run.folder / MADE_OF)
    busy, remedy = f"Another run is writing the tables of {run.folder} now.", "Wait for it, or choose another -o."
    with disk.alone(lock, lambda text: run.out.print(text, style="yellow"), busy, remedy, wait=False):
        _have_tables(run)


def _have_tables(run: PredictRun) -> None:
    if run.without is None:
        opened = frames.opened(run.embedded)
    else:
        opened = frames.none_of(run.embedded, run.without, run.head, run.head.chunk or DEFAULT_CHUNK)
    try:
        made_of = _settings(run, opened)
        there = _there(run, made_of)
        missing = {name: write for name, write in _writers(run.config).items() if name not in there}
        lacking = int((~opened.done).sum())
        if lacking:
            run.summary.counts[NOT_SCORED] = lacking
            run.summary.missed = max(run.summary.missed, lacking)
            some = f"{counted(lacking, 'frame')} of {len(opened.done):,} without a row in one of the halves"
            run.out.print(f"{some}: not in the tables", style="yellow")
        if not missing and run.other is None:
            run.out.print(f"{run.folder} is already complete: same embeddings, head and format.")
            run.summary.already_complete = True
            return
        with run.clock.stage("score"), report.Tracker(run.out, max(1, int(opened.done.sum())), "frames") as tracker:
            scored = frames.scored(opened, run.head, tracker.advance)
        with run.clock.stage("write"):
            for name, write in missing.items():
                _save(run, made_of, there)
                with disk.new_file(run.folder / name, overwrite=True) as file:
                    write(file, scored, run)
                there[name] = disk.sha256(run.folder / name)
            _save(run, made_of, there)
            _tell(run, scored)
        if run.other is not None:
            with run.clock.stage("compare"):
                _compare(run, scored, run.other)
    finally:
        opened.file.close()


Writer = Callable[[IO[bytes], Scored, PredictRun], None]


def _writers(config: PredictConfig) -> dict[str, Writer]:
    """The function that writes each table, by the name of its file."""
    format = config.format
    return {
        tables.FRAMES: lambda file, scored, run: tables.write_frames(file, scored, format),
        tables.CHUNKS: lambda file, scored, run: tables.write_chunks(file, scored, format, run.folder),
        contigs.CONTIGS: lambda file, scored, run: contigs.write(file, contigs.of(scored), scored),
    }


def _settings(run: PredictRun, opened: Frames) -> dict[str, Any]:
    """All that the tables depend on."""
    file = opened.file
    return {
        "command": "predict", "embeddings": [file.checksum_of_the_run, len(file)], "format": run.config.format,
        "head": run.head.identity(),
    }  # fmt: skip


def _there(run: PredictRun, made_of: dict[str, Any]) -> dict[str, str]:
    """The tables that are there and whole, of the same settings, with their checksums.

    Raises UserError for those of other settings, and for other files with these names.
    """
    told = run.folder / MADE_OF
    known: Any = None
    with suppress(OSError, ValueError):
        known = json.loads(told.read_bytes()) if told.is_file() else None
    there = {name for name in _writers(run.config) if (run.folder / name).exists()}
    is_ours = isinstance(known, dict) and "made_of" in known and isinstance(known.get("sha256"), dict)
    compared = run.other is None or compare.is_free(run.folder / compare.COMPARED)
    for name, is_free in ((MADE_OF, is_ours or not told.exists()), (compare.COMPARED, compared)):
        if not (is_free or run.config.overwrite):
            refusal = f"{run.folder / name} is there, and was not written by predict."
            raise UserError(refusal, "Choose another -o, or --overwrite it.")
    if is_ours and known["made_of"] == made_of:
        sums = {name: disk.sha256(run.folder / name) for name in there}
        return {name: each for name, each in sums.items() if known["sha256"].get(name) == each}
    if there and not run.config.overwrite:
        refusal = f"{run.folder / min(there)} exists, and is of another head, format or embeddings file"
        if known is None:
            refusal = f"{run.folder / min(there)} exists, and nothing says what it is of"
        raise UserError(f"{refusal}.", "Choose another -o, or --overwrite it.")
    return {}


def _save(run: PredictRun, made_of: dict[str, Any], sums: dict[str, str]) -> None:
    """Note what the tables are of, and the checksums of those that are whole; others are made again."""
    with disk.written_whole(disk.behind(run.folder / MADE_OF)) as file:
        file.write(json.dumps({"made_of": made_of, "sha256": sums, "place": run.head.place}, indent=1).encode())


def _tell(run: PredictRun, scored: Scored) -> None:
    """Print what the tables hold, a line for each, and count it for the report."""
    frames_virus, chunk_virus = int(scored.is_virus.sum()), int(frames.chunk_is_virus(scored.highest).sum())
    calls = np.bincount(contigs.of(scored).call, minlength=len(contigs.CALLS)).tolist()
    some = {name: count for name, count in zip(contigs.CALLS, calls, strict=True) if count}
    run.summary.counts |= {
        "frames": len(scored.rows), "frames of virus": frames_virus, "chunks": len(scored.first),
        "chunks of virus": chunk_virus, **{f"contigs {name}": count for name, count in some.items()},
    }  # fmt: skip
    say = run.out.print
    say(f"{run.folder / tables.FRAMES}: {counted(len(scored.rows), 'frame')}, {frames_virus:,} virus")
    say(f"{run.folder / tables.CHUNKS}: {counted(len(scored.first), 'chunk')}, {chunk_virus:,} virus")
    named = ", ".join(f"{count:,} {name}" for name, count in some.items())
    say(f"{run.folder / contigs.CONTIGS}: {counted(scored.frames.contigs, 'contig')}: {named}")


def _compare(run: PredictRun, scored: Scored, other: compare.Other) -> None:
    """Write compare.tsv, and show its first lines."""
    path = run.folder / compare.COMPARED
    with disk.new_file(path, overwrite=True) as file:
        found = compare.compared(scored, other, file)
    run.summary.counts |= found.as_numbers()
    run.summary.tables["Compared"] = [level._asdict() for level in found.levels]
    run.out.print(f"{path}: compared with {other.path}")
    for line in found.words():
        run.out.print(line)


def predict_contigs(inputs: Any, output: Any, **options: Any) -> report.RunReport:
    """Predict as the command does. options: the fields of `PredictConfig`."""
    from virnucpro_cli.config import resolve

    return run(resolve(PredictConfig, None, {"quiet": True, **options, "inputs": inputs, "output": output}))
