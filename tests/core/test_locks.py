"""One process at a time: whoever waits is told for whom, and the dead hold nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import pytest

from tunediff.core import locks
from tunediff.core.errors import ArtifactError

HOLDER = """
import sys, time
from pathlib import Path
from tunediff.core.locks import held
with held(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock of the folder ``work``."""
    child = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path / "work")], stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "held\n"
    yield child
    child.kill()
    child.wait()
    child.stdout.close()


def test_who_waits_says_for_whom_and_a_dead_holders_lock_is_taken(holder, tmp_path, capsys):
    threading.Timer(0.3, holder.send_signal, [signal.SIGKILL]).start()
    with locks.held(tmp_path / "work"):
        assert holder.wait() == -signal.SIGKILL
        assert f'"pid": {os.getpid()}' in (tmp_path / ".work.lock").read_text()
    told = capsys.readouterr().err
    assert told.startswith(f"waiting for process {holder.pid} on ") and f"makes {tmp_path / 'work'}" in told
    assert told.count("\n") == 1 and list(tmp_path.iterdir()) == []


def test_threads_take_turns(tmp_path):
    inside, most = [], []

    def work() -> None:
        for _ in range(50):
            with locks.held(tmp_path / "work"):
                inside.append(1)
                most.append(len(inside))
                inside.pop()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(most) == {1} and len(most) == 200 and list(tmp_path.iterdir()) == []


def test_a_lock_that_the_dead_left_is_swept_and_a_held_one_stays(holder, tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / ".left.lock").write_text("")
    locks.sweep(tmp_path)
    assert [path.name for path in tmp_path.glob("**/.*.lock")] == [".work.lock"]


@pytest.mark.parametrize("error, told", [(95, "without locks"), (5, "Input/output error")])
def test_a_file_system_without_locks_is_told_and_worked_on(tmp_path, monkeypatch, capsys, error, told):
    def flock(number: int, how: int) -> None:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(locks.fcntl, "flock", flock)
    try:
        with locks.held(tmp_path / "work"):
            assert told in capsys.readouterr().err
    except ArtifactError as refused:
        assert refused.got == told


def test_a_folder_that_cannot_be_written_has_no_lock(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="could not be written"), locks.held(tmp_path / "file" / "work"):
        pass
