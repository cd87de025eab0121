"""Runs with a nucleotide half that end early."""

from collections.abc import Callable
from typing import Any

import pytest

from virnucpro_cli.engine import placer
from virnucpro_cli.errors import Stopped


def stopped_in_the_half(embed: Callable[..., object], **options: Any) -> None:
    """A run that ends when the proteins and some of the slices are there."""
    with pytest.MonkeyPatch.context() as patch:
        whole, placed = placer.Placer.place, 0

        def place(self: Any, rows: Any) -> None:
            nonlocal placed
            whole(self, rows)
            if self.file.half:
                placed += 1
                if placed == 2:
                    raise Stopped(15)

        patch.setattr(placer.Placer, "place", place)
        with pytest.raises(Stopped):
            embed(**options)
