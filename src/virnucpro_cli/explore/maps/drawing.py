"""A map as a picture (matplotlib), as a page to look around in (plotly), or as a table.

Colours are told apart by people who do not see all of them: Okabe and Ito's for classes
(https://jfly.uni-koeln.de/color/), each in three shapes; viridis for numbers.
"""

import html
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from virnucpro_cli import tables
from virnucpro_cli.errors import counted
from virnucpro_cli.explore.maps.colour import LENGTH, MOST_CLASSES, NO_VALUE, Classes, Colour, Scale
from virnucpro_cli.explore.maps.projection import Projection

HUES = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#000000")
SHAPES = (("o", "circle"), ("^", "triangle-up"), ("s", "square"))
GREY = "#C8C8C8"
MOST_DRAWN_AS_SVG = 10_000
"""Points of a page beyond which WebGL draws them."""


@dataclass(frozen=True)
class Map:
    """All that is drawn of n points. rows int64 [n]: numbers of the records; caption: lines of what the map shows."""

    projection: Projection
    colour: Colour
    rows: NDArray[np.int64]
    names: list[str]
    lengths: NDArray[np.int32]
    title: str
    caption: list[str]
    seed: int

    @property
    def words(self) -> list[str] | None:
        """The value of each point's colour; None if that is the length, which is shown anyway."""
        return None if self.colour.title == LENGTH else self.colour.words()


def _classes(colour: Classes) -> Iterator[tuple[str, NDArray[np.int64], str, tuple[str, str], int]]:
    """(label, points, colour, shape, place in the legend) of each class, in the order of drawing."""
    for label, points, rank in colour.parts:
        if rank < 0:
            yield label, points, GREY, SHAPES[0], MOST_CLASSES + 2 + rank
        else:
            yield label, points, HUES[rank % len(HUES)], SHAPES[rank // len(HUES)], rank


def _in_order(colour: Scale, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The points that have a value, shuffled so that no length lies on top, and those that have none."""
    is_known = np.isfinite(colour.values)
    return np.random.default_rng(seed).permutation(np.flatnonzero(is_known)), np.flatnonzero(~is_known)


def _short(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:28]}...{text[-9:]}"


# --- a picture -------------------------------------------------------------------------------------------------------


def picture(shown: Map, file: IO[bytes], kind: str) -> None:
    """kind: png, pdf, svg or jpg."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "virnucpro"
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 7), layout="constrained")
    size = float(np.clip(30_000 / len(shown.names), 3, 36))
    style: dict[str, Any] = {"s": size, "linewidths": 0, "alpha": 0.85, "rasterized": True}
    if isinstance(shown.colour, Scale):
        _scatter_on_scale(axes, shown, shown.colour, style)
    else:
        _scatter_in_classes(axes, shown, shown.colour, style)
    axes.set_aspect("equal", adjustable="datalim")
    if shown.projection.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.set(xlabel=shown.projection.axes[0], ylabel=shown.projection.axes[1])
    else:
        axes.spines[:].set_visible(False)
        axes.set(xticks=[], yticks=[])
    axes.set_title(_plain(shown.title), loc="left", fontsize=12)
    figure.supxlabel(_plain("\n".join(shown.caption)), x=0.02, ha="left", fontsize=7.5, color="#444444")
    figure.savefig(file, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None)
    plt.close(figure)


def _scatter_on_scale(axes: Any, shown: Map, colour: Scale, style: dict[str, Any]) -> None:
    from matplotlib.colors import LogNorm, Normalize
    from matplotlib.ticker import FuncFormatter, LogLocator

    x, y = shown.projection.points.T
    order, unknown = _in_order(colour, shown.seed)
    axes.scatter(x[unknown], y[unknown], c=GREY, **style)
    values = colour.values[order]
    norm = (LogNorm if colour.logarithmic else Normalize)(values.min(), values.max())
    drawn = axes.scatter(x[order], y[order], c=values, cmap="viridis", norm=norm, **style)
    bar = axes.figure.colorbar(drawn, ax=axes, shrink=0.6, label=_plain(colour.title))
    if colour.logarithmic:
        bar.ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        bar.ax.minorticks_off()


def _scatter_in_classes(axes: Any, shown: Map, colour: Classes, style: dict[str, Any]) -> None:
    x, y = shown.projection.points.T
    drawn = {}
    for label, points, hue, (shape, _), place in _classes(colour):
        drawn[place] = axes.scatter(x[points], y[points], c=hue, marker=shape, label=_plain(_short(label)), **style)
    legend = axes.legend(
        handles=[drawn[place] for place in sorted(drawn)], title=_plain(colour.title), fontsize=8, loc="center left",
        bbox_to_anchor=(1.01, 0.5), frameon=False,
    )  # fmt: skip
    for handle in legend.legend_handles:
        handle.set_sizes([30])


def _plain(text: str) -> str:
    """For matplotlib, to which two dollars are mathematics."""
    return text.replace("$", r"\$")


# --- a page ----------------------------------------------------------------------------------------------------------


def page(shown: Map, file: IO[bytes]) -> None:
    """One HTML file that needs no network: plotly.js is in it."""
    from plotly import graph_objects as go

    figure = go.Figure(_traces(shown))
    x, y = shown.projection.axes or ("", "")
    axis = {"zeroline": False, "showticklabels": x != "", "showgrid": x != "", "gridcolor": "#EEEEEE"}
    figure.update_layout(
        template="plotly_white", hovermode="closest", showlegend=isinstance(shown.colour, Classes),
        legend={"title": {"text": html.escape(shown.colour.title)}, "itemsizing": "constant"},
        title={"text": html.escape(shown.title), "x": 0.02}, margin={"t": 60, "b": 110, "l": 60},
        xaxis={"title": {"text": x}, **axis}, yaxis={"title": {"text": y}, "scaleanchor": "x", **axis},
        annotations=[{
            "text": "<br>".join(html.escape(line) for line in shown.caption), "showarrow": False, "xref": "paper",
            "yref": "paper", "x": 0, "y": 0, "xanchor": "left", "yanchor": "top", "yshift": -45, "align": "left",
            "font": {"size": 11, "color": "#444444"},
        }],
    )  # fmt: skip
    config = {"displaylogo": False, "scrollZoom": True, "responsive": True}
    text = figure.to_html(include_plotlyjs=True, div_id="map", config=config, default_height="100vh")
    head = f"<head><title>{html.escape(shown.title)}</title><style>body {{margin: 0; overflow: hidden}}</style>"
    file.write(text.replace("<head>", head, 1).encode())


def _traces(shown: Map) -> list[Any]:
    """The points of a page: those of each class, or those with a value and those without."""
    from plotly import graph_objects as go

    x, y = shown.projection.points.T.astype(np.float32)
    kind = go.Scattergl if len(x) > MOST_DRAWN_AS_SVG else go.Scatter
    size, hover = float(np.clip(300 / len(x) ** 0.5, 3, 8)), np.array(_hover(shown), object)

    def dots(points: NDArray[np.int64], name: str, place: int = 0, **marker: Any) -> Any:
        """Points (int64 [m]) as a trace."""
        return kind(
            x=x[points], y=y[points], mode="markers", name=html.escape(name), hovertext=hover[points].tolist(),
            hoverinfo="text", legendrank=place, marker={"size": size, "opacity": 0.85, **marker},
        )  # fmt: skip

    if isinstance(shown.colour, Classes):
        return [
            dots(points, _short(label), place, color=hue, symbol=shape)
            for label, points, hue, (_, shape), place in _classes(shown.colour)
        ]
    title, (order, unknown) = html.escape(shown.colour.title), _in_order(shown.colour, shown.seed)
    bar: dict[str, Any] = {"title": {"text": title}, "len": 0.6}
    drawn = shown.colour.values[order]
    if shown.colour.logarithmic:
        ticks = _ticks(drawn.min(), drawn.max())
        bar |= {"tickvals": np.log10(ticks), "ticktext": [f"{tick:,.0f}" for tick in ticks]}
        drawn = np.log10(drawn)
    traces = [dots(unknown, NO_VALUE, color=GREY)] if len(unknown) else []
    return [*traces, dots(order, title, color=drawn, colorscale="Viridis", colorbar=bar, showscale=True)]


def _hover(shown: Map) -> list[str]:
    """The words over each point of a page."""
    lines = [
        f"<b>{html.escape(name)}</b><br>{counted(length, 'residue')}"
        for name, length in zip(shown.names, shown.lengths.tolist(), strict=True)
    ]
    if shown.words is None:
        return lines
    title = html.escape(shown.colour.title)
    return [f"{line}<br>{title}: {html.escape(word)}" for line, word in zip(lines, shown.words, strict=True)]


def _ticks(least: float, most: float) -> list[float]:
    """1, 2 and 5 times powers of ten within the range; its ends if there are none."""
    ticks = [digit * 10.0**power for power in range(9) for digit in (1, 2, 5)]
    return [tick for tick in ticks if least <= tick <= most] or [least, most]


# --- a table, and the choice -----------------------------------------------------------------------------------------


def table(shown: Map, file: IO[bytes]) -> None:
    """A line for each point: name, record, x, y, length, and the value of its colour unless that is the length."""
    more = [[]] * len(shown.names) if shown.words is None else [[word] for word in shown.words]
    with tables.written_to(file) as lines:
        lines.writerow(["name", "record", "x", "y", "length", *([shown.colour.title] if more[0] else [])])
        for i, (x, y) in enumerate(shown.projection.points.tolist()):
            lines.writerow([shown.names[i], shown.rows[i], f"{x:.6g}", f"{y:.6g}", shown.lengths[i], *more[i]])


def save(shown: Map, file: IO[bytes], path: Path) -> None:
    """Draw what the suffix of `path` says."""
    kind = path.suffix.lower()
    if kind == ".html":
        page(shown, file)
    elif kind == ".tsv":
        table(shown, file)
    else:
        picture(shown, file, kind[1:])
