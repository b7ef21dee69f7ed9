"""A small pipeline of all kinds of stages, run as `python pipeline.py RUN INPUTS EXECUTOR`; the kill tests kill it."""

import sys
import time
from pathlib import Path

from herdkern.engine import Run, make_executor

TASK_SECONDS = 0.03  # stretches each task so that a kill can fall into any part of it


def transform(inputs, out, config):
    """Writes two files and a folder from one input, slowly."""
    data = inputs[0].read_bytes()
    with open(out / "big.bin", "wb") as f:
        for _ in range(config["repeat"]):
            f.write(data)
            time.sleep(TASK_SECONDS / config["repeat"])
    (out / "nested").mkdir()
    (out / "nested" / "reversed.bin").write_bytes(data[::-1])
    return {"bytes": len(data), "by_first": {chr(data[0]): 1}}


def scatter(inputs, out, config, num_partitions):
    data = inputs[0].read_bytes()
    for p in range(num_partitions):
        (out / f"part-{p:05d}").write_bytes(data[p::num_partitions])
        time.sleep(TASK_SECONDS / num_partitions)
    return {}


def gather(inputs, out, config):
    (out / "joined.bin").write_bytes(b"".join(path.read_bytes() for path in inputs))
    time.sleep(TASK_SECONDS)
    return {"pieces": len(inputs)}


def main(run_dir, inputs_dir, executor_kind):
    inputs = sorted(Path(inputs_dir).iterdir())
    with make_executor(executor_kind, 2) as executor, Run(run_dir, executor=executor) as run:
        first = run.map("transform", transform, inputs, config={"repeat": 4})
        parts = run.exchange("exchange", scatter, gather, first.files("big.bin"), num_partitions=3, config={})
        folders = run.map("folders", gather, [[path] for path in parts.files("joined.bin")], config={"again": True})
        last = run.once("all", gather, folders.files("joined.bin"), config={})
    print(last.counters, first.counters, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
