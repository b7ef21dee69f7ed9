"""RUN/left_out.json: the sequences that a run has gone back for and leaves out, known before the next checkpoint is."""

from pathlib import Path
from typing import Any

from herdkern.engine import read_json, write_json_atomic


class LeftOut:
    """Stretches of the data, in the order in which they were found to be bad.

    Each: token (the first), tokens (how many), why (from which step the run went back, and the bad tensor).
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> list[dict[str, Any]]:
        """All of them."""
        return list(read_json(self.path)) if self.path.exists() else []

    def add(self, token: int, tokens: int, why: str) -> None:
        """One more, on disk when this returns."""
        write_json_atomic(self.path, [*self.read(), {"token": token, "tokens": tokens, "why": why}])

    def clear(self) -> None:
        """None from now on."""
        self.path.unlink(missing_ok=True)
