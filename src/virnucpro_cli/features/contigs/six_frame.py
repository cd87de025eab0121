"""Every open reading frame of the six frames, from stop to stop. No model of a gene: none is missed, most are none."""

from typing import Any

import numpy as np

from virnucpro_cli.config import EmbedConfig
from virnucpro_cli.features.contigs.codons import (
    STOP,
    Genes,
    X,
    gaps,
    on_contig,
    record,
    residues_at,
    reverse_complement,
)  # fmt: skip


def settings(config: EmbedConfig) -> dict[str, Any]:
    return {"version": "2", "min_aa": config.min_aa}


GAPS = "no frame is read in or across them"


class Caller:
    """Standard genetic code. A frame is cut at stop codons, at gaps (`codons.gaps`) and at the ends of the contig.

    An ORF, which may be partial, has at least `--min-aa` residues besides X. A codon with an ambiguous base becomes X.
    Frames are F1, F2, F3 from the contig's first base, and R1, R2, R3 from the first base of its reverse complement.
    Names are `CONTIG_F1_begin_end`; coordinates are of the residues alone, without the stop codon.
    ORFs come frame by frame, each in its reading direction.
    """

    def __init__(self, config: EmbedConfig):
        self._least = config.min_aa

    def __call__(self, name: str, sequence: bytes) -> Genes:
        texts, places = [], []
        for letter, strand, bases in (("F", 1, sequence), ("R", -1, reverse_complement(sequence))):
            every = residues_at(bases)
            for start, stop in gaps(bases):
                every[max(start - 2, 0) : stop] = STOP
            for frame in range(3):
                residues = every[frame::3]
                stops = np.flatnonzero(residues == STOP)
                first, last = np.append(0, stops + 1), np.append(stops, len(residues))
                known = np.append(0, np.cumsum(residues != X))
                long = known[last] - known[first] >= self._least
                whole = residues.tobytes()
                for a, b in zip(first[long].tolist(), last[long].tolist(), strict=True):
                    begin, end = on_contig(frame + 3 * a + 1, frame + 3 * b, strand, len(sequence))
                    texts.append(record(f"{name}_{letter}{frame + 1}_{begin}_{end}", begin, end, strand, whole[a:b]))
                    places.append((begin, end, strand))
        return Genes.of(b"".join(texts), places)
