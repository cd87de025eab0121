"""VirNucPro's own front end: contigs in overlapping chunks, and of each the frames without a stop codon."""

from typing import Any

from virnucpro_cli.config import EmbedConfig
from virnucpro_cli.features.contigs.codons import STOP, Genes, on_contig, record, residues_at, reverse_complement


def settings(config: EmbedConfig) -> dict[str, Any]:
    return {"version": "2", "chunk": config.chunk}


def chunks(n: int, size: int) -> list[tuple[int, int]]:
    """[start, stop) of the chunks of a contig of n bases: ceil(n / size) of `size` bases, the last often shorter.

    Their surplus over the contig is divided by their number. Each chunk after the first begins so many bases (the
    integer part) before the end of the chunk before it. The first ones begin one base earlier, as many as bases remain.
    There may be more bases left than chunks; the last chunk ends at the end of the contig all the same.
    A contig shorter than `size` is one chunk. These are the chunks of VirNucPro's own program, for all lengths tried.
    """
    count = -(-n // size)
    each, rest = divmod(count * size - n, max(count, 1))
    starts = [k * (size - each) - min(k, each + rest) for k in range(count)]
    return [(start, min(start + size, n)) for start in starts]


GAPS = "their codons yield no residue, and what lies on both sides of one is joined, as by VirNucPro's own program"


class Caller:
    """Names are `CONTIG_chunk_K` with K from 1, then F1, F2, F3 or R1, R2, R3 (of the chunk's reverse complement).

    The slice behind a frame of p residues is its first 3 p + 1 bases, as far as the chunk goes.
    Standard genetic code; a codon with an ambiguous base yields no residue; a frame that holds a stop codon, even the
    last, is dropped. Chosen here, as that description leaves it open: lower case counts as upper case and U as T; a
    frame without any residue is dropped; coordinates are of all codons of the frame, with those that yield nothing.
    """

    def __init__(self, config: EmbedConfig):
        self._size, self._wants_slices = config.chunk, config.nucleotide

    def __call__(self, name: str, sequence: bytes) -> Genes:
        n, texts, slices, places = len(sequence), [], [], []
        forwards = sequence, residues_at(sequence).tobytes()
        backwards = (bases := reverse_complement(sequence)), residues_at(bases).tobytes()
        for number, (start, stop) in enumerate(chunks(n, self._size), start=1):
            strands = (("F", 1, *forwards, start, stop), ("R", -1, *backwards, n - stop, n - start))
            for letter, strand, bases, every, a, b in strands:
                for frame in range(3):
                    codons = every[a + frame : max(b - 2, 0) : 3]
                    residues = codons.replace(b"X", b"")
                    if STOP in codons or not residues:
                        continue
                    begin, end = on_contig(a + frame + 1, a + frame + 3 * len(codons), strand, n)
                    named = f"{name}_chunk_{number}{letter}{frame + 1}", begin, end, strand
                    texts.append(record(*named, residues))
                    if self._wants_slices:
                        slices.append(record(*named, bases[a + frame : min(a + frame + 3 * len(residues) + 1, b)]))
                    places.append((begin, end, strand))
        return Genes.of(b"".join(texts), places, b"".join(slices))
