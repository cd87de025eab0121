__author__ = "The virnucpro authors"
__copyright__ = "Copyright 2026, The virnucpro authors"
__email__ = "@EMAIL@"
__license__ = "MIT"

import re
from shlex import quote

from snakemake.shell import shell

extra = snakemake.params.get("extra", "")
log = f"> {quote(snakemake.log[0])} 2>&1" if snakemake.log else ""  # log_fmt_shell does not quote

weights = snakemake.input.get("weights", "")
model = f"--model {quote(weights)}" if weights else ""

gpus = snakemake.resources.get("gpu", 0)
device = f"--device cuda --workers {gpus}" if gpus else "--device cpu"

tables = " ".join(f"--{name} {quote(file)}" for name in ("report", "qc") if (file := snakemake.output.get(name)))

# The name of a shard says which part of the FASTA it is, and of which output.
output = snakemake.output.h5
part = ""
if shard := re.fullmatch(r"(.+)\.shard-(\d+)-of-(\d+)(\.\w+)", output):
    whole, number, count, suffix = shard[1], int(shard[2]), int(shard[3]), shard[4]
    named = f"{whole}.shard-{number:04d}-of-{count:04d}{suffix}"
    if output != named:
        raise ValueError(f"virnucpro writes {named}: the output {output} needs four digits")
    output = f"{whole}{suffix}"
    part = f"--shard {number}/{count}"

# Exit code 3: finished, some records were skipped.
shell(
    "OMP_NUM_THREADS={snakemake.threads} virnucpro embed {snakemake.input.fasta:q}"
    " --output {output:q}"
    " {part}"
    " {tables}"
    " {model}"
    " {device}"
    " {extra}"
    " {log}"
    " || [ $? -eq 3 ]"
)
