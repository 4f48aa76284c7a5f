"""mm-edge's command line with the closed form's first step alone: candidates are screened and not walked.

The walk of a detector takes minutes a candidate. The benchmarks that offer --no-walk run this file in place of
`python -m mm_edge.cli`.
"""

from __future__ import annotations

from typing import Any

from mm_edge.cli.main import main
from mm_edge.run import pipeline


def leave_as_screened(job: Any, networks: Any, settings: Any, plans: Any, candidates: Any, dense: Any) -> list[Any]:
    """Stand in for the stage that walks the front."""
    return list(candidates)


if __name__ == "__main__":
    pipeline.walk_front = leave_as_screened
    main(prog_name="mm-edge")
