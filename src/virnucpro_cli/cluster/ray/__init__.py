"""Packs on the devices of a Ray cluster. Tokens travel to actors and rows back; the driver writes and marks them."""
