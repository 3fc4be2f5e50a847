"""Draws docs/meshes.png: which mesh axis cuts which dimension of which array, by the default rules."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from research.core.mesh import RULES

COLORS = {
    "data": "#1f77b4", "fsdp": "#ff7f0e", "tensor": "#2ca02c", "sequence": "#9467bd", "pipeline": "#d62728",
    "population": "#8c564b",
}  # fmt: skip
# title, then the logical names of depth (a stack of sheets, or none), rows and columns
ARRAYS = (
    ("tokens", None, "batch", "length"),
    ("activations", None, "batch", "length"),
    ("attention heads", "heads", "batch", "length"),
    ("embedding table", None, "vocab", "embed"),
    ("query, key, value", "layers", "embed", "heads"),
    ("attention output", "layers", "heads", "embed"),
    ("MLP up", "layers", "embed", "mlp"),
    ("a population's MLP", "population", "embed", "mlp"),
)


def cuts(ax: Axes, name: str, corner: tuple[float, float], along_x: bool) -> None:
    """Lines across the unit square, one color a mesh axis that the dimension is laid over, each axis cutting anew in halves."""
    x, y = corner
    for level, axis in enumerate(RULES.get(name, ())):
        for k in range(2**level):
            at = (2 * k + 1) / 2 ** (level + 1)
            line = ([x + at, x + at], [y, y + 1]) if along_x else ([x, x + 1], [y + at, y + at])
            ax.plot(*line, color=COLORS[axis], linewidth=2.5)


def draw(ax: Axes, title: str, depth: str | None, rows: str, columns: str) -> None:
    sheets = 1 if depth is None else 4
    over = RULES.get(depth, ()) if depth else ()
    for sheet in reversed(range(sheets)):
        corner = (0.13 * sheet, 0.13 * sheet)
        edge = COLORS[over[0]] if over and sheet >= sheets // 2 else "black"
        ax.add_patch(Rectangle(corner, 1, 1, facecolor="white", edgecolor=edge, linewidth=2.5 if edge != "black" else 1))
    cuts(ax, rows, (0, 0), along_x=False)
    cuts(ax, columns, (0, 0), along_x=True)
    ax.text(-0.06, 0.5, rows, rotation=90, ha="center", va="center")
    ax.text(0.5, -0.09, columns, ha="center", va="center")
    if depth:
        ax.text(1.24, 0.12, depth, rotation=45, ha="center", va="center")
    ax.set(title=title, xlim=(-0.15, 1.5), ylim=(-0.2, 1.5), aspect="equal")
    ax.axis("off")


def main() -> None:
    figure, axes = plt.subplots(2, 4, figsize=(11, 6))
    for ax, array in zip(axes.flat, ARRAYS, strict=True):
        draw(ax, *array)
    handles = [plt.Line2D([], [], color=color, linewidth=2.5, label=axis) for axis, color in COLORS.items()]
    figure.legend(handles=handles, loc="lower center", ncols=len(handles), frameon=False)
    figure.savefig(Path(__file__).parents[1] / "docs" / "meshes.png", dpi=100, bbox_inches="tight")


if __name__ == "__main__":
    main()
