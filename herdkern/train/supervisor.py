"""The supervised start of a run on several ranks: torchrun's agent, and a watch that names who died or hangs.

torchrun alone waits for a collective's timeout (30 minutes), and then every rank is to blame. Here the ranks' beats and
flight recorders are read from outside: within 30 seconds the rank at fault is named, the others are ended, and a new
rendezvous goes on from the last checkpoint. Source: Llama 3 section 3.3.4.
"""

import argparse
import contextlib
import os
import runpy
import shutil
import signal
import socket
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.distributed import run as torchrun
from torch.distributed.elastic.agent.server.api import RunResult
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher import api as launcher

from herdkern.parallel.flight_recorder import STACKS_SIGNAL
from herdkern.parallel.flight_ring import read_rings, ring_folder
from herdkern.parallel.flight_verdict import Verdict, judge
from herdkern.parallel.heartbeat import LONG_PHASES, Beat, clear_beats, read_beats
from herdkern.parallel.stragglers import StragglerWatch
from herdkern.train.checkpoint import checkpoint_folders, step_of
from herdkern.train.corruption import corruption_log
from herdkern.train.metrics import MetricsLog
from herdkern.train.restarts import RestartLog, effective_time
from herdkern.train.surroundings import take_lock

_SETTLE = 1.5  # seconds in which the other ranks may run into what broke the first
_STOPPED_AFTER = 5.0  # seconds that a process may stand still on SIGSTOP
_SIGNALS = "SIGTERM,SIGINT,SIGUSR1,SIGHUP,SIGQUIT"


@dataclass(frozen=True, kw_only=True)
class WatchConfig:
    """Limits of the supervisor, in seconds.

    hang_after: without a beat a rank hangs (at least three times its longest recent pause). start_after: the same
    before the end of the first step, of which nobody knows how long it takes. long_after: the same in a save or an
    evaluation. grace: a signal's ranks may write a checkpoint. straggler_every: between two looks at the arrivals.
    fork: ranks are forks of this process, which has loaded torch already, so that a restart takes a second and not ten;
    the command must be `python FILE ...`.
    """

    hang_after: float = 20.0
    start_after: float = 600.0
    long_after: float = 900.0
    grace: int = 120
    straggler_every: float = 10.0
    fork: bool = False

    def __post_init__(self) -> None:
        for name in ("hang_after", "start_after", "long_after", "straggler_every"):
            if getattr(self, name) <= 0:
                raise ValueError(f"WatchConfig: {name} must be above 0 seconds, got {getattr(self, name)}")


@dataclass
class Watch:
    """What the agent of one node knows of its run and its ranks."""

    run_dir: Path
    config: WatchConfig
    log: RestartLog = field(init=False)
    stragglers: StragglerWatch = field(init=False)
    is_first: bool = True  # of the nodes: it writes the log
    best_step: int = -1
    began: float = 0.0
    first_step: int = 0
    exit_codes: dict[int, int] = field(default_factory=dict)
    _stopped_since: dict[int, float] = field(default_factory=dict)
    _looked: float = 0.0

    def __post_init__(self) -> None:
        self.log = RestartLog(self.run_dir)
        self.stragglers = StragglerWatch(self.run_dir)

    def start(self, ranks: Sequence[int], world_size: int, is_first: bool) -> None:
        """A new set of ranks is about to start."""
        self.is_first, self.began, self.exit_codes = is_first, time.time(), {}
        self.first_step = self.saved_step() + 1
        self._stopped_since.clear()
        for rank in ranks:
            for path in ring_folder(self.run_dir).glob(f"rank-{rank}.*"):
                path.unlink(missing_ok=True)
        if is_first:
            clear_beats(self.run_dir)
            self.log.append("start", ranks=world_size, step=self.first_step - 1)

    def saved_step(self) -> int:
        """The step of the newest checkpoint, 0 if there is none."""
        folders = checkpoint_folders(self.run_dir / "checkpoints")
        return step_of(folders[-1]) if folders else 0

    def reached_step(self) -> int:
        """The last step in metrics.jsonl."""
        records = MetricsLog(self.run_dir / "metrics.jsonl").read()
        return int(records[-1]["step"]) if records else 0

    def hung(self, pids: Mapping[int, int]) -> dict[int, str]:
        """What is wrong with the ranks (global rank -> pid) that show no sign of life, by rank."""
        now, beats, hung = time.time(), read_beats(self.run_dir), {}
        for rank, pid in pids.items():
            if _process_state(pid) == "T":
                since = self._stopped_since.setdefault(rank, now)
                if now - since >= _STOPPED_AFTER:
                    hung[rank] = "is stopped (SIGSTOP)"
            else:
                self._stopped_since.pop(rank, None)
            beat = beats.get(rank)
            if beat is None or beat.time < self.began:
                if now - self.began > self.config.start_after:
                    hung.setdefault(rank, f"has given no sign of life in {now - self.began:.0f} s")
            elif now - beat.time > self.limit(beat):
                hung.setdefault(rank, f"has been silent for {now - beat.time:.0f} s at {beat.phase} {beat.step}")
        return hung

    def limit(self, beat: Beat) -> float:
        """The seconds after which a rank with that last beat hangs."""
        if beat.phase in LONG_PHASES:
            return self.config.long_after
        if beat.step <= self.first_step:
            return self.config.start_after
        return max(self.config.hang_after, 3.0 * beat.longest)

    def look_for_stragglers(self) -> None:
        """Every few seconds: who comes late to the collectives of its groups."""
        if self.is_first and time.time() - self._looked >= self.config.straggler_every:
            self._looked = time.time()
            for found in self.stragglers.look(read_rings(ring_folder(self.run_dir))):
                _say(f"straggler: {found}")

    def diagnose(self, pids: Mapping[int, int], hung: Mapping[int, str]) -> Verdict:
        """Keep the recorders and stacks of these ranks in RUN/flight/N and say who is at fault."""
        source = ring_folder(self.run_dir)
        for rank, pid in pids.items():
            if (source / f"rank-{rank}.stacks").exists() and _process_state(pid) not in ("", "T", "Z"):
                _send(pid, STACKS_SIGNAL)
        time.sleep(0.2)
        failures = sum(event["event"] == "failure" for event in self.log.read())
        folder = self.run_dir / "flight" / str(failures + 1)
        folder.mkdir(parents=True, exist_ok=True)
        for rank in pids:
            for path in source.glob(f"rank-{rank}.*"):
                shutil.copyfile(path, folder / path.name)
        gone = {rank: _died(code) for rank, code in self.exit_codes.items() if code != 0}
        gone |= {rank: text for rank, text in hung.items() if "SIGSTOP" in text}
        verdict = judge(read_rings(folder), _culprits(gone))
        if verdict.kind == "none" and hung:
            line = "; ".join(f"rank {rank} {text}" for rank, text in sorted(hung.items()))
            verdict = Verdict(kind="absent", ranks=tuple(sorted(hung)), line=line)
        found = corruption_log(self.run_dir).read()[-1:]
        if found and found[0]["time"] >= self.began:
            verdict = Verdict(kind="corrupt", ranks=tuple(found[0]["ranks"]), line=found[0]["reason"])
        (folder / "verdict.txt").write_text(verdict.line + "\n")
        if self.is_first or gone:
            codes = {str(rank): code for rank, code in sorted(self.exit_codes.items())}
            about = {"kind": verdict.kind, "ranks": verdict.ranks, "reason": verdict.line, "exit_codes": codes}
            self.log.append("failure", **about, step=self.reached_step(), folder=str(folder.relative_to(self.run_dir)))
        _say(verdict.line)
        return verdict


class SupervisedAgent(LocalElasticAgent):
    """torchrun's agent, which looks at its ranks before it asks whether they still run."""

    def __init__(self, *args: Any, watch: Watch, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.watch = watch
        self._allowed = self._remaining_restarts  # without progress

    def _start_workers(self, worker_group: Any) -> dict[int, Any]:
        workers = worker_group.workers
        self.watch.start([w.global_rank for w in workers], workers[0].world_size, worker_group.group_rank == 0)
        return super()._start_workers(worker_group)

    def _monitor_workers(self, worker_group: Any) -> RunResult:
        pids = self._pids(worker_group)
        died = _died_of(pids)
        hung = {} if died else self.watch.hung(pids)
        if any(code != 0 for code in died.values()) or hung:
            self._break_off(pids, hung)
            return super()._monitor_workers(worker_group)  # collects the dead and counts a restart
        self.watch.look_for_stragglers()
        result = super()._monitor_workers(worker_group)
        if result.is_failed():  # a rank died since we looked, and torchrun has ended the others
            self.watch.exit_codes = {rank: failure.exitcode for rank, failure in result.failures.items()}
            self._conclude(pids, {})
        return result

    def _break_off(self, pids: Mapping[int, int], hung: Mapping[int, str]) -> None:
        if hung or set(_died_of(pids).values()) - {0, -signal.SIGKILL}:  # a kill from outside tells nothing more
            time.sleep(_SETTLE)
        self.watch.exit_codes = _died_of(pids)
        self._conclude(pids, hung)
        for pid in pids.values():
            _send(pid, signal.SIGKILL, to_group=True)  # what they wait for will never come
        until = time.monotonic() + 10
        # by their state: of those that torchrun has collected no exit code is left to see
        while any(_process_state(pid) not in ("", "Z", "X") for pid in pids.values()) and time.monotonic() < until:
            time.sleep(0.02)

    def _conclude(self, pids: Mapping[int, int], hung: Mapping[int, str]) -> None:
        """The verdict, and whether the run has come further than before: then it may fail as often again."""
        self.watch.diagnose(pids, hung)
        reached = max([beat.step for beat in read_beats(self.watch.run_dir).values()], default=-1)
        if reached > self.watch.best_step:
            self.watch.best_step = reached
            spec = self._worker_group.spec  # their difference numbers the restarts, and so the keys in the store
            spec.max_restarts += self._allowed - self._remaining_restarts
            self._remaining_restarts = self._allowed
        if self._remaining_restarts == 0:
            _say(f"no progress past step {self.watch.best_step} in {self._allowed} restarts")

    def _shutdown(self, *args: Any, **kwargs: Any) -> None:
        finished = getattr(self._pcontext, "_worker_finished_event", None)
        if finished is not None and args and args[0] != signal.SIGKILL:
            finished.set()  # forked ranks that have finished wait for it
        super()._shutdown(*args, **kwargs)

    def _pids(self, worker_group: Any) -> dict[int, int]:
        assert self._pcontext is not None
        of_local = self._pcontext.pids()
        return {w.global_rank: of_local[w.local_rank] for w in worker_group.workers if w.local_rank in of_local}


def launch(run_dir: Path | str, arguments: Sequence[str], config: WatchConfig | None = None) -> int:
    """Start a command on every rank under supervision and return the exit status.

    arguments: torchrun's, the command behind `--` (it is run as it is, no Python is put before it).
    Returns: 0 if all ranks finished, or ended by themselves after a signal; 1 if the run was given up.
    Raises: SystemExit as argparse does for arguments that torchrun does not know; RuntimeError if the run in run_dir
    is supervised on this machine already.
    """
    watch = Watch(Path(run_dir), config or WatchConfig())
    watch.run_dir.mkdir(parents=True, exist_ok=True)
    with take_lock(watch.run_dir / f"launch-{socket.gethostname()}.lock"):
        return _launch(watch, arguments)


def _launch(watch: Watch, arguments: Sequence[str]) -> int:
    elastic, entrypoint, command = torchrun.config_from_args(_torchrun_args(arguments))
    if watch.config.fork:
        entrypoint, command, elastic.start_method = _run_file, _python_file(entrypoint, command), "fork"
        import herdkern.train.parallel_engine  # noqa: F401 - what the forks will need
    # torch 2.13 keeps one store for all restarts, and gloo finds the addresses of the dead in it
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    elastic.signals_to_handle = _SIGNALS
    elastic.shutdown_timeout = watch.config.grace
    agents: list[SupervisedAgent] = []

    def make_agent(*args: Any, **kwargs: Any) -> SupervisedAgent:
        agents.append(SupervisedAgent(*args, watch=watch, **kwargs))
        return agents[0]

    before, launcher.LocalElasticAgent = launcher.LocalElasticAgent, make_agent  # type: ignore[misc,assignment]
    try:
        launcher.launch_agent(elastic, entrypoint, list(command))
        event, status = "finished", 0
    except ChildFailedError:
        event, status = "given up", 1
    except SignalException as e:
        codes = _exit_codes(agents)
        clean = bool(codes) and all(code == 0 for code in codes.values())
        event, status = "stopped", 0 if clean else 1
        _say(f"{e.sigval.name}: ranks ended with {codes}")
    finally:
        launcher.LocalElasticAgent = before  # type: ignore[misc]
        shutil.rmtree(ring_folder(watch.run_dir), ignore_errors=True)
    if watch.is_first:
        share = effective_time(watch.run_dir, now=time.time()).share
        watch.log.append(event, step=watch.reached_step(), effective=round(share, 4))
        _say(str(effective_time(watch.run_dir)))
    return status


def _torchrun_args(arguments: Sequence[str]) -> argparse.Namespace:
    own = list(arguments)
    split = own.index("--") if "--" in own else len(own)
    options, command = own[:split], own[split + 1 :]
    if not command:
        raise ValueError("launch: a command must stand behind --, got none; e.g. -- python train.py")
    args = torchrun.parse_args([*options, "--no-python", *command])
    if not any(option.startswith(("--max-restarts", "--max_restarts")) for option in options):
        args.max_restarts = 3
    if args.nnodes in ("1", "1:1") and not args.rdzv_endpoint:
        args.rdzv_backend, args.rdzv_endpoint, args.rdzv_id = "c10d", "localhost:0", str(uuid.uuid4())
    return args


def _python_file(entrypoint: Any, command: Sequence[str]) -> list[str]:
    """FILE and its arguments. Raises: ValueError if the command is not `python FILE ...`."""
    if not Path(str(entrypoint)).name.startswith("python") or not command or not Path(command[0]).is_file():
        raise ValueError(f"launch: the command must be `python FILE ...` with fork, got {[entrypoint, *command]}")
    return list(command)


def _run_file(*command: str) -> None:
    """What a forked rank does: as if `python FILE ...` had just been started."""
    for name in _SIGNALS.split(","):
        signal.signal(getattr(signal, name), signal.SIG_DFL)
    os.setsid()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    sys.argv = list(command)
    sys.path.insert(0, str(Path(command[0]).resolve().parent))
    runpy.run_path(command[0], run_name="__main__")


def _exit_codes(agents: Sequence[SupervisedAgent]) -> dict[int, int]:
    context: Any = agents[0]._pcontext if agents else None
    if context is None:  # the signal came before the ranks
        return {}
    if hasattr(context, "subprocess_handlers"):
        return {rank: handler.proc.returncode for rank, handler in context.subprocess_handlers.items()}
    return {rank: process.exitcode for rank, process in enumerate(context._pc.processes)}


def _died_of(pids: Mapping[int, int]) -> dict[int, int]:
    """Exit codes (minus the signal) of those that have ended, who stay for torchrun to collect."""
    died = {}
    for rank, pid in pids.items():
        try:
            info = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            continue
        if info is not None:
            died[rank] = info.si_status if info.si_code == os.CLD_EXITED else -info.si_status
    return died


def _died(code: int) -> str:
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"


def _culprits(gone: Mapping[int, str]) -> dict[int, str]:
    """Of ranks that are gone those that went first in kind: a rank that raised did so because another was killed."""
    killed = {rank: text for rank, text in gone.items() if "killed" in text or "SIGSTOP" in text}
    return killed or dict(gone)


def _process_state(pid: int) -> str:
    """The letter of /proc, "" if there is no such process (or no /proc)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""


def _send(pid: int, number: int, *, to_group: bool = False) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if to_group:
            os.killpg(pid, number)


def _say(line: str) -> None:
    print(f"herdkern: {line}", file=sys.stderr, flush=True)
