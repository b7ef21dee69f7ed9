"""The data engine: stages over shards that survive `kill -9`, with any `concurrent.futures.Executor` underneath.

A stage is a function from input files to a fresh folder. Finished folders are synced, hashed, renamed into place and
journaled; a second run does only what is missing, damaged or was made from other inputs or another configuration.
"""

from herdkern.engine.executors import SerialExecutor, make_executor
from herdkern.engine.journal import canonical_json, config_sha256
from herdkern.engine.shards import atomic_file, read_json, sha256_file, write_json_atomic
from herdkern.engine.stage import Run, StageError, StageResult
from herdkern.engine.task import code_version, task_memory

__all__ = [
    "Run",
    "SerialExecutor",
    "StageError",
    "StageResult",
    "atomic_file",
    "canonical_json",
    "code_version",
    "config_sha256",
    "make_executor",
    "read_json",
    "sha256_file",
    "task_memory",
    "write_json_atomic",
]
