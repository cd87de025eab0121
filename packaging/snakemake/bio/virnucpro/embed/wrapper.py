__author__ = "The virnucpro authors"
__copyright__ = "Copyright 2026, The virnucpro authors"
__email__ = "@EMAIL@"
__license__ = "MIT"

import re

from snakemake.shell import shell

extra = snakemake.params.get("extra", "")
log = snakemake.log_fmt_shell(stdout=True, stderr=True)

weights = snakemake.input.get("weights", "")
model = f"--model {weights}" if weights else ""

gpus = snakemake.resources.get("gpu", 0)
device = f"--device cuda --workers {gpus}" if gpus else "--device cpu"

report = snakemake.output.get("report", "")
report = f"--report {report}" if report else ""

# The name of a shard says which part of the FASTA it is, and of which output.
output = snakemake.output.h5
part = ""
if shard := re.fullmatch(r"(.+)\.shard-(\d+)-of-(\d+)(\.\w+)", output):
    output = f"{shard[1]}{shard[4]}"
    part = f"--shard {int(shard[2])}/{int(shard[3])}"

# Exit code 3: finished, some records were skipped.
shell(
    "OMP_NUM_THREADS={snakemake.threads} virnucpro embed {snakemake.input.fasta}"
    " --output {output}"
    " {part}"
    " {report}"
    " {model}"
    " {device}"
    " {extra}"
    " {log}"
    " || [ $? -eq 3 ]"
)
