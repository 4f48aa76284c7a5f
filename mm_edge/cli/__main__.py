"""`python -m mm_edge.cli`: the command line, where the installed script is not on the path."""

from __future__ import annotations

from mm_edge.cli.main import main

main(prog_name="mm-edge")
