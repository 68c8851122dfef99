"""Style of the report's figures: matplotlib drawings as inline SVG whose colours are the page's CSS variables.

A figure is drawn in placeholder colours, which are then replaced by `var(--ink)`, `var(--m1)`, ...: the same drawing
suits a dark and a light page, and its text has the page's font. A model has the same colour everywhere.
"""

import io
import re
from collections.abc import Callable
from dataclasses import dataclass

from markupsafe import Markup, escape
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK, MUTED, RULE, PAPER = "#0000f1", "#0000f2", "#0000f3", "#0000f4"
MODEL_COLORS = ("#0000a1", "#0000a2", "#0000a3", "#0000a4", "#0000a5", "#0000a6")
CSS_VARIABLES = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    RULE: "var(--rule)",
    PAPER: "var(--paper)",
    **{color: f"var(--m{number})" for number, color in enumerate(MODEL_COLORS, start=1)},
}
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "srlm",
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.handlelength": 1.2,
    "lines.linewidth": 1.6,
    "lines.markersize": 6,
}


@dataclass(frozen=True, slots=True)
class Plot:
    """One figure: the message in its title, the drawing, and a note on how to read it."""

    title: str
    svg: Markup
    note: str


def model_color(number: int) -> str:
    """Return the placeholder colour of M1, M2, ...; they repeat after the sixth."""
    return MODEL_COLORS[(number - 1) % len(MODEL_COLORS)]


def legend(axes: Axes, columns: int = 6) -> None:
    """Put the legend above the drawing, in one line if it fits."""
    axes.legend(
        loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=columns, fontsize=8, borderpad=0, columnspacing=1.2
    )


def plot(name: str, title: str, note: str, paint: Callable[[Axes], None]) -> Plot:
    """Draw one figure; `name` makes its ids unique in the page."""
    with rc_context(STYLE):
        figure = Figure(figsize=(5.0, 3.1), layout="constrained")
        paint(figure.add_subplot())
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    return Plot(title, _for_page(file.getvalue(), name, title), note)


def _for_page(svg: str, name: str, title: str) -> Markup:
    """Return the drawing as a part of the page: without prolog and size, with unique ids and the page's colours."""
    head, body = svg[svg.index("<svg") :].split(">", 1)
    view_box = re.search(r'viewBox="[^"]*"', head)
    assert view_box is not None, "matplotlib's SVG has no viewBox"
    body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", body, flags=re.DOTALL)
    body = re.sub(r'<g id="[^"]*"', "<g", body)
    body = re.sub(r' id="', f' id="{name}-', body)
    body = body.replace('xlink:href="#', f'href="#{name}-').replace("url(#", f"url(#{name}-")
    for color, variable in CSS_VARIABLES.items():
        body = body.replace(color, variable)
    return Markup(f'<svg {view_box.group()} role="img" aria-label="{escape(title)}">{body}')
