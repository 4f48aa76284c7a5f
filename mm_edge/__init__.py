"""mm-edge: a trained vision model in, a measurably faster model on a named edge device out."""

from mm_edge.compat import make_timm_importable

make_timm_importable()

__version__ = "0.1.0"
