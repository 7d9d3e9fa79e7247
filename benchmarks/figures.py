"""The figures of RESULTS.md."""

import math
from collections.abc import Callable, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from results import ALL_ROWS, FEW, LACKING, OURS, SHORT, THREE, Results, at, percent

# Okabe and Ito's colours, which the colour-blind tell apart.
COLORS = {"linear": "#444b55", "late fusion": "#e69f00", "cosine head": "#009e73", "paper": "#0072b2", OURS: "#d55e00"}
MARKS = dict(zip(FEW, "svD^o", strict=True))


def write_figures(r: Results, path: Path) -> None:
    """Write them next to the CSV."""
    with matplotlib.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        for name, names, size, panel in (
            ("rates", lambda data: [*r.cases[data], ALL_ROWS], (2.7, 2.5), draw_rates),
            ("matrix", lambda data: THREE if r.kinds[data] else (), (3.3, 3.1), draw_matrix),
            ("seeds", lambda data: [ALL_ROWS], (7.0, 2.9), draw_seeds),
            ("reliability", r.cases.__getitem__, (3.2, 3.3), draw_reliability),
        ):
            draw(r, path.with_name(f"accuracy_{name}.png"), names, size, panel)


def draw(r: Results, path: Path, names: Callable[[str], Sequence[str]], size: tuple[float, float], panel: Any) -> None:
    """A row for each data set, with a panel for each of the names."""
    count = max(1, *(len(names(data)) for data in r.data))
    figure = Figure(figsize=(size[0] * count, size[1] * len(r.data) + 0.4), layout="constrained")
    for row, data in zip(figure.subplots(len(r.data), count, squeeze=False), r.data, strict=True):
        for axis, name in zip_longest(row, names(data)):
            panel(r, axis, data, name) if name else axis.set_axis_off()
        row[0].set_ylabel(data.replace(", ", ",\n") + "\n" + row[0].get_ylabel())
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=5, frameon=False)
    figure.savefig(path, dpi=150)


def draw_rates(r: Results, axis: Any, data: str, case: str) -> None:
    for method in FEW:
        settings = [setting for name, setting in r.every if name == data and setting[0] in ("none", "all")]
        found = [(s[1], np.array([*r.get(data, method, s, (*s, 0.0), case).values()])) for s in settings]
        points = [(x, y.mean(), y.std(ddof=int(len(y) > 1))) for x, y in found if len(y)]
        x, middle, spread = 100 * np.array(points).reshape(-1, 3).T
        axis.plot(x, middle, color=COLORS[method], marker=MARKS[method], ms=4, label=method)
        axis.fill_between(x, middle - spread, middle + spread, color=COLORS[method], alpha=0.15, lw=0)
    axis.set(title=case, xlabel="rows that lack a modality, %", ylabel="macro-F1, %", xlim=(-4, 94))


def draw_matrix(r: Results, axis: Any, data: str, method: str) -> None:
    kinds = r.kinds[data]
    every = {m: [[r.mean(m, [(data, a, (*b, 0.0))]) for b in kinds] for a in kinds] for m in THREE}
    known = [x for rows in every.values() for row in rows for x in row if not math.isnan(x)]
    low, high = min(known, default=0.0), max(known, default=1.0)
    axis.imshow(every[method], cmap="cividis", vmin=low, vmax=high)
    for (i, j), x in np.ndenumerate(every[method]):
        axis.text(j, i, percent(x), ha="center", va="center", color="k" if 2 * x > low + high else "w")
    labels = [at(kind) for kind in kinds]
    axis.set_xticks(range(len(kinds)), labels, rotation=35, ha="right")
    axis.set_yticks(range(len(kinds)), labels)
    axis.set(title=method, xlabel="missing in test", ylabel="missing in training")


def draw_seeds(r: Results, axis: Any, data: str, _: str) -> None:
    for x, method in enumerate(r.methods):
        if values := [100 * y for y in r.get(data, method, LACKING).values()]:
            color = COLORS.get(method, "#8a8f98")
            axis.boxplot(values, positions=[x], widths=0.6, showfliers=False, medianprops={"color": color, "lw": 2})
            axis.plot([x] * len(values), values, "o", ms=4, color=color, alpha=0.7)
    axis.set_xticks(range(len(r.methods)), [SHORT.get(m, m) for m in r.methods], rotation=30, ha="right")
    axis.set(title=f"{at(LACKING)}: a point for each seed", ylabel="macro-F1, %")


def draw_reliability(r: Results, axis: Any, data: str, case: str) -> None:
    axis.plot([0, 1], [0, 1], color="#b0b4ba", lw=1)
    for method in THREE:
        bins = np.zeros((10, 3))  # How many, and sums of probability and of what is right.
        for line in r.lines.get((data, method, LACKING, (*LACKING, 0.0), case), {}).values():
            for n, p, right in (map(float, text.split(":")) for text in line["reliability"].split()):
                bins[min(int(10 * p), 9)] += n, n * p, n * right
        count, said, right = bins[bins[:, 0] > 0].T
        axis.plot(said / count, right / count, color=COLORS[method], marker=MARKS[method], ms=4, label=method)
    errors = [f"{m} {percent(r.mean(m, [(data, LACKING, (*LACKING, 0.0), case)], 'ece'))}" for m in THREE]
    axis.set_title(f"{case}\nECE: {', '.join(errors)}", fontsize=8)
    axis.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), aspect="equal", xlabel="probability", ylabel="share that is right")
