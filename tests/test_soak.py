"""The soak tests, shortened: killed runs, damaged files and memory."""

import os

import pytest

from tests.soak import fuzz, kill


@pytest.mark.skipif(os.name != "posix", reason="sends a POSIX signal")
def test_killed_runs_go_on_as_if_they_had_not_been(tmp_path, monkeypatch):
    monkeypatch.setattr(kill, "EPOCHS", 15)
    writing, runs = kill.soak(2, tmp_path, lives=2)
    assert writing >= 1 and runs >= 1


def test_damaged_files_are_read_or_named(tmp_path):
    found = fuzz.soak(180, tmp_path)
    assert sum(found.values()) == 180 and found["PNG", "cut", "refused"] == 10


def test_memory_stays_flat_over_many_predictions():
    memory = pytest.importorskip("tests.soak.memory")
    if not memory.STATM.exists():
        pytest.skip("needs Linux's /proc")
    assert memory.soak(2_500) < memory.LIMIT
