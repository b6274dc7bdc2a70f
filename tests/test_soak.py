"""The soak tests, shortened: killed runs, damaged files and memory."""

import os
import subprocess
import sys

import pytest
from conftest import REPO

from tests.soak import fuzz, hostile, kill


@pytest.mark.skipif(os.name != "posix", reason="sends a POSIX signal")
def test_killed_runs_go_on_as_if_they_had_not_been(tmp_path, monkeypatch):
    monkeypatch.setattr(kill, "EPOCHS", 10)
    writing, _ = kill.soak(2, tmp_path, lives=2)
    assert writing >= 1


def test_damaged_files_are_read_or_named(tmp_path):
    found = fuzz.soak(180, tmp_path)
    assert found["PNG", "cut", "refused"] == 10


def test_mutated_checkpoints_are_an_answer_or_one_line(tmp_path):
    found = hostile.soak(18, tmp_path)
    assert found["value", "read"] and found["value", "refused"] and found["bytes", "refused"]


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs Linux's /proc")
def test_memory_stays_flat_over_many_predictions():
    command = [sys.executable, "-m", "tests.soak.memory", "--predictions", "1600"]  # alone: others leave memory behind
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
