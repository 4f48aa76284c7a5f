"""Writes report.json, report.md and report.html, reads report.json, and prints a report on the terminal."""

from mm_edge.report.files import PAGE, REPORT_FILES, read_report, save_page, write_report
from mm_edge.report.terminal import print_paths, print_report

__all__ = ["PAGE", "REPORT_FILES", "print_paths", "print_report", "read_report", "save_page", "write_report"]
