"""Bars of throughput and of where the time goes (extra `plots`)."""

from pathlib import Path

from virnucpro_cli.report import RunReport


def save(found: RunReport, path: str) -> None:
    """Write a picture of the report's tables; the suffix says its kind."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = [(f"{row['mode']}\n{row['workload']}", row["tokens/s"]) for row in found.tables.get("Throughput", [])]
    rows += [(row["peer"], row["tokens/s"]) for row in found.tables.get("Peers", [])]
    stages = found.tables.get("Stages (s)", [])
    figure, axes = plt.subplots(1, 2, figsize=(13, 0.42 * max(len(rows), 6) + 1.6), width_ratios=(3, 2))
    names, rates = zip(*reversed(rows), strict=True)
    colours = ["#2a6f97" if name.startswith("packed") else "#a9a9a9" for name in names]
    bars = axes[0].barh(range(len(rows)), rates, color=colours)
    axes[0].bar_label(bars, labels=[f"{rate:,.0f}" for rate in rates], padding=3, fontsize=8)
    axes[0].set_yticks(range(len(rows)), names, fontsize=8)
    axes[0].set_xlabel("tokens per second")
    axes[0].margins(x=0.15)
    if stages:
        left = [0.0] * len(stages)
        for name in [key for key in stages[0] if key != "workload"]:
            widths = [row[name] for row in stages]
            axes[1].barh([row["workload"] for row in stages], widths, left=left, label=name)
            left = [a + b for a, b in zip(left, widths, strict=True)]
        axes[1].set_xlabel("seconds of each stage on its own")
        axes[1].legend(fontsize=7, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.18))
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    about = found.environment
    figure.suptitle(f"virnucpro {about['virnucpro']}: {about['model']}, {about['dtype']}, {about['device']}")
    figure.tight_layout()
    said = {".png": "Software", ".svg": "Creator", ".pdf": "Creator"}.get(Path(path).suffix.lower())
    figure.savefig(path, dpi=150, metadata={said: "virnucpro"} if said else None)
    plt.close(figure)
