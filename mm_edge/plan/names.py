"""Names that users give in a comma-separated list, checked against a registry."""

from __future__ import annotations

from collections.abc import Iterable

from mm_edge.errors import UsageError, unknown_name

ALL = "all"


def parse_names(kind: str, text: str, allowed: Iterable[str], *, all_allowed: bool = False) -> tuple[str, ...]:
    """Return the names in a comma-separated list, each once; every allowed name for "all" where `all_allowed`.

    `kind` says in errors what is named, "signal" for instance.

    Raises:
        UsageError: a name is unknown or the list is empty.
    """
    known = list(allowed)
    names = tuple(dict.fromkeys(name for part in text.split(",") if (name := part.strip())))
    if all_allowed and names == (ALL,):
        return tuple(known)
    if not names:
        listed = [ALL, *known] if all_allowed else known
        raise UsageError(f"no {kind} given; allowed: {', '.join(listed)}")
    for name in names:
        if name not in known:
            raise UsageError(unknown_name(kind, name, known))
    return names
