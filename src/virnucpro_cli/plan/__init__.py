"""Integers only: what becomes of each record, which pack it goes to, which shard it belongs to."""
