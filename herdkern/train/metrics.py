"""metrics.jsonl, the machine's measured peak, and MFU with its convention. Source: Llama 3 section 3.3.2, Table 4."""

import json
import os
import time
from pathlib import Path
from typing import Any

import torch

from herdkern.engine import atomic_file

MFU_CONVENTION = (
    "6N + attention inside documents (causal), of the measured {dtype} matrix product peak {peak:.0f} GFLOP/s"
)


class MetricsLog:
    """One JSON object a line, one line a step, each a single write: a kill tears at most the last line."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, record: dict[str, Any]) -> None:
        """Add one line. Values that are not finite must have been replaced by None."""
        line = json.dumps(record, allow_nan=False) + "\n"
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(descriptor, line.encode())
        finally:
            os.close(descriptor)

    def read(self) -> list[dict[str, Any]]:
        """All whole lines; a torn last line is left out.

        Raises: ValueError naming a line before the last that is not JSON.
        """
        if not self.path.exists():
            return []
        lines = self.path.read_bytes().split(b"\n")
        records = []
        for number, line in enumerate(lines[:-1], start=1):  # what follows the last newline is torn or empty
            try:
                records.append(json.loads(line))
            except ValueError as e:
                raise ValueError(f"MetricsLog: line {number} of {self.path} must be JSON, got {e}") from e
        return records

    def keep_until(self, step: int) -> None:
        """Drop the lines of later steps than `step`, atomically: what a resumed run will write again."""
        if not self.path.exists():
            return
        kept = [record for record in self.read() if record["step"] <= step]
        with atomic_file(self.path, "w") as f:
            f.writelines(json.dumps(record) + "\n" for record in kept)

    def sync(self) -> None:
        """Make the lines durable."""
        if self.path.exists():
            with open(self.path, "rb") as f:
                os.fsync(f.fileno())


def measured_peak_flops(dtype: torch.dtype, *, size: int = 1024, repeats: int = 5, device: str = "cpu") -> float:
    """FLOP/s of the best of some size x size x size matrix products in `dtype` with torch's present threads."""
    a = torch.ones(size, size, dtype=dtype, device=device)
    best = float("inf")
    for _ in range(repeats + 1):  # the first warms up
        begin = time.perf_counter()
        torch.mm(a, a)
        if device != "cpu":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - begin)
    return 2.0 * size**3 / best
