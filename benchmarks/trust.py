"""Break runs on purpose, and count how they end: killed, raced by other processes, or with files damaged.

A tiny pair with a planted change is diffed once without disturbance. Every broken run is then gone on with, and its
record and its files are compared with those of the undisturbed run. All processes are real. They are forked from one
that has imported everything, so that a start costs no imports.

    python benchmarks/trust.py trust.json [--kills 120] [--races 50] [--first 24] [--every 1]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1] / "tests"
SMALL = {"fit__checkpoint_every": 6, "harvest__shard_tokens": 800, "harvest__batch_tokens": 400}
"""Settings besides the tiny world's: checkpoints and several shards, so that there is something to go on from."""
DAMAGES = ("flip", "nan", "cut", "empty", "gone", "swap")
"""What is done to a file: one bit flipped, a number made NaN, cut in half, emptied, removed, another run's in its place."""


@dataclass
class Tally:
    """How many tries there were, and how many ended as promised; the others by name."""

    tries: int = 0
    good: int = 0
    bad: list[str] = field(default_factory=list)
    ends: dict[str, int] = field(default_factory=dict)

    def count(self, end: str, good: bool, what: str = "") -> None:
        """Count a try with its end."""
        self.tries, self.good = self.tries + 1, self.good + good
        self.ends[end] = self.ends.get(end, 0) + 1
        if not good:
            self.bad.append(f"{what}: {end}")


# -- processes -----------------------------------------------------------------------------------------------------


class Server:
    """Runs commands in processes of their own, forked from one that has imported everything."""

    def __init__(self) -> None:
        path = os.pathsep.join([str(Path(__file__).parent), str(TESTS), *(p for p in sys.path if p)])
        env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", "import trust; trust.serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=env,
        )

    def run(self, *jobs: dict[str, Any]) -> list[dict[str, Any]]:
        """Run jobs at the same time; returns their exit codes (negative: the signal) and what they told on stderr."""
        self.process.stdin.write(json.dumps(jobs) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        """End the process that forks."""
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


@contextlib.contextmanager
def serving() -> Iterator[Server]:
    """A `Server` for use inside."""
    server = Server()
    try:
        yield server
    finally:
        server.close()


def serve() -> None:
    """Carry out the first job that comes in on stdin, which imports everything; then fork a process for every job.

    The answer to a line of jobs is how they ended.
    """
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    (first,) = json.loads(sys.stdin.readline())
    out.write(json.dumps([{"code": _command(first["arguments"]), "told": ""}]) + "\n")
    out.flush()
    for line in sys.stdin:
        children = []
        for job in json.loads(line):
            told = tempfile.TemporaryFile()
            pid = os.fork()
            if pid == 0:
                os.dup2(told.fileno(), 1)
                os.dup2(told.fileno(), 2)
                _work(job)
            children.append((pid, told, job.get("seconds")))
        began = time.monotonic()
        for pid, _, seconds in sorted((c for c in children if c[2] is not None), key=lambda c: c[2]):
            time.sleep(max(0.0, began + seconds - time.monotonic()))
            os.kill(pid, signal.SIGKILL)
        ends = []
        for pid, told, _ in children:
            _, status = os.waitpid(pid, 0)
            told.seek(0)
            ends.append({"code": os.waitstatus_to_exitcode(status), "told": told.read().decode(errors="replace")})
            told.close()
        out.write(json.dumps(ends) + "\n")
        out.flush()


def _work(job: dict[str, Any]) -> None:
    """Carry out a job in a forked process, and end the process."""
    code = 70
    try:
        if "limit" in job:
            resource.setrlimit(resource.RLIMIT_FSIZE, (job["limit"], job["limit"]))
        _arm(job)
        if "base" in job:
            _first_use(job)
            code = 0
        else:
            code = _command(job["arguments"])
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _command(arguments: list[str]) -> int:
    """Run a command in this process, and return its exit code."""
    from tunediff.cli.main import main

    sys.argv = ["tunediff", *arguments]
    try:
        main()
    except SystemExit as stop:
        return stop.code or 0
    return 0


def _arm(job: dict[str, Any]) -> None:
    """Have the process kill itself at a point that the job names.

    renames   right before (or, with `after`, right after) so many files are put in their places
    file      count only files of this name
    bytes     right before so many files are flushed, with this share of the file's bytes written
    """
    left, share = [job.get("renames", 1 << 30)], job.get("bytes")
    replace, fsync = os.replace, os.fsync

    def replaced(source: Any, target: Any) -> None:
        counted = share is None and job.get("file") in (None, Path(target).name)
        left[0] -= counted
        if counted and left[0] <= 0 and not job.get("after"):
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)
        if counted and left[0] <= 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def flushed(number: int) -> None:
        if share is not None and os.path.isfile(f"/proc/self/fd/{number}"):
            left[0] -= 1
            if left[0] <= 0:
                with contextlib.suppress(OSError):
                    os.ftruncate(number, int(share * os.fstat(number).st_size))
                os.kill(os.getpid(), signal.SIGKILL)
        fsync(number)

    os.replace, os.fsync = replaced, flushed


def _first_use(job: dict[str, Any]) -> None:
    """Use the embedded base for the first time; its package is a tiny model's folder, which takes a moment to fetch."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tunediff.models import shipped

    def load(path: Path) -> tuple[Any, Any]:
        time.sleep(0.05)
        return AutoModelForCausalLM.from_pretrained(job["base"]), AutoTokenizer.from_pretrained(job["base"])

    shipped._fetch, shipped.load_gguf = (lambda scratch, name: scratch), load
    shipped.cache_folder = lambda: Path(job["cache"])
    AutoModelForCausalLM.from_pretrained(shipped.base_folder())


# -- runs ----------------------------------------------------------------------------------------------------------


class Bench:
    """A tiny pair, and its undisturbed run."""

    def __init__(self, root: Path, server: Server):
        import tiny_world

        self.root, self.server = root, server
        self.world = tiny_world.make(root / "world")
        self.whole = root / "whole"
        self.diff(self.whole)
        began = time.monotonic()
        self.diff(self.fresh("timed"))
        self.seconds = time.monotonic() - began
        self.record = self.result(self.whole)
        self.files = self.contents(self.whole)

    def arguments(self, run: Path, verb: str = "diff", **settings: Any) -> list[str]:
        """The command of a run."""
        if verb in ("report", "revert"):
            return [verb, str(run)]
        changed = {**SMALL, **settings}
        command = [verb, self.world.base, self.world.tuned, "--runs", run.parent, "--run", run.name, "-q"]
        return list(map(str, [*command, *self.world.sets(**changed)]))

    def diff(self, run: Path, **settings: Any) -> None:
        """Carry out a diff without disturbance."""
        end = self.server.run({"arguments": self.arguments(run, **settings)})[0]
        assert end["code"] == 0, end["told"]

    def result(self, run: Path) -> dict[str, Any]:
        """The record of a run, without what differs from one undisturbed run to another."""
        from tunediff.core.artifacts import read_json

        record = read_json(run / "diff.json")
        for stage in record["stages"]:
            stage["seconds"] = 0
        return record

    def contents(self, run: Path) -> dict[str, bytes]:
        """The bytes of all files of a run's stages by their paths; how long they took is no part of them."""
        return {
            str(path.relative_to(run)): path.read_bytes()
            for path in sorted(run.glob("*/**/*"))
            if path.is_file() and path.name != "took.json"
        }

    def fault(self, run: Path) -> str:
        """How a run differs from the undisturbed one; empty if it does not."""
        if self.result(run) != self.record:
            return "another record"
        files = self.contents(run)
        odd = sorted(name for name in files.keys() | self.files.keys() if files.get(name) != self.files.get(name))
        return f"other files: {odd[:3]}" if odd else ""

    def fresh(self, name: str) -> Path:
        """The folder of a run that has not begun."""
        run = self.root / "runs" / name
        shutil.rmtree(run, ignore_errors=True)
        return run

    # -- kills ---------------------------------------------------------------------------------------------------------

    def kills(self, count: int, seed: int = 0) -> dict[str, Tally]:
        """Kill runs `count` times or a few more, go on each time, and compare what comes out in the end.

        A third are killed between files, a third within a file's bytes, and a third at any time. One more run is killed at
        the end of every stage.
        """
        rng = random.Random(seed)

        def files() -> dict[str, Any]:
            return {"renames": rng.randint(1, 5), "after": rng.random() < 0.5}

        def bytes_() -> dict[str, Any]:
            return {"renames": rng.randint(1, 5), "bytes": rng.random()}

        def times() -> dict[str, Any]:
            return {"seconds": rng.uniform(0.1, 1.2) * self.seconds}

        kinds = {"between two files": files, "within a file": bytes_, "at any time": times}
        tallies = {
            "after every stage": self._killed(
                "stage", 1, lambda: {"renames": 1, "file": "manifest.json", "after": True}
            )
        }
        for name, fault in kinds.items():
            tallies[name] = self._killed(name.replace(" ", "-"), count // len(kinds), fault)
        return tallies

    def _killed(self, name: str, count: int, fault: Any) -> Tally:
        tally, round_ = Tally(), 0
        while tally.tries < count:
            run, killed, end = self.fresh(f"killed-{name}-{round_}"), 0, -signal.SIGKILL
            while end == -signal.SIGKILL:
                # On a machine that has become slow, it would be killed for ever: after so many times it is left alone.
                began, disturbed = time.monotonic(), fault() if killed < 60 else {}
                (ended,) = self.server.run({"arguments": self.arguments(run), **disturbed})
                end, killed = ended["code"], killed + (ended["code"] == -signal.SIGKILL)
            if not killed:  # the machine has become quicker, so the next ones are killed sooner
                self.seconds = min(self.seconds, time.monotonic() - began)
            wrong = ended["told"][-300:] if end else self.fault(run)
            for _ in range(killed):
                tally.count("the same bytes" if not wrong else wrong, not wrong, run.name)
            round_ += 1
            shutil.rmtree(run)
        return tally

    # -- races ---------------------------------------------------------------------------------------------------------

    def races(self, count: int, seed: int = 0) -> Tally:
        """Start two to four processes in one new run's folder, `count` times; in every third race one is killed."""
        rng, tally = random.Random(seed), Tally()
        for number in range(count):
            run = self.fresh(f"race-{number}")
            jobs = [{"arguments": self.arguments(run)} for _ in range(2 + number % 3)]
            if number % 3 == 2:
                jobs[0]["seconds"] = rng.uniform(0.2, 1.0) * self.seconds
            ends = self.server.run(*jobs)
            wrong = [end["told"][-300:] for end in ends[number % 3 == 2 :] if end["code"]]
            wrong = wrong or list(filter(None, [self.fault(run)]))
            tally.count("the same bytes" if not wrong else wrong[0], not wrong, run.name)
            shutil.rmtree(run)
        return tally

    def first_uses(self, count: int, seed: int = 0) -> Tally:
        """Have four processes use the embedded base for the first time at once, until `count` have; one is killed at times."""
        rng, tally, number = random.Random(seed), Tally(), 0
        while tally.tries < count:
            cache = self.root / f"cache-{number}"
            jobs: list[dict[str, Any]] = [{"base": str(self.world.base), "cache": str(cache)} for _ in range(4)]
            if number % 3 == 2:
                jobs.append({**jobs[0], "seconds": rng.uniform(0.0, 0.3)})
            for end in self.server.run(*jobs)[:4]:
                tally.count("loaded" if not end["code"] else end["told"][-300:], not end["code"], cache.name)
            left = [path.name for path in cache.rglob(".*")]
            if left:
                tally.bad.append(f"{cache.name}: left behind {left}")
            number += 1
        return tally

    # -- damage --------------------------------------------------------------------------------------------------------

    def damages(self, every: int = 1, seed: int = 0) -> dict[str, Tally]:
        """Damage every file of a run in every way, or every n-th of these cases, and run the same command again.

        finished    the whole run is there
        upstream    only the stage of the file, and those before it, are there
        unfinished  a run was killed, and a file that it would go on from is damaged
        """
        rng = random.Random(seed)
        other = self.fresh("other")
        self.diff(other, seed=1)
        cases = [
            (state, name, damage)
            for state in ("finished", "upstream")
            for name in sorted([*self.files, "diff.json", "plan.toml"])
            for damage in DAMAGES
            if self._applies(state, name, damage)
        ]
        tallies = {state: Tally() for state in ("finished", "upstream", "unfinished")}
        for state, name, damage in cases[rng.randrange(every) :: every]:
            run = self.fresh("damaged")
            shutil.copytree(self.whole, run)
            if state == "upstream":
                self._forget_after(run, name.split("/")[0])
            _damage(run / name, damage, self._counterpart(other, name), rng)
            self._tried(tallies[state], run, name, f"{state} {name} {damage}")
        for number, (file, damage) in enumerate(
            (file, damage) for file in UNFINISHED for damage in DAMAGES if damage != "swap"
        ):
            if number % every:
                continue
            run = self.fresh("damaged")
            self.server.run({"arguments": self.arguments(run), "renames": 1, "file": UNFINISHED[file], "after": True})
            found = next(iter(run.rglob(file)))
            if damage == "nan" and found.suffix != ".safetensors":
                continue
            _damage(found, damage, None, rng)
            self._tried(tallies["unfinished"], run, file, f"unfinished {file} {damage}")
        return tallies

    def _applies(self, state: str, name: str, damage: str) -> bool:
        if damage == "nan" and not name.endswith(".safetensors"):
            return False
        return state == "finished" or "/" in name

    def _tried(self, tally: Tally, run: Path, name: str, what: str) -> None:
        """Go on with a damaged run: it must end with the undisturbed record, or be refused in four lines."""
        if name in ("diff.json", "plan.toml"):  # what only these commands read
            verb = {"diff.json": "report", "plan.toml": "revert"}[name]
            (end,) = self.server.run({"arguments": self.arguments(run, verb)})
            self._ended(tally, end, f"{what}, {verb}", "")
        (end,) = self.server.run({"arguments": self.arguments(run)})
        self._ended(tally, end, what, "" if end["code"] else self.fault(run))

    def _ended(self, tally: Tally, end: dict[str, Any], what: str, wrong: str) -> None:
        told = end["told"].strip().splitlines()
        error = [n for n, line in enumerate(told) if line.startswith("error: ")]
        if end["code"] == 0:
            tally.count(wrong or ("made again" if "made again" in end["told"] else "the same"), not wrong, what)
        else:
            refused = end["code"] == 2 and bool(error) and len(told) - error[0] <= 4
            tally.count("refused by name" if refused else end["told"][-300:], refused, what)

    def _forget_after(self, run: Path, stage: str) -> None:
        """Remove what was made after a stage, as if the run had been stopped there."""
        for path in (run / "diff.json", run / "report.html"):
            path.unlink()
        made = {path.parent: path.stat().st_mtime_ns for path in self.whole.glob("*/*/manifest.json")}
        last = max(time for folder, time in made.items() if folder.parent.name == stage)
        for folder, time_ in made.items():
            if time_ > last:
                shutil.rmtree(run / folder.relative_to(self.whole))

    def _counterpart(self, other: Path, name: str) -> Path | None:
        """The file of another run that stands where `name` does; its key is another one."""
        parts = name.split("/")
        if len(parts) == 1:
            return other / name
        here = sorted(path.name for path in (self.whole / parts[0]).iterdir())
        there = sorted(path for path in (other / parts[0]).iterdir() if not path.name.startswith("."))
        like = [path / "/".join(parts[2:]) for path in there]
        found = [path for path in like if path.is_file()]
        place = here.index(parts[1])
        return like[place] if place < len(like) and like[place].is_file() else found[0] if found else None


UNFINISHED = {
    "shard-00000.safetensors": "shard-00001.safetensors",
    "work.json": "shard-00001.safetensors",
    "checkpoint.safetensors": "checkpoint.safetensors",
    "trial-000.json": "trial-001.json",
}
"""Files that an unfinished run is gone on from, and the file after which it is killed."""


def _damage(path: Path, how: str, other: Path | None, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    if how == "flip":
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif how == "nan":  # the last number of the last tensor
        start = 8 + struct.unpack("<Q", data[:8])[0]
        data[max(start, len(data) - 4) :] = struct.pack("<f", float("nan"))
    elif how == "cut":
        del data[rng.randrange(1, len(data)) :]
    elif how == "empty":
        data.clear()
    elif how == "swap":
        if other is not None:
            data = bytearray(other.read_bytes())
    path.unlink()
    if how != "gone":
        path.write_bytes(data)


def table(tallies: dict[str, Tally]) -> str:
    """Tallies as a Markdown table."""
    rows = [f"| {name} | {t.tries} | {t.good} |" for name, t in tallies.items()]
    return "\n".join(["| | tries | as promised |", "|---|---|---|", *rows])


def main() -> None:
    """Run everything, print the table and every try that did not end as promised, and write them to a file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--kills", type=int, default=120)
    parser.add_argument("--races", type=int, default=50)
    parser.add_argument("--first", type=int, default=24, help="processes that use the embedded base first")
    parser.add_argument("--every", type=int, default=1, help="try every n-th damage")
    given = parser.parse_args()
    sys.path.append(str(TESTS))
    with tempfile.TemporaryDirectory() as root, serving() as server:
        bench = Bench(Path(root), server)
        tallies = {f"killed {name}": tally for name, tally in bench.kills(given.kills).items()}
        tallies["raced by two to four processes"] = bench.races(given.races)
        tallies["first use of the embedded base"] = bench.first_uses(given.first)
        tallies |= {f"damaged, {name}": tally for name, tally in bench.damages(given.every).items()}
    print(table(tallies))
    for name, tally in tallies.items():
        print(name, tally.ends, *tally.bad, sep="\n  ")
    given.out.write_text(json.dumps({name: vars(tally) for name, tally in tallies.items()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
