"""Pictures of a `Routing`, plots, tables and the report. Draws without a display and leaves pyplot alone."""

from narrows.visualize.canvas import save
from narrows.visualize.overlays import gallery, overlay
from narrows.visualize.report import Report
from narrows.visualize.tables import Cell, text_table
from narrows.visualize.tradeoff import ParetoPoint, pareto, pareto_front

__all__ = [
    "Cell",
    "ParetoPoint",
    "Report",
    "gallery",
    "overlay",
    "pareto",
    "pareto_front",
    "save",
    "text_table",
]
