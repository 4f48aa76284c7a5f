"""The run directory: stages, files written whole or not at all, and whose files are whose."""

from mm_edge.store.ownership import (
    PLACES,
    SAMPLES_START,
    WRITING_PREFIX,
    check_folder,
    refuse_link,
    starts_with,
)
from mm_edge.store.stages import RunStore, disk_errors, hash_file, hash_key, write_atomically

__all__ = [
    "PLACES",
    "SAMPLES_START",
    "WRITING_PREFIX",
    "RunStore",
    "check_folder",
    "disk_errors",
    "hash_file",
    "hash_key",
    "refuse_link",
    "starts_with",
    "write_atomically",
]
