"""Functions that a registry names without importing them.

The command line reads the registries for its help and its errors, and must not import PyTorch for that.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

from mm_edge.errors import JobError


@dataclass(frozen=True)
class Deferred:
    """A function that is imported when it is called.

    Attributes:
        path: where it is, "package.module:function".
    """

    path: str

    def __call__(self, *args: Any, **options: Any) -> Any:
        """Call the function.

        Raises:
            JobError: there is no such module or function.
        """
        module, _, name = self.path.partition(":")
        try:
            function = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            raise JobError(f"'{self.path}', which a registry names, cannot be imported: {error}") from error
        return function(*args, **options)
