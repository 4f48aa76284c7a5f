"""Writes report.json, report.md and report.html, reads report.json, and prints a report on the terminal."""

from mm_edge.report.files import REPORT_FILES, read_report, write_report
from mm_edge.report.terminal import print_report

__all__ = ["REPORT_FILES", "print_report", "read_report", "write_report"]
