"""A chart of what a device holds."""

import io
from pathlib import Path

from .report import CATEGORIES, MemoryPlan, unit_of


# The palette of Okabe and Ito, which color-blind readers can tell apart. Gradients are
# gray, because they only exist during a step.
_COLORS = {
    "weights": "#0072B2",
    "corrections": "#56B4E9",
    "master_weights": "#56B4E9",
    "moments": "#E69F00",
    "scales": "#D55E00",
    "accumulators": "#CC79A7",
    "averages": "#CC79A7",
    "frozen": "#009E73",
    "other": "#F0E442",
    "gradients": "#BBBBBB",
}
_HATCHES = {"master_weights": "///", "averages": "///"}


def draw(
    plan: MemoryPlan, title: str, path: Path, device_memory: int | None = None
) -> None:
    """Draws a stacked bar for each column of the table. The suffix of the file decides
    its format."""
    import matplotlib
    from matplotlib.figure import Figure

    # Columns with unknown gradients have no bar.
    columns = {k: x for k, x in plan.columns().items() if x.total is not None}
    totals = [x.total or 0 for x in columns.values()]
    unit, name = unit_of(max(totals))
    with matplotlib.rc_context({"font.size": 9, "hatch.linewidth": 0.5}):
        figure = Figure(figsize=(9.5, 0.9 + 0.6 * len(columns)), layout="constrained")
        axes = figure.subplots()
        ends = [0.0] * len(columns)
        for category in CATEGORIES:
            sizes = [getattr(x, category) / unit for x in columns.values()]
            # Would be less than a pixel wide.
            if max(sizes) * unit < max(totals) / 2000:
                continue
            axes.barh(
                list(columns),
                sizes,
                left=ends,
                height=0.6,
                label=category.replace("_", " "),
                color=_COLORS[category],
                hatch=_HATCHES.get(category),
            )
            ends = [end + size for end, size in zip(ends, sizes, strict=True)]
        for i, (end, x) in enumerate(zip(ends, columns.values(), strict=True)):
            text = f"{end:.3g} {name} ({x.bytes_per_parameter:.3g} B/parameter)"
            # On white, to be readable on the line of the device's memory.
            box = {"facecolor": "white", "edgecolor": "none", "pad": 1}
            axes.text(end + max(totals) / unit / 50, i, text, va="center", bbox=box)
        # With room for the text after the longest bar.
        limit = 1.5 * max(ends)
        if device_memory is not None and device_memory / unit < 4 * limit:
            limit = max(limit, 1.1 * device_memory / unit)
            label = f"memory of a device, {device_memory / unit:.3g} {name}"
            axes.axvline(device_memory / unit, color="black", ls="--", label=label)
        axes.set_xlim(0, limit)
        axes.invert_yaxis()
        axes.set_xlabel(f"{name} on each device")
        axes.spines[["top", "right"]].set_visible(False)
        figure.suptitle(title)
        figure.legend(loc="outside right center", frameon=False, fontsize="small")
        picture = io.BytesIO()
        figure.savefig(picture, format=path.suffix[1:], dpi=150)
    path.write_bytes(picture.getvalue())
