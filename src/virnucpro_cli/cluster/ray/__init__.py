"""Packs on the GPUs (or CPUs) of a Ray cluster. Tokens travel to actors and rows travel back; the driver vouches for them in the file.

An actor that dies, with its node or without, has its packs done by the others; one is started wherever there is room, also later.
"""

from virnucpro_cli.cluster.ray.driver import Cluster

__all__ = ["Cluster"]
