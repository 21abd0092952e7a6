"""How figures look, in light and in dark surroundings, and how they become files."""

from __future__ import annotations

import io
from typing import Any

from matplotlib.figure import Figure
from matplotlib.rcsetup import cycler

# A grey that can be read on a white page and on a dark one; backgrounds are transparent.
GREY = "#768390"
# Okabe and Ito's colours: told apart by people who see fewer of them
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_INKED = ("axes.edgecolor", "axes.labelcolor", "text.color", "xtick.color", "ytick.color")
STYLE: dict[str, Any] = {
    **dict.fromkeys(_INKED, GREY),
    **dict.fromkeys(("axes.facecolor", "figure.facecolor"), "none"),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon"), False),
    "axes.prop_cycle": cycler(color=COLOURS),
    "font.size": 9.5,
    "grid.alpha": 0.25,
}


def titled(figure: Figure, title: str, size: float = 10) -> Figure:
    """The figure with a title at its left edge. A dollar sign stays one."""
    figure.suptitle(title.replace("$", r"\$"), x=0.01, ha="left", size=size, weight="bold")
    return figure


def to_png(figure: Figure, dpi: int = 130) -> bytes:
    """The figure as PNG bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    return buffer.getvalue()
