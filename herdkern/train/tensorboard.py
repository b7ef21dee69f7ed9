"""metrics.jsonl as TensorBoard's event files, during the run or afterwards.

The writer is TensorBoard's own file format through torch.utils.tensorboard; metrics.jsonl stays the record of a run. A
run that went back to a checkpoint leaves no doubled steps: what was written of the lost steps is purged.
"""

import time
from pathlib import Path
from typing import Any

from herdkern.train.metrics import MetricsLog

_AXES = ("step", "time")  # what the others are drawn over


class TensorBoardLog:
    """Scalars of one run in `folder`; each call of `update` adds the new lines of metrics.jsonl.

    Raises: ImportError naming the extra if tensorboard is missing.
    """

    def __init__(self, run_dir: Path | str, folder: Path | str | None = None) -> None:
        self.metrics = MetricsLog(Path(run_dir) / "metrics.jsonl")
        self.folder = Path(folder) if folder is not None else Path(run_dir) / "tensorboard"
        self._seen: dict[int, tuple[Any, Any]] = {}  # step -> time and loss in the event files
        self._writer: Any = None

    def update(self) -> int:
        """Write the lines that are not in the event files yet; returns how many."""
        records = {int(record["step"]): record for record in self.metrics.read() if "step" in record}
        lost = [step for step, told in self._seen.items() if step not in records or told != _told(records[step])]
        if self._writer is None or lost:
            self._open(min(lost, default=min(records, default=0)))
        new = [step for step in records if step not in self._seen]
        for step in new:
            for name, value in records[step].items():
                if name not in _AXES and isinstance(value, int | float) and not isinstance(value, bool):
                    self._writer.add_scalar(name, value, step, walltime=records[step].get("time"))
            self._seen[step] = _told(records[step])
        if new:
            self._writer.flush()
        return len(new)

    def _open(self, first: int) -> None:
        """A new file that purges what earlier files say of `first` and the steps after it."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as e:
            raise ImportError(
                f"TensorBoardLog: tensorboard must be there: pip install herdkern[tensorboard] ({e})"
            ) from e
        self.close()
        self._seen = {step: told for step, told in self._seen.items() if step < first}
        is_first_file = not any(self.folder.glob("events.out.tfevents.*"))
        if not is_first_file:
            time.sleep(1.1)  # files are read in the order of their names, which hold whole seconds
        self._writer = SummaryWriter(str(self.folder), purge_step=None if is_first_file else first)

    def close(self) -> None:
        """Finish the event files."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def __enter__(self) -> "TensorBoardLog":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _told(record: dict[str, Any]) -> tuple[Any, Any]:
    return record.get("time"), record.get("loss")
