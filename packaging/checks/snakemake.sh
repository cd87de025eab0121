# The Snakemake wrapper and the example workflow, by snakefmt and Snakemake's linter.
# Then the wrapper runs, with random weights.
# pip: snakemake==9.27.1 snakefmt==2.1.0
wrapper=packaging/snakemake/bio/virnucpro/embed
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
snakefmt --check packaging/snakemake examples/snakemake
snakemake -s "$wrapper/test/Snakefile" --lint --directory "$folder"
snakemake -s examples/snakemake/Snakefile --lint --directory "$folder" --config fasta=in.fasta output=out.h5
ln -s "$PWD/packaging/snakemake" "$folder/master" # the test names the wrapper as the public repository does
cp -r "$wrapper/test" "$folder/test"
cd "$folder/test"
snakemake --cores 2 --wrapper-prefix "file://$folder/" proteins.h5 proteins.shard-000{1,2}-of-0002.h5
virnucpro merge proteins.h5 --overwrite
virnucpro inspect proteins.h5
