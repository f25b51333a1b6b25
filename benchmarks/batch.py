"""Run a list of jobs on this machine's GPUs, several at once where they fit, each under a time limit.

    python benchmarks/batch.py benchmarks/four_gpus.toml --out results --seconds 540 [--only NAME ...]

A job of the list has a `name`, a `command` (`{out}` is the folder of results), the number of `gpus` it takes, the
`seconds` it may take, and `alone = true` where others would spoil its figures. What a job prints goes to NAME.log; one
that fails or runs into its limit is said to, with its last lines, and the others go on.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import tomllib

from autopar.core.errors import AutoparError

ROOT = Path(__file__).parents[1]
POLL_SECONDS = 0.5
LAST_LINES, WIDTH = 12, 200
MARK = "BATCH_JOB"
"""The environment variable that tells the processes of a job, those in sessions of their own too."""
LEAVE_SECONDS = 15.0
"""For a job out of time to say what it knows before it is killed."""


@dataclass(frozen=True, slots=True)
class Job:
    """One line of the list."""

    name: str
    command: str
    gpus: int
    seconds: float
    alone: bool = False


@dataclass(slots=True)
class Running:
    """A job's process, the GPUs it has, and when it has to end."""

    job: Job
    process: subprocess.Popen[bytes]
    gpus: tuple[int, ...]
    started: float
    ends: float


@dataclass(slots=True)
class Batch:
    """Jobs that wait and run on so many GPUs until `ends`; `told` has by name how a job ended and its seconds."""

    out: Path
    gpus: int
    ends: float
    waiting: list[Job]
    running: list[Running] = field(default_factory=list)
    told: dict[str, tuple[str, float]] = field(default_factory=dict)

    def run(self) -> None:
        """All jobs, until they are done or time is."""
        while self.waiting or self.running:
            now = time.monotonic()
            for each in [r for r in self.running if r.process.poll() is not None or now > r.ends]:
                self._end(each, now)
            while now < self.ends and (job := self._next()) is not None:
                self._start(job, now)
            if now >= self.ends:
                self.told |= {job.name: ("no time left", 0.0) for job in self.waiting}
                self.waiting = []
            time.sleep(POLL_SECONDS if self.running else 0.0)

    def free(self) -> list[int]:
        """The GPUs that no job has."""
        taken = {gpu for each in self.running for gpu in each.gpus}
        return [gpu for gpu in range(self.gpus) if gpu not in taken]

    def _next(self) -> Job | None:
        """The first job in the list that can start; those after one that wants to be alone wait for it."""
        if any(each.job.alone for each in self.running):
            return None
        for job in self.waiting:
            if job.alone:
                return job if not self.running else None
            if job.gpus <= len(self.free()):
                return job
        return None

    def _start(self, job: Job, now: float) -> None:
        gpus = tuple(self.free()[:job.gpus])
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ",".join(map(str, gpus)), "PYTHONUNBUFFERED": "1",
                       MARK: job.name}
        with (self.out / f"{job.name}.log").open("wb") as log:
            process = subprocess.Popen(job.command.format(out=self.out), shell=True, cwd=ROOT, env=environment,
                                       stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                                       start_new_session=True, preexec_fn=_interruptible)
        self.waiting.remove(job)
        self.running.append(Running(job, process, gpus, now, min(self.ends, now + job.seconds)))
        print(f"{job.name}: started on {job.gpus} GPUs", flush=True)

    def _end(self, each: Running, now: float) -> None:
        late = each.process.poll() is None
        if late:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(each.process.pid, signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                each.process.wait(LEAVE_SECONDS)
        for process in processes_of(each.job):  # what it may have left running, too
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        code = each.process.wait()
        self.running.remove(each)
        how = "out of time" if late else "done" if code == 0 else f"exit {code}"
        self.told[each.job.name] = (how, now - each.started)
        print(f"{each.job.name}: {how} after {now - each.started:.0f} s", flush=True)

    def summary(self) -> str:
        """How each job ended and what it said last."""
        parts = []
        for name, (how, seconds) in self.told.items():
            log = self.out / f"{name}.log"
            said = log.read_text(errors="replace").splitlines()[-LAST_LINES:] if log.exists() else []
            parts += [f"== {name}: {how}, {seconds:.0f} s", *(line[:WIDTH] for line in said)]
        return "\n".join(parts)


def _interruptible() -> None:
    """Undo what a shell does to what it starts in the background: it ignores interrupts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def processes_of(job: Job) -> list[int]:
    """The processes that a job started and that are still there."""
    found, mark = [], f"{MARK}={job.name}".encode()
    for entry in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if mark in entry.read_bytes().split(b"\0"):
                found.append(int(entry.parent.name))
    return found


def jobs_of(path: Path, only: list[str], gpus: int) -> list[Job]:
    """The jobs of a list that are wanted. Raises AutoparError for a list or a name that can't be."""
    try:
        jobs = [Job(**entry) for entry in tomllib.loads(path.read_text())["job"]]
    except (OSError, KeyError, TypeError, tomllib.TOMLDecodeError) as error:
        raise AutoparError(f"{path} is no list of jobs ({error}); give a TOML file of [[job]] entries") from error
    strange = sorted(set(only) - {job.name for job in jobs})
    if strange:
        raise AutoparError(f"no job is called {', '.join(strange)}; {path} has {', '.join(j.name for j in jobs)}")
    wanted = [job for job in jobs if not only or job.name in only]
    large = next((job for job in wanted if job.gpus > gpus), None)
    if large is not None:
        raise AutoparError(f"job {large.name} takes {large.gpus} GPUs, this machine has {gpus}; leave it out by --only")
    return wanted


def main() -> int:
    """The exit status: 0 where all jobs are done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("jobs", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="the folder of logs and results")
    parser.add_argument("--seconds", type=float, default=3600.0, help="for all of them (default %(default)s)")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME")
    parser.add_argument("--gpus", type=int, help="how many to use; all of them when left out")
    given = parser.parse_args()
    import torch
    gpus = torch.cuda.device_count() if given.gpus is None else given.gpus
    try:
        jobs = jobs_of(given.jobs, given.only, gpus)
    except AutoparError as error:
        print(f"batch: error: {error}", file=sys.stderr)
        return 2
    given.out.mkdir(parents=True, exist_ok=True)
    batch = Batch(given.out.resolve(), gpus, time.monotonic() + given.seconds, jobs)
    batch.run()
    print(batch.summary(), flush=True)
    return int(any(how != "done" for how, _ in batch.told.values()))


if __name__ == "__main__":
    sys.exit(main())
