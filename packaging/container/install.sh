#!/bin/sh
# What an image of virnucpro holds. The Dockerfile and virnucpro.def run this, and nothing else: install.sh STEP ...
# TORCH: the build of PyTorch, as uv's --torch-backend names it. SOURCE: the source. ROOT: where the image's files go.
set -eu
umask 022
: "${TORCH:=cu130}" "${SOURCE:=/source}" "${ROOT:=/opt/virnucpro}"

system() { # gcc: Triton compiles the start-up code of kernels; procps: Nextflow measures tasks with ps
    apt-get update
    apt-get install -y --no-install-recommends gcc libc6-dev procps
    rm -rf /var/lib/apt/lists/*
}

program() {
    python3 -m pip install --no-cache-dir uv==0.13.9
    uv pip install --python "$(command -v python3)" --no-cache --torch-backend "$TORCH" "$SOURCE"
    mkdir -p "$ROOT"
    install -m 755 "$SOURCE/packaging/container/enter" "$ROOT/enter"
    virnucpro --version
}

warm() { # compiled kernels, of every width up to the 650M's, for the GPU that is seen now
    if ! python3 -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
        echo "no GPU at build time: each width's kernels are compiled by its first run"
        return
    fi
    proteins=$(python3 -c 'import virnucpro_cli as v; print(v.__path__[0] + "/data/viral_proteins.fasta")')
    mkdir -p "$ROOT/warm"
    for model in 8M 35M 150M 650M; do
        HOME=$ROOT/warm virnucpro embed "$proteins" -o "$ROOT/$model.h5" --model "random:$model"
        rm "$ROOT/$model.h5"
    done
    chmod -R a+rX "$ROOT/warm"
}

for step in "$@"; do "$step"; done
