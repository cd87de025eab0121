"""The command line: parse -> config -> workflow -> exit code. Nothing heavy is imported until a command runs."""

import os
import signal
import sys
import tempfile
import traceback
from contextlib import suppress
from types import FrameType
from typing import Annotated, Any

import typer

from virnucpro_cli import __version__
from virnucpro_cli.config import BenchConfig, EmbedConfig, ValidateConfig, resolve
from virnucpro_cli.errors import (
    EXIT_GATE_FAILED,
    EXIT_INTERNAL,
    EXIT_OK,
    EXIT_SIGNAL_BASE,
    EXIT_SOME_SKIPPED,
    EXIT_USER_ERROR,
    STOP_SIGNALS,
    Stopped,
    UserError,
)

app = typer.Typer(
    name="virnucpro",
    help="Protein FASTA to ESM-2 embeddings: packed, resumable, checked.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

EPILOG = (
    "Exit codes: 0 all done; 2 something to put right (the message says what); 3 finished, but some records were skipped; "
    "70 a bug; 128+signal after an orderly stop, which the same command resumes."
)


ReportFile = Annotated[str | None, typer.Option("--report", metavar="FILE.json", help="Write the report as JSON.")]
QcFile = Annotated[
    str | None, typer.Option("--qc", metavar="FILE.tsv", help="Write a line for each protein: what became of it.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a finished output file.")]


def _numbers(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"--layers is {text!r}.", "Give numbers such as -1 or 0,6,-1.") from None


def _budget(text: str | None) -> int | str | None:
    return int(text) if text is not None and text.isascii() and text.isdigit() else text


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False) -> None:
    if version:
        print(f"virnucpro {__version__}")
        raise typer.Exit


@app.command(epilog=EPILOG)
def embed(
    inputs: Annotated[
        list[str],
        typer.Argument(metavar="INPUT...", help="FASTA files, plain or gz, bz2, xz, zst; - for standard input."),
    ],
    output: Annotated[str, typer.Option("--output", "-o", metavar="OUT.h5", help="The HDF5 file to write.")],
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            metavar="MODEL",
            help="8M, 35M, 150M, 650M, 3B, 15B, their long names, demo, or a path to a fair-esm .pt, a .safetensors file or a HuggingFace directory. [default: 650M]",
        ),
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option("--layers", metavar="N,N", help="Layers to store: 0 is the embedding, -1 the last. [default: -1]"),
    ] = None,
    pool: Annotated[
        str | None, typer.Option("--pool", metavar="KIND,KIND", help="Any of mean, bos, residue. [default: mean]")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype",
            metavar="TYPE",
            help="Compute in auto, fp32, fp16, bf16 or fp8 (Hopper; approximate: errors of several %). "
            "[default: auto: fp16 on CUDA, fp32 elsewhere]",
        ),
    ] = None,
    store_dtype: Annotated[
        str | None, typer.Option("--store-dtype", metavar="TYPE", help="Store fp16 or fp32. [default: fp16]")
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            "--device",
            metavar="DEVICE",
            help="auto, cpu, cuda (all GPUs), cuda:N, cuda:N,N or mps. [default: auto]",
        ),
    ] = None,
    workers: Annotated[
        str | None,
        typer.Option(
            "--workers",
            metavar="N",
            help="Processes on this host, that share the devices; auto is one for each GPU, and one on a CPU. [default: auto]",
        ),
    ] = None,
    attention: Annotated[
        str | None,
        typer.Option(
            "--attention",
            metavar="NAME",
            help="auto, triton, torch_varlen, flash_attn, efficient or sdpa; a named one runs or is refused. [default: auto]",
        ),
    ] = None,
    token_budget: Annotated[
        str | None, typer.Option("--token-budget", metavar="N", help="Tokens per pack, or auto. [default: auto]")
    ] = None,
    max_residues: Annotated[
        int | None,
        typer.Option("--max-residues", metavar="N", help="Longest protein embedded in one piece. [default: 1022]"),
    ] = None,
    long: Annotated[
        str | None,
        typer.Option(
            "--long",
            metavar="HOW",
            help="Longer proteins: truncate, full, window (overlapping windows, stitched), skip or error. [default: truncate]",
        ),
    ] = None,
    overlap: Annotated[
        int | None,
        typer.Option("--overlap", metavar="N", help="Least overlap of two windows, in residues. [default: 256]"),
    ] = None,
    invalid: Annotated[
        str | None,
        typer.Option(
            "--invalid",
            metavar="HOW",
            help="Residues outside the alphabet: x (embed as X), error or skip. [default: x]",
        ),
    ] = None,
    id: Annotated[
        str | None,
        typer.Option(
            "--id", metavar="HOW", help="Names: first (up to the first white space) or full header. [default: first]"
        ),
    ] = None,
    no_dedup: Annotated[
        bool, typer.Option("--no-dedup", help="Compute identical proteins again instead of copying.")
    ] = False,
    overwrite: Overwrite = False,
    restart: Annotated[
        bool, typer.Option("--restart", help="Discard a partial output instead of resuming it.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Stop after the plan and print it.")] = False,
    no_preallocate: Annotated[
        bool,
        typer.Option(
            "--no-preallocate", help="Do not reserve the disk space first (network disks where that is slow)."
        ),
    ] = False,
    force_protein: Annotated[
        bool, typer.Option("--force-protein", help="Accept a file that looks like nucleotides.")
    ] = False,
    shard: Annotated[
        str | None,
        typer.Option(
            "--shard",
            metavar="K/N",
            help="Embed the K-th of N parts, into OUT.shard-K-of-N.h5; auto in an array job (auto/N if it does not tell N). "
            "See status and merge.",
        ),
    ] = None,
    qc: QcFile = None,
    report: ReportFile = None,
    config: Annotated[
        str | None,
        typer.Option("--config", metavar="FILE.toml", help="Options from a TOML file, table [embed]; flags win."),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")] = False,
) -> None:
    """Embed protein FASTA files into one HDF5 file, row i for record i.

    Nothing else is needed: virnucpro embed proteins.fasta -o embeddings.h5. An interrupted run is resumed by the same command.
    """
    flags = {
        "inputs": tuple(inputs), "output": output, "model": model, "layers": _numbers(layers),
        "pool": None if pool is None else tuple(dict.fromkeys(part.strip() for part in pool.split(","))),
        "dtype": dtype, "store_dtype": store_dtype, "device": device, "workers": _budget(workers), "attention": attention,
        "token_budget": _budget(token_budget), "max_residues": max_residues, "long": long, "overlap": overlap,
        "invalid": invalid, "id": id, "dedup": False if no_dedup else None, "overwrite": overwrite or None,
        "restart": restart or None, "dry_run": dry_run or None, "preallocate": False if no_preallocate else None,
        "force_protein": force_protein or None, "shard": shard, "qc": qc, "report": report, "quiet": quiet or None,
    }  # fmt: skip
    settings = resolve(EmbedConfig, config, flags)
    from virnucpro_cli import embed as workflow

    summary = workflow.run(settings)
    if summary.counts.get("skipped") and not (settings.dry_run or summary.already_complete):
        raise typer.Exit(EXIT_SOME_SKIPPED)


@app.command(epilog="Exit codes: 0 done; 1 a --min-... gate was missed; 2 something to put right; 70 a bug.")
def bench(
    packed: Annotated[bool, typer.Option("--packed", help="Time packed batches. [default: both]")] = False,
    unpacked: Annotated[
        bool,
        typer.Option("--unpacked", help="Time padded batches, in file order and sorted by length. [default: both]"),
    ] = False,
    fasta: Annotated[
        list[str] | None,
        typer.Option("--fasta", metavar="FILE", help="Your own proteins (a sample). [default: made-up ones]"),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            metavar="MODEL",
            help="As in embed; random weights if it is not here. [default: 650M on a GPU, 8M on a CPU]",
        ),
    ] = None,
    dtype: Annotated[str | None, typer.Option("--dtype", metavar="TYPE", help="As in embed.")] = None,
    device: Annotated[str | None, typer.Option("--device", metavar="DEVICE", help="As in embed.")] = None,
    attention: Annotated[str | None, typer.Option("--attention", metavar="NAME", help="As in embed.")] = None,
    token_budget: Annotated[
        str | None, typer.Option("--token-budget", metavar="N,N", help="One or several to compare. [default: auto]")
    ] = None,
    max_residues: Annotated[int | None, typer.Option("--max-residues", metavar="N", help="As in embed.")] = None,
    seconds: Annotated[
        float | None, typer.Option("--seconds", metavar="S", help="About how long to measure. [default: 45]")
    ] = None,
    peers: Annotated[
        str | None,
        typer.Option(
            "--peers", metavar="NAME,NAME", help="Also time fair-esm, transformers, esm-efficient, faesm if installed."
        ),
    ] = None,
    min_speedup: Annotated[
        float | None,
        typer.Option("--min-speedup", metavar="X", help="Exit 1 unless packed is X times padded in file order."),
    ] = None,
    min_density: Annotated[
        float | None, typer.Option("--min-density", metavar="X", help="Exit 1 unless packs are this full (0 to 1).")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the report as one line on standard output.")] = False,
    report: ReportFile = None,
    plot: Annotated[str | None, typer.Option("--plot", metavar="FILE.png", help="Draw it (extra plots).")] = None,
    save_config: Annotated[
        str | None,
        typer.Option("--save-config", metavar="FILE.toml", help="Write the recommended settings for embed --config."),
    ] = None,
    config: Annotated[
        str | None,
        typer.Option("--config", metavar="FILE.toml", help="Options from a TOML file, table [bench]; flags win."),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")] = False,
) -> None:
    """Measure what packing buys on this device, and how far it is from the device's limit.

    Nothing else is needed: virnucpro bench --packed --unpacked.
    """
    flags = {
        "packed": packed or None, "unpacked": unpacked or None, "fasta": tuple(fasta) if fasta else None, "model": model,
        "dtype": dtype, "device": device, "attention": attention,
        "token_budget": None if token_budget is None else tuple(_budget(part) for part in token_budget.split(",")),
        "max_residues": max_residues, "seconds": seconds, "min_speedup": min_speedup, "min_density": min_density,
        "peers": None if peers is None else tuple(dict.fromkeys(part.strip() for part in peers.split(","))),
        "report": report, "plot": plot, "save_config": save_config, "quiet": quiet or None,
    }  # fmt: skip
    settings = resolve(BenchConfig, config, flags)
    from virnucpro_cli import bench as workflow

    found = workflow.run(settings)
    missed = workflow.failed_gates(found, settings)
    if json:
        print(found.to_json(indent=None))
    if missed:
        _say(*(f"missed: {gate}" for gate in missed))
        raise typer.Exit(EXIT_GATE_FAILED)


VALIDATE_EPILOG = (
    "Exit codes: 0 the verdict is PASS; 1 it is FAIL; 2 something to put right (the message says what); 70 a bug."
)


@app.command(epilog=VALIDATE_EPILOG)
def validate(
    fasta: Annotated[
        list[str] | None,
        typer.Option(
            "--fasta",
            metavar="FILE",
            help="Your own proteins; may be repeated. [default: 128 that ship with virnucpro]",
        ),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            "--against", metavar="OUT.h5", help="Audit a file that embed wrote, with the model and settings it names."
        ),
    ] = None,
    model: Annotated[str | None, typer.Option("--model", metavar="MODEL", help="As in embed. [default: demo]")] = None,
    sample: Annotated[
        int | None,
        typer.Option(
            "--sample",
            metavar="N",
            help="Proteins to compare at least, spread over the lengths; odd ones included. [default: 60]",
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", metavar="N", help="Of the sample. [default: 0]")] = None,
    min_cosine: Annotated[
        float | None,
        typer.Option(
            "--min-cosine",
            metavar="X",
            help="Least cosine of a pooled row with fair-esm's. [default: 0.999, bf16 0.998]",
        ),
    ] = None,
    max_rel_l2: Annotated[
        float | None,
        typer.Option(
            "--max-rel-l2",
            metavar="X",
            help="Largest relative L2 error of a pooled row. [default: fp32 1e-5, fp16 1e-2, bf16 6e-2]",
        ),
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option("--layers", metavar="N,N", help="Layers to compare. [default: 0, the middle and the last]"),
    ] = None,
    dtype: Annotated[str | None, typer.Option("--dtype", metavar="TYPE", help="As in embed.")] = None,
    device: Annotated[str | None, typer.Option("--device", metavar="DEVICE", help="As in embed.")] = None,
    attention: Annotated[str | None, typer.Option("--attention", metavar="NAME", help="As in embed.")] = None,
    token_budget: Annotated[str | None, typer.Option("--token-budget", metavar="N", help="As in embed.")] = None,
    max_residues: Annotated[int | None, typer.Option("--max-residues", metavar="N", help="As in embed.")] = None,
    reference_device: Annotated[
        str | None,
        typer.Option(
            "--reference-device", metavar="DEVICE", help="Where fair-esm runs; cuda for large models. [default: cpu]"
        ),
    ] = None,
    golden: Annotated[
        str | None, typer.Option("--golden", metavar="FILE", help="Compare with rows that --write-golden stored.")
    ] = None,
    write_golden: Annotated[
        str | None,
        typer.Option("--write-golden", metavar="FILE", help="Store fair-esm's rows of three shipped proteins."),
    ] = None,
    report: Annotated[
        str | None, typer.Option("--report", metavar="FILE.json", help="Write every number as JSON.")
    ] = None,
    config: Annotated[
        str | None,
        typer.Option("--config", metavar="FILE.toml", help="Options from a TOML file, table [validate]; flags win."),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print the verdict only.")] = False,
) -> None:
    """Prove that the embeddings are ESM-2's: against fair-esm in fp32, one protein at a time.

    Nothing else is needed: virnucpro validate. The verdict has three parts: semantics (fp32 against fair-esm), precision
    (the run's dtype against its noise floor) and packing (the same bits in any company).
    """
    flags = {
        "fasta": tuple(fasta) if fasta else None, "against": against, "model": model, "sample": sample, "seed": seed,
        "min_cosine": min_cosine, "max_rel_l2": max_rel_l2, "layers": _numbers(layers), "dtype": dtype,
        "device": device, "attention": attention, "token_budget": _budget(token_budget),
        "max_residues": max_residues, "reference_device": reference_device, "golden": golden,
        "write_golden": write_golden, "report": report, "quiet": quiet or None,
    }  # fmt: skip
    settings = resolve(ValidateConfig, config, flags)
    from virnucpro_cli import validate as workflow

    verdict = workflow.run(settings)
    print("PASS" if verdict.passed else f"FAIL: {'; '.join(verdict.failed_parts)}")
    if not verdict.passed:
        raise typer.Exit(EXIT_GATE_FAILED)


@app.command()
def inspect(
    file: Annotated[str, typer.Argument(metavar="OUT.h5", help="What embed wrote, or is writing (OUT.h5.partial).")],
    qc: QcFile = None,
) -> None:
    """Show what is in an embeddings file and how complete it is, with a sentence for your Methods."""
    from virnucpro_cli import inspect as workflow

    _end_at_once()
    workflow.run(file, qc)


@app.command(
    epilog="Exit codes: 0 the verdict is PASS; 1 it is FAIL; 2 something to put right (the message says what)."
)
def verify(
    file: Annotated[str, typer.Argument(metavar="OUT.h5", help="A finished file that embed wrote.")],
    fasta: Annotated[
        list[str] | None,
        typer.Option("--fasta", metavar="FILE", help="Its input; may be repeated. [default: where embed read it]"),
    ] = None,
    report: Annotated[
        str | None, typer.Option("--report", metavar="FILE.json", help="Write the checks as JSON.")
    ] = None,
) -> None:
    """Check that a file is whole, unaltered since embed wrote it, and of this FASTA: every byte, every record.

    It needs no model; whether the values are ESM-2's is told by: virnucpro validate --against OUT.h5.
    """
    from virnucpro_cli import verify as workflow

    _end_at_once()
    verdict = workflow.run(file, tuple(fasta or ()), report)
    print(
        "PASS"
        if verdict.passed
        else f"FAIL: {'; '.join(check.what for check in verdict.checks if check.passed is False)}"
    )
    if not verdict.passed:
        raise typer.Exit(EXIT_GATE_FAILED)


@app.command(epilog="Exit codes: 0 nothing stands in the way of a run; 1 something does, with a remedy.")
def doctor() -> None:
    """Show what a run would find on this machine: driver, GPUs, kernels, weights, disks, batch system; and what to do."""
    from virnucpro_cli import doctor as workflow

    if not workflow.run():
        raise typer.Exit(EXIT_GATE_FAILED)


@app.command(epilog="Exit codes: 0 all shards are complete; 1 some are not; 2 there are none.")
def status(output: Annotated[str, typer.Argument(metavar="OUT.h5", help="What embed was given as -o.")]) -> None:
    """Show which shards of an output are complete, partial or missing."""
    from virnucpro_cli import status as workflow

    if not workflow.run(output):
        raise typer.Exit(EXIT_GATE_FAILED)


@app.command(
    epilog="Exit codes: 0 done; 2 something to put right (the message says what); 3 done, but some records were skipped by "
    "their shards; 70 a bug; 128+signal after an orderly stop."
)
def merge(
    output: Annotated[str, typer.Argument(metavar="OUT.h5", help="What embed was given as -o.")],
    of: Annotated[
        int | None, typer.Option("--of", metavar="N", help="How many shards, if there are sets of several numbers.")
    ] = None,
    overwrite: Overwrite = False,
    report: ReportFile = None,
) -> None:
    """Make one file, in the order of the FASTA, of all shards of an output. They must all be complete, and parts of one run."""
    from virnucpro_cli import merge as workflow

    merged = workflow.run(output, of, overwrite, report)
    if merged.counts.get("skipped") and not merged.already_complete:
        raise typer.Exit(EXIT_SOME_SKIPPED)


@app.command()
def fetch(
    models: Annotated[
        list[str] | None, typer.Argument(metavar="[MODEL...]", help="Model names, e.g. 650M demo.")
    ] = None,
    list_models: Annotated[
        bool, typer.Option("--list", help="Show which models are on this machine, and where.")
    ] = False,
) -> None:
    """Put weights into the cache ahead of time, for compute nodes without internet access."""
    from virnucpro_cli import fetch as workflow

    if list_models:
        workflow.show()
    elif models:
        for model in models:
            workflow.run(model)
    else:
        raise UserError("fetch needs a model's name.", "virnucpro fetch 650M, or virnucpro fetch --list")


class _StopOnce:
    """Turns the first signal into Stopped; later ones must not disturb the way out, which commits what is done."""

    def __init__(self) -> None:
        self.stopped = False

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        if not self.stopped:
            self.stopped = True
            raise Stopped(signum)


def _on_stop_signals(handler: Any) -> None:
    for signum in STOP_SIGNALS:
        if signal.getsignal(signum) is not signal.SIG_IGN:  # as nohup sets it
            signal.signal(signum, handler)


def _end_at_once() -> None:
    """Signals kill a command that has nothing to put in order: HDF5 can be lost in a damaged file, where no handler gets its turn."""
    _on_stop_signals(signal.SIG_DFL)


def _say(*lines: str) -> None:
    with suppress(OSError):  # nobody may be listening any more
        print(*lines, sep="\n", file=sys.stderr, flush=True)


def _fail(error: UserError) -> None:
    _say(f"error: {error.what}", *([error.remedy] if error.remedy else []))


def _bug(error: BaseException) -> None:
    with tempfile.NamedTemporaryFile("w", prefix="virnucpro-", suffix=".log", delete=False) as log:
        log.write(f"virnucpro {__version__}: {sys.argv}\n")
        traceback.print_exception(error, file=log)
    _say(
        f"internal error, a bug in virnucpro: {type(error).__name__}: {error}",
        f"The traceback is in {log.name}; please report it.",
    )


def _open_closed_streams() -> None:
    """A closed standard stream would give its number to the next file opened, and libraries would write into that."""
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115


def main(arguments: list[str] | None = None) -> Any:
    """Run the command line and exit with its code."""
    _open_closed_streams()
    stop_once = _StopOnce()
    _on_stop_signals(stop_once)
    try:
        code = app(args=arguments, standalone_mode=False) or EXIT_OK  # click hands back the code of a typer.Exit
    except UserError as error:
        _fail(error)
        code = EXIT_USER_ERROR
    except typer.Abort as error:  # click's word for an EOFError
        _bug(error.__cause__ or error)
        code = EXIT_INTERNAL
    except Stopped as stop:
        name = signal.Signals(stop.signum).name
        _say(
            f"stopped by {name}; "
            + ("what was computed is kept, and the same command resumes." if stop.resumable else "nothing was written.")
        )
        code = EXIT_SIGNAL_BASE + stop.signum
    except Exception as error:  # the last resort: a bug, logged whole
        code = _usage_or_bug(error)
    stop_once.stopped = True  # a signal that comes now finds nothing to stop
    if sys.stdout is not None:
        sys.stdout.flush()
    sys.exit(code)


def _usage_or_bug(error: Exception) -> int:
    if hasattr(error, "show") and hasattr(error, "exit_code"):  # click's usage errors
        error.show()
        return EXIT_USER_ERROR
    _bug(error)
    return EXIT_INTERNAL
