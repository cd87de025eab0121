"""Parts of import: the contents of a source, their match with a FASTA, and the file that follows from both."""
