"""Instructions that one fixed attention problem takes, counted by callgrind: a regression shows on a noisy machine too.

    python benchmarks/attention_instructions.py            prints the counts beside the recorded ones
    python benchmarks/attention_instructions.py --check    exit status 1 if one is over 2 % above what was recorded
    python benchmarks/attention_instructions.py --record   writes benchmarks/results/attention_instructions.json

Six documents, 8 query heads on 2 key-value heads, head_dim 64, one thread, at level avx2, the highest that valgrind
knows. Each count is the difference between two calls and one, so that starting Python cancels out; torch is not loaded.
The compiler matters: compare counts of the same one.
"""

import array
import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

RECORD = Path(__file__).resolve().parent / "results/attention_instructions.json"
LEVEL, ALLOWED = "avx2", 1.02
LENGTHS = (150, 1, 40, 7, 64, 26)
HEADS, KV_HEADS, HEAD_DIM = 8, 2, 64
STORAGE = {"fp32": (0, "f"), "bf16": (1, "H")}  # number in csrc/cpu/attention.h, code of `array`


def numbers(count: int, code: str) -> array.array:
    """The same numbers between -1.7 and 1.7 again and again; bf16 as the upper halves of their bits."""
    some = array.array("f", [(i * 7919 % 1021 - 510) / 300 for i in range(1021)])
    if code == "H":
        some = array.array("H", some.tobytes())[1::2]
    return (some * (count // len(some) + 1))[:count]


def work(dtype: str, forward_calls: int, backward_calls: int) -> None:
    """What callgrind watches."""
    from herdkern import _ops

    _ops.set_isa(LEVEL)
    storage, code = STORAGE[dtype]
    tokens = sum(LENGTHS)
    borders = array.array("i", [sum(LENGTHS[:i]) for i in range(len(LENGTHS) + 1)])
    wide, narrow = tokens * HEADS * HEAD_DIM, tokens * KV_HEADS * HEAD_DIM
    q, dout, out, dq = (numbers(wide, code) for _ in range(4))
    k, v, dk, dv = (numbers(narrow, code) for _ in range(4))
    lse = numbers(tokens * HEADS, "f")

    def address(x: array.array) -> int:
        return x.buffer_info()[0]

    def operand(x: array.array) -> tuple[int, int, int]:
        heads = len(x) // (tokens * HEAD_DIM)
        return address(x), heads * HEAD_DIM, HEAD_DIM

    where = address(borders)
    sizes = len(LENGTHS), tokens, tokens, HEADS, KV_HEADS, HEAD_DIM
    shape = (where, where, *sizes, HEAD_DIM**-0.5, 0.0, -1, 0, 0, storage, 1)  # causal, no softcap, no sinks
    for _ in range(forward_calls):
        _ops.attention_forward(operand(q), operand(k), operand(v), shape, address(out), address(lse))
    for _ in range(backward_calls):
        operands = map(operand, (q, k, v, out, dout))
        _ops.attention_backward(*operands, address(lse), shape, address(dq), address(dk), address(dv), 0)


def counted(dtype: str, forward_calls: int, backward_calls: int) -> int:
    """Instructions of a whole process that makes these calls."""
    command = ["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null", sys.executable, "-S", __file__]
    command += ["--work", dtype, str(forward_calls), str(backward_calls)]
    env = {**os.environ, "PYTHONHASHSEED": "0", "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    env.pop("HERDKERN_ISA", None)
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    found = re.search(r"Collected *: *(\d+)", done.stderr)
    if done.returncode != 0 or not found:
        raise RuntimeError(f"attention_instructions: callgrind failed: {done.stderr.strip()[-2000:]}")
    return int(found.group(1))


def count_all() -> dict[str, int]:
    """Millions of instructions would hide a small change, so single ones: {"fp32 forward": ..., ...}."""
    runs = [(dtype, *calls) for dtype in STORAGE for calls in ((1, 1), (2, 1), (1, 2))]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        counts = dict(zip(runs, pool.map(lambda run: counted(*run), runs), strict=True))
    found = {}
    for dtype in STORAGE:
        once = counts[dtype, 1, 1]
        found[f"{dtype} forward"] = counts[dtype, 2, 1] - once
        found[f"{dtype} backward"] = counts[dtype, 1, 2] - once
    return found


def compiler() -> str:
    done = subprocess.run([os.environ.get("CXX", "g++"), "--version"], capture_output=True, text=True)
    return done.stdout.partition("\n")[0].strip() or "unknown"


def useful_flops() -> dict[str, float]:
    pairs = sum(n * (n + 1) // 2 for n in LENGTHS)
    return {"forward": 4.0 * HEAD_DIM * HEADS * pairs, "backward": 10.0 * HEAD_DIM * HEADS * pairs}


def main(arguments: list[str]) -> int:
    """Runs the command line; returns the exit status."""
    if arguments[:1] == ["--work"]:
        work(arguments[1], int(arguments[2]), int(arguments[3]))
        return 0
    if shutil.which("valgrind") is None:
        print("attention_instructions: valgrind is not installed (Debian, Ubuntu: apt-get install valgrind)")
        return 2
    recorded: dict[str, Any] = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.is_file() else {}
    counts, flops = count_all(), useful_flops()
    worse = []
    for name, count in counts.items():
        before = recorded.get("instructions", {}).get(name)
        change = "" if before is None else f"  {100 * (count / before - 1):+.2f} % of the recorded {before:,}"
        print(f"{name:14s} {count:14,d}  {flops[name.split()[1]] / count:5.2f} useful flops each{change}")
        if before is not None and count > ALLOWED * before:
            worse.append(name)
    if recorded and recorded["compiler"] != compiler():
        print(f"the record is of {recorded['compiler']}, this is {compiler()}: the counts are not comparable")
    if "--record" in arguments:
        report = {"level": LEVEL, "compiler": compiler(), "lengths": LENGTHS, "instructions": counts}
        RECORD.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if "--check" in arguments and worse:
        print(f"over {100 * (ALLOWED - 1):.0f} % more instructions than recorded: {', '.join(worse)}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
