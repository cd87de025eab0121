# Two samples, side by side in a report of MultiQC.
# pip: multiqc==1.35
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
printf '>a\nMKVLAGW\n>empty\n' >"$work/first.faa"
printf '>a\nMKVLAGW\n>b\nMKVLA\n>long\n%s\n' "$(printf 'MKVLAGW%.0s' {1..200})" >"$work/second.faa"
for sample in first second; do
    virnucpro embed "$work/$sample.faa" -o "$work/$sample.h5" --model random:8M --device cpu -q || [ $? = 3 ]
    virnucpro inspect "$work/$sample.h5" --multiqc "$work" >"$work/$sample.txt"
done
env -u PYTHONPATH multiqc --strict --no-version-check -q "$work" -o "$work/report"
test -s "$work/report/multiqc_report.html"
cd "$work/report/multiqc_data"
cut -f 1-4,7 multiqc_general_stats.txt | diff - <(
    printf 'Sample%s\n' "$(printf '\tcustom_content_virnucpro-%s' records skipped cut model)"
    printf '%s\t%s\t%s\t%s\tesm2_t6_8M_UR50D\n' first 2 1 0 second 3 0 1
)
cut -f 1,2,4,6 multiqc_virnucpro_records_plot.txt | diff - <(printf '%s\t%s\t%s\t%s\n' Sample embedded cut 'skipped: empty' first 1 0 1 second 2 1 0)
cut -f 1,2,8 multiqc_virnucpro_lengths_plot.txt | diff - <(printf '%s\t%s\t%s\n' Sample 0-49 1023-1999 first 2 0 second 2 1)
