"""Additions to a run: contigs, contacts, groups, a cache, quality columns. No feature imports another."""
