"""Convert every network of timm, torchvision and pytorchvideo's hub, and compare outputs to the bit.

    python benchmarks/coverage.py                        # all; stop it at any time, it goes on where it was
    python benchmarks/coverage.py --only 'timm:resnet*'  # some
    python benchmarks/coverage.py --rerun failed         # those once more that did not pass
    python benchmarks/coverage.py --limit 0              # only write COVERAGE.md from the results there are

Each network gets random weights and the smallest input it takes. Worker processes do the work and take many
networks each; one that uses too much time or memory is killed, and the next network gets a new one.
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib.metadata
import json
import os
import queue
import select
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from common import RESULTS, environment
from coverage_models import all_names, family, library_of
from coverage_table import table

from redconvert.files import write_text_atomic
from redconvert.progress import progress_bar

__all__ = ["Results", "Worker", "main", "wanted"]

WORKER = (sys.executable, str(Path(__file__).with_name("coverage_check.py")))
PAGE = Path(__file__).resolve().parents[1] / "COVERAGE.md"
RECYCLE_AT = 2e9  # bytes that a worker may hold between two networks
PASSED = ("ok", "nothing to convert")


class Results:
    """The rows so far, in a JSON file that is whole at any time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[str, dict[str, Any]] = {}
        if path.exists():
            self.rows = {row["model"]: row for row in json.loads(path.read_text())["rows"]}

    def add(self, row: dict[str, Any]) -> None:
        self.rows[row["model"]] = row
        self.write()

    def write(self) -> None:
        """One row per line, in alphabetical order."""
        versions = {name: importlib.metadata.version(name) for name in ("timm", "torchvision", "pytorchvideo")}
        head = {"what": "redconvert.convert on every network, random weights, outputs compared by torch.equal"}
        head |= environment(seed=0) | {"threads": 1} | versions  # type: ignore[operator]
        rows = ",\n".join(f"  {json.dumps(self.rows[name])}" for name in sorted(self.rows))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomic(self.path, f'{json.dumps(head)[:-1]}, "rows": [\n{rows}\n]}}\n')


def wanted(names: Iterable[str], rows: dict[str, dict[str, Any]], only: str, rerun: str) -> list[str]:
    """The names that are still to be run."""
    selected = [name for name in names if fnmatch.fnmatchcase(name, only)]
    if rerun == "all":
        return selected
    if rerun == "failed":
        return [name for name in selected if name not in rows or rows[name]["status"] not in PASSED]
    return [name for name in selected if name not in rows]


class Worker:
    """A process that converts one network after another; killed where it uses too much, and started again.

    Args:
        command: of the process: it reads a name per line and writes a line of JSON for each.
        seconds: of processor time that a network may take (of time on the clock ten times as much).
        memory: bytes that the process may hold.
    """

    def __init__(self, command: tuple[str, ...], seconds: float, memory: float) -> None:
        self.command, self.seconds, self.memory = command, seconds, memory
        self.process: subprocess.Popen[str] | None = None

    def check(self, name: str) -> dict[str, Any]:
        """The row of this network, whatever happens to the process."""
        if self.process is None or self.process.poll() is not None:
            self.process = subprocess.Popen(
                self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=_environment()
            )
        assert self.process.stdin is not None and self.process.stdout is not None
        before = _usage(self.process.pid)[0]
        try:
            print(name, file=self.process.stdin, flush=True)
            status, error = self._wait(before)
            line = "" if status else self.process.stdout.readline()
        except BrokenPipeError:
            status, error, line = "", "", ""
        if line:
            if _usage(self.process.pid)[1] > RECYCLE_AT:
                self.stop()
            return json.loads(line)
        code = self.stop()
        row = {"model": name, "library": library_of(name), "status": status or "died"}
        return row | {"error": error or f"the worker process ended with {code}"}

    def _wait(self, before: float) -> tuple[str, str]:
        """Until there is a line to read: nothing; or why it takes too much."""
        assert self.process is not None
        start = time.monotonic()
        while not select.select([self.process.stdout], [], [], 0.2)[0]:
            used, held = _usage(self.process.pid)
            if used - before > self.seconds or time.monotonic() - start > 10 * self.seconds:
                return "time", f"over {self.seconds:.0f} s of processor time"
            if held > self.memory:
                return "memory", f"over {self.memory / 1e9:.0f} GB"
        return "", ""

    def stop(self) -> int | None:
        if self.process is None:
            return None
        process, self.process = self.process, None
        process.kill()
        return process.wait()


def _environment() -> dict[str, str]:
    root = str(Path(__file__).resolve().parents[1])
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def _usage(pid: int) -> tuple[float, float]:
    """Seconds of processor time and bytes of memory of a process; zeros where /proc does not tell."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0, 0.0
    ticks, page = os.sysconf("SC_CLK_TCK"), os.sysconf("SC_PAGE_SIZE")
    return (int(fields[11]) + int(fields[12])) / ticks, int(fields[21]) * page


def run(names: list[str], results: Results, jobs: int, make: Callable[[], Worker]) -> None:
    """Check every name, ``jobs`` at a time, and keep each row as it comes."""
    pending: queue.SimpleQueue[str] = queue.SimpleQueue()
    for name in names:
        pending.put(name)
    done: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    workers = [make() for _ in range(jobs)]
    for worker in workers:
        threading.Thread(target=_work, args=(worker, pending, done), daemon=True).start()
    shown = sys.stderr.isatty()
    try:
        with progress_bar(shown, "coverage", len(names)) as step:
            for number in range(1, len(names) + 1):
                row = done.get()
                results.add({"family": family(row["model"]), **row})
                step(text=row["model"])
                if not shown or row["status"] not in PASSED:
                    print(f"{number}/{len(names)} {_line(row)}", flush=True)
    finally:
        for worker in workers:
            worker.stop()


def _work(worker: Worker, pending: queue.SimpleQueue[str], done: queue.SimpleQueue[dict[str, Any]]) -> None:
    while True:
        try:
            name = pending.get_nowait()
        except queue.Empty:
            return
        done.put(worker.check(name))


def _line(row: dict[str, Any]) -> str:
    converted = f"{row['converted']} of {row['convs']}" if "converted" in row else ""
    return f"{row['status']:<10} {row['model']} {converted} {row.get('seconds', '')} s {row.get('error', '')}".rstrip()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="*", help="glob on library:model")
    parser.add_argument("--limit", type=int, help="at most so many networks")
    parser.add_argument("--jobs", type=int, default=1, help="worker processes")
    parser.add_argument("--rerun", choices=("new", "failed", "all"), default="new", help="what of --only to run")
    parser.add_argument("--seconds", type=float, default=400, help="processor time per network")
    parser.add_argument("--memory", type=float, default=10, help="GB per worker process")
    parser.add_argument("--out", type=Path, default=RESULTS / "coverage.json")
    parser.add_argument("--page", type=Path, default=PAGE)
    options = parser.parse_args(arguments)
    results = Results(options.out)
    every = all_names()
    names = wanted(every, results.rows, options.only, options.rerun)[: options.limit]
    try:
        run(names, results, options.jobs, lambda: Worker(WORKER, options.seconds, options.memory * 1e9))
    finally:
        if results.rows:
            missing = len(set(every) - set(results.rows))
            write_text_atomic(options.page, table(list(results.rows.values()), missing))


if __name__ == "__main__":
    main()
