# The nf-core modules and the subworkflow, by nf-core's own linter, as parts of a repository of modules with the addresses filled in.
# pip: nf-core==4.2.1
repository=$(mktemp -d)
trap 'rm -rf "$repository"' EXIT
cp -r packaging/nf-core/modules "$repository/modules"
mkdir "$repository/modules/nf-core" && mv "$repository/modules/virnucpro" "$repository/modules/nf-core/"
mkdir "$repository/subworkflows" && cp -r packaging/nf-core/subworkflows "$repository/subworkflows/nf-core"
find "$repository" -type f -exec sed -i \
    -e 's|@CONTAINER_.PU@|registry.example/library/virnucpro:0.1.0|; s|@SINGULARITY_.PU@|https://registry.example/virnucpro/data|' \
    -e 's|@HOMEPAGE@|https://virnucpro.example|' {} +
printf 'repository_type: modules\norg_path: nf-core\n' >"$repository/.nf-core.yml"
cd "$repository"
export HOME=$repository GIT_AUTHOR_NAME=x GIT_AUTHOR_EMAIL=x GIT_COMMITTER_NAME=x GIT_COMMITTER_EMAIL=x
git init -q -b master && git add -A && git commit -q -m modules
nf-core modules -g "file://$repository" -b master lint --all --local
nf-core subworkflows -g "file://$repository" -b master lint --all
