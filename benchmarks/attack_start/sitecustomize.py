"""Python imports this by its name before anything else; it starts the watch of benchmarks/attacks.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from attack_watch import watch_from_environment

sys.path.pop(0)
watch_from_environment()
