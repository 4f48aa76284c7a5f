"""Writes report.json and report.md, reads report.json, and prints a report on the terminal."""

from mm_edge.report.files import read_report, write_report
from mm_edge.report.terminal import print_report

__all__ = ["print_report", "read_report", "write_report"]
