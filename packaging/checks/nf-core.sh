# The nf-core modules and the subworkflow, by reftrace's parser and nf-core's linter, in a repository of modules with the
# addresses filled in. Then they run on this host, as stubs and with random weights. nextflow.groovy stands in for Nextflow;
# it needs Java.
# pip: nf-core==4.2.1 reftrace==0.6.0
checks=$PWD/packaging/checks
repository=$(mktemp -d) work=$(mktemp -d)
trap 'rm -rf "$repository" "$work"' EXIT

groovy=$TOOLS/groovy
packages="groovy libasm-java libantlr-java libcommons-cli-java"
if [ ! -d "$groovy/usr" ]; then
    mkdir -p "$groovy"
    (cd "$groovy" && { apt-get download $packages || { apt-get update -qq && apt-get download $packages; }; })
    for package in "$groovy"/*.deb; do dpkg -x "$package" "$groovy"; done
fi
mkdir "$work/bin"
awk '/^>/ && ++n > 6 { exit } 1' examples/viral_proteins.fasta >"$work/few.fasta"
# Programs of a second each: Java compiles them no more than it must.
printf '#!/bin/sh\nexec java -XX:TieredStopAtLevel=1 -XX:+UseSerialGC -Xshare:auto -cp "%s" groovy.ui.GroovyMain "%s" "$@"\n' "$(printf %s: "$groovy"/usr/share/java/*.jar)" \
    "$checks/nextflow.groovy" >"$work/bin/nextflow"
chmod +x "$work/bin/nextflow"
export PATH="$PATH:$work/bin"

mkdir -p "$repository/modules/nf-core" "$repository/subworkflows" "$repository/tests/config"
cp -r packaging/nf-core/modules/virnucpro "$repository/modules/nf-core/"
cp -r packaging/nf-core/subworkflows "$repository/subworkflows/nf-core"
find "$repository" -type f -exec sed -i \
    -e 's|@CONTAINER_\(.\)PU@|registry.example/library/virnucpro-\L\1\Epu:0.1.0|g' \
    -e 's|@SINGULARITY_\(.\)PU@|https://registry.example/virnucpro-\L\1\Epu/data|g' \
    -e 's|@HOMEPAGE@|https://virnucpro.example|' {} +
cd "$repository"
printf '%s\n' 'repository_type: modules' 'org_path: nf-core' 'container_registry: [registry.example]' >.nf-core.yml
# A repository of modules has schemas, here empty ones, and an address. The linter clones no address of file://.
tee modules/meta-schema.json modules/environment-schema.json subworkflows/yaml-schema.json <<<"{}" >/dev/null
export HOME=$work GIT_AUTHOR_NAME=x GIT_AUTHOR_EMAIL=x GIT_COMMITTER_NAME=x GIT_COMMITTER_EMAIL=x
git init -q -b master && git add -A && git commit -q -m modules
git config --global "url.file://$repository.insteadOf" https://modules.example/modules.git
failed=0
python -c 'import sys, reftrace; [print(reftrace.Module.from_file(path)._proto) for path in sys.argv[1:]]' \
    $(find . -name main.nf) || failed=1
for kind in modules subworkflows; do
    nf-core "$kind" -g https://modules.example/modules.git -b master lint --all || failed=1
done
PATH=${PATH#*:} "$work/bin/nextflow" try . "$work/few.fasta" "$work"
[ "$failed" = 0 ]
