"""FASTA files to a record table: one vectorised pass over the bytes, which also applies the reader's policies.

A record's number is its identity. Names, and the text of single records, are read lazily by offset.
"""

from virnucpro_cli.fasta.indexing import NUCLEOTIDE_SHARE, How, Inputs, index, index_of, is_large, tokens_of
from virnucpro_cli.fasta.reading import Source, decompressed, lacks_end, open_sources
from virnucpro_cli.fasta.table import RecordTable
