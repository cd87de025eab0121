# The recipe and the environments of conda: grayskull's own recipe of the sdist, souschef's reading, rattler's and conda-lock's.
# pip: grayskull==3.2.0 conda-souschef==3.0.1 py-rattler==0.28.0 conda-lock==4.0.3 build==1.3.0 hatchling==1.27.0
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
python -m build --sdist --no-isolation --outdir "$scratch" .
sdist=$(echo "$scratch"/virnucpro-*.tar.gz)
mkdir "$scratch/grayskull" "$scratch/ours"
grayskull pypi "$sdist" --no-use-v1-format --output "$scratch/grayskull" >"$scratch/log" 2>&1 || { cat "$scratch/log"; exit 1; }
packaging/fill packaging/bioconda/meta.yaml "SOURCE_URL=file://$sdist" "SOURCE_SHA256=$(sha256sum "$sdist" | cut -d' ' -f1)" \
    HOME=https://example.org DOC_URL=https://example.org/docs DEV_URL=https://example.org/source MAINTAINER=maintainer \
    >"$scratch/ours/meta.yaml"
python packaging/checks/conda.py "$scratch/ours/meta.yaml" "$scratch/grayskull/virnucpro/meta.yaml" packaging/conda/*.yml
