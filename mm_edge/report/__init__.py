"""report.json, and the same for people: Markdown and a terminal table. Nothing here measures."""

from mm_edge.report.files import read_report, write_report
from mm_edge.report.terminal import print_report

__all__ = ["print_report", "read_report", "write_report"]
