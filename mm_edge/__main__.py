"""`python -m mm_edge`: the command line, where the installed script is not on the path."""

from __future__ import annotations

import sys

from mm_edge.cli.main import main

sys.exit(main())
