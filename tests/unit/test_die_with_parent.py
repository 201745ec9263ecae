"""No process outlives the one that spawned it."""

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

PROGRAM = """
import multiprocessing, os, time
from common.engines.die_with_parent import die_with_named_parent, name_parent
if __name__ == "__mp_main__":
    parent = os.getppid()
    print(os.getpid(), flush=True)
    while {early} and os.getppid() == parent:
        time.sleep(0.01)
    die_with_named_parent()
print("here", flush=True)
if __name__ == "__main__":
    name_parent()
    child = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(600,))
    child.start()
    child.join()
"""


@pytest.mark.parametrize("early", [True, False])
def test_a_child_ends_with_its_parent(tmp_path: Path, early: bool) -> None:
    """early: the parent is killed before the child has asked the kernel for it."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.format(early=early))
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    parent = subprocess.Popen([sys.executable, program], stdout=subprocess.PIPE, text=True, env=env)
    assert parent.stdout and parent.stdout.readline() == "here\n"
    child = psutil.Process(int(parent.stdout.readline()))
    try:
        if not early:
            assert parent.stdout.readline() == "here\n"
        parent.kill()
        deadline = time.monotonic() + 30
        while child.is_running() and child.status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < deadline, "the child is still there"
            time.sleep(0.01)
    finally:
        parent.kill()
        parent.wait()
        parent.stdout.close()
        if child.is_running():
            child.kill()
