"""Writes HTML. Text is escaped here and nowhere else: whatever is no `Html` is text."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from typing import NewType

# Markup that was made by this module.
Html = NewType("Html", str)
NOTHING = Html("")


def text(value: object) -> Html:
    """Return text with everything that HTML could read as markup escaped, and control characters replaced."""
    shown = "".join(char if char.isprintable() or char == "\n" else " " for char in str(value))
    return Html(html.escape(shown, quote=True))


def breakable(value: object) -> Html:
    """Return a name that may break after its slashes."""
    return Html(text(value).replace("/", "/<wbr>"))


def element(tag: str, *children: Html | str | None, **attributes: object) -> Html:
    """Return an element; children that are str are escaped by the caller's use of `text`.

    An attribute that is None or False is left out, True stands alone. `_` in a name of an attribute becomes `-`, and
    one at the end is dropped, so that `class_` can be given.
    """
    written = "".join(_attribute(key, value) for key, value in attributes.items())
    inner = "".join(child for child in children if child)
    return Html(f"<{tag}{written}>{inner}</{tag}>")


def join(parts: Iterable[Html | None]) -> Html:
    """Return the parts one after the other."""
    return Html("\n".join(part for part in parts if part))


def paragraph(value: object, **attributes: object) -> Html:
    """Return a paragraph of text."""
    return element("p", text(value), **attributes)


def bullets(values: Sequence[object]) -> Html:
    """Return a list of texts."""
    return element("ul", *(element("li", text(value)) for value in values))


def definitions(values: Mapping[str, object]) -> Html:
    """Return names with their values."""
    rows = (element("div", element("dt", text(key)), element("dd", text(value))) for key, value in values.items())
    return element("dl", *rows)


def details(summary: str, *children: Html | None) -> Html:
    """Return a part that is closed until the reader opens it."""
    return element("details", element("summary", text(summary)), *children)


class Table:
    """A table with a caption. The first cell of a row names it; cells of a numeric column are right-aligned."""

    def __init__(
        self, caption: str, columns: Sequence[str], numeric: Sequence[str] = (), sortable: bool = False
    ) -> None:
        """Take the caption, the titles of the columns and which of them hold numbers."""
        self._caption = caption
        self._columns = tuple(columns)
        self._numeric = frozenset(numeric)
        self._sortable = sortable
        self._rows: list[Html] = []

    def add(
        self,
        *cells: object,
        sort: Sequence[object] = (),
        data: Mapping[str, object] | None = None,
        class_: str | None = None,
    ) -> None:
        """Add a row; `sort` holds what each cell is sorted by, `data` what filters read."""
        written = []
        for index, (title, cell) in enumerate(zip(self._columns, cells, strict=True)):
            attributes: dict[str, object] = {"class_": "number" if title in self._numeric else None}
            if sort:
                value = sort[index]
                attributes["data_sort"] = "" if value is None else value
            if index == 0:
                attributes["scope"] = "row"
            written.append(
                element("th" if index == 0 else "td", breakable(cell) if index == 0 else text(cell), **attributes)
            )
        marks = {f"data_{key}": value for key, value in (data or {}).items()}
        self._rows.append(element("tr", *written, class_=class_, **marks))

    def html(self) -> Html:
        """Return the table, in a box that scrolls where it is wider than the page."""
        heads = []
        for title in self._columns:
            inner = element("button", text(title), type="button") if self._sortable and title else text(title)
            heads.append(element("th", inner, scope="col", class_="number" if title in self._numeric else None))
        table = element(
            "table",
            element("caption", text(self._caption)),
            element("thead", element("tr", *heads)),
            element("tbody", *self._rows),
            class_="sortable" if self._sortable else None,
        )
        return element("div", table, class_="wide", tabindex="0", role="group", aria_label=self._caption)


def _attribute(key: str, value: object) -> str:
    if value is None or value is False:
        return ""
    name = key.rstrip("_").replace("_", "-")
    return f" {name}" if value is True else f' {name}="{text(value)}"'
