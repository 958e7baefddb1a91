"""Pictures of a `Routing`, plots, tables and the report. Draws without a display and leaves pyplot alone."""

from narrows.visualize.canvas import save
from narrows.visualize.objects import found_objects
from narrows.visualize.overlays import describe, gallery, overlay
from narrows.visualize.plots import ParetoPoint, curves, pareto, pareto_front
from narrows.visualize.report import Report
from narrows.visualize.segments import segmentations
from narrows.visualize.tables import Cell, text_table
from narrows.visualize.text import reading

__all__ = [
    "Cell",
    "ParetoPoint",
    "Report",
    "curves",
    "describe",
    "found_objects",
    "gallery",
    "overlay",
    "pareto",
    "pareto_front",
    "reading",
    "save",
    "segmentations",
    "text_table",
]
