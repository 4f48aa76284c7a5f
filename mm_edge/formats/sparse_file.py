"""Unstructured zeros on disk: the smallest form of a model that still loads, and the bytes it saves.

Zeros make neither a dense kernel faster nor an .onnx smaller, but they compress well. Three forms are tried:

    onnx     as it is
    sparse   tensors for which it is smaller as ONNX sparse initialisers: a value of 4 bytes and an index of 8 for each
             non-zero, so only beyond a sparsity of 2/3; loads as it is
    xz       the .onnx in an LZMA container; loads after unpacking in memory (`read_stored`)

A dense model compresses too, so the saving is stated against the dense model in the same form.
"""

from __future__ import annotations

import lzma
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from mm_edge.errors import ModelError
from mm_edge.runtime import FATAL, open_session
from mm_edge.store import write_atomically

SUFFIXES = {"onnx": ".onnx", "sparse": ".sparse.onnx", "xz": ".onnx.xz"}
INDEX_BYTES, VALUE_BYTES = 8, 4
SMALLEST_TENSOR = 1024
# Within 3 % of the default preset on sparse weights at a twentieth of its time, and unpacks with a 256 KiB dictionary.
PRESET = 0


@dataclass(frozen=True)
class StoredFile:
    """The smallest form found: `sizes` and `dense_sizes` in bytes by form, for the model and its dense counterpart."""

    path: Path
    form: str
    file_bytes: int
    sizes: dict[str, int]
    dense_sizes: dict[str, int]

    @property
    def saving(self) -> float:
        """Return the fraction of the dense model's bytes saved, both in the form chosen."""
        return 1 - self.file_bytes / self.dense_sizes[self.form]


def store_smallest(model: Path, dense: Path, folder: Path) -> StoredFile:
    """Write `model` into `folder` in the smallest form that ONNX Runtime loads; `dense` is what it is compared with.

    Raises:
        ModelError: a file is not an ONNX model.
    """
    forms, dense_forms = _forms(model), _forms(dense)
    loadable = {form: content for form, content in forms.items() if _loads(content, form)}
    form = min(loadable, key=lambda name: len(loadable[name]))
    path = folder / f"{model.stem}{SUFFIXES[form]}"
    write_atomically(path, loadable[form])
    return StoredFile(
        path,
        form,
        len(loadable[form]),
        {name: len(content) for name, content in forms.items()},
        {name: len(content) for name, content in dense_forms.items()},
    )


def read_stored(path: Path) -> bytes:
    """Return a stored model as bytes for an InferenceSession.

    Raises:
        ModelError: the container is damaged.
    """
    content = path.read_bytes()
    if path.suffix != ".xz":
        return content
    try:
        return lzma.decompress(content)
    except (lzma.LZMAError, EOFError) as error:
        raise ModelError(f"'{path}' is damaged ({error}); copy it again") from error


def _forms(path: Path) -> dict[str, bytes]:
    try:
        model = onnx.load(path)
    except Exception as error:
        raise ModelError(f"{path} is not an ONNX model ({type(error).__name__})") from error
    plain = model.SerializeToString()
    return {"onnx": plain, "sparse": _with_sparse(model), "xz": lzma.compress(plain, preset=PRESET)}


def _with_sparse(model: onnx.ModelProto) -> bytes:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    graph = copy.graph
    dense = []
    for tensor in graph.initializer:
        array = numpy_helper.to_array(tensor)
        used = int(np.count_nonzero(array))
        smaller = used * (INDEX_BYTES + VALUE_BYTES) < array.nbytes
        if tensor.data_type != TensorProto.FLOAT or array.size < SMALLEST_TENSOR or not used or not smaller:
            dense.append(tensor)
            continue
        flat = np.flatnonzero(array).astype(np.int64)
        sparse = graph.sparse_initializer.add()
        sparse.values.CopyFrom(numpy_helper.from_array(array.reshape(-1)[flat], tensor.name))
        sparse.indices.CopyFrom(numpy_helper.from_array(flat, f"{tensor.name}_indices"))
        sparse.dims.extend(array.shape)
    kept = [onnx.TensorProto.FromString(tensor.SerializeToString()) for tensor in dense]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    content: bytes = copy.SerializeToString()
    return content


def _loads(content: bytes, form: str) -> bool:
    if form != "sparse":
        return True
    try:
        open_session(content, severity=FATAL)
    except ModelError:
        return False
    return True
