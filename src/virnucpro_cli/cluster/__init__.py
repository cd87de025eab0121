"""A run over several machines: shards merged and counted, and a Ray cluster."""
