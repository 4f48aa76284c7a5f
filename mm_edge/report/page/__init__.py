"""report.html: one file that shows a report, opens anywhere and asks no network for anything."""

from mm_edge.report.page.document import write_page

__all__ = ["write_page"]
