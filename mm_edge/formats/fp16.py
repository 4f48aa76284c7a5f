"""A deployed fp32 model to fp16: weights and arithmetic in half precision, inputs and outputs in fp32."""

from __future__ import annotations

from pathlib import Path

from mm_edge.bench.target import Target
from mm_edge.errors import JobError, cause_line
from mm_edge.formats.conversion import CalibrationImages, QuantReport, require_data_type
from mm_edge.formats.int8_graph import read_ready
from mm_edge.progress import Advance
from mm_edge.runtime import open_session
from mm_edge.store import write_atomically


def convert_fp16(
    model: Path,
    out: Path,
    target: Target,
    images: CalibrationImages | None = None,
    threads: int = 1,
    advance: Advance | None = None,
) -> QuantReport:
    """Write `model` with fp16 weights and arithmetic; inputs and outputs stay fp32.

    Raises:
        UsageError: the target does not list fp16; the message says why and what to use.
        JobError: the conversion fails.
    """
    require_data_type(target, "fp16")
    from onnxruntime.transformers import float16  # slow to import, and needed here only

    try:
        made = float16.convert_float_to_float16(read_ready(model), keep_io_types=True)
        content: bytes = made.SerializeToString()
        open_session(content)
    except Exception as error:  # the converter's exceptions have no common base
        raise JobError(f"the model cannot be converted to fp16: {cause_line(error)}") from error
    write_atomically(out, content)
    return QuantReport("fp16", "cast", len(content))
