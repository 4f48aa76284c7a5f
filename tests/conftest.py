"""Importing mm_edge first makes timm importable in every test module, whatever the order of its imports."""

import mm_edge  # noqa: F401
