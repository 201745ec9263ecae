"""Ends a process when the one that started it ends, however that went."""

import ctypes
import os
import signal

PARENT = "INFERENCE_PARENT_PID"  # in the environment of a process, as its parent set it
PR_SET_PDEATHSIG = 1  # of prctl(2)

_libc = ctypes.CDLL(None)  # before a fork, where loading a library is not safe


def die_with(parent: int, number: signal.Signals = signal.SIGKILL) -> None:
    """Have the kernel send this process a signal when `parent` ends. If it has ended already, leave at once."""
    _libc.prctl(PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:
        os._exit(1)


def name_parent() -> None:
    """Let the processes that this one spawns know whose children they are."""
    os.environ[PARENT] = str(os.getpid())


def die_with_named_parent() -> None:
    """For a process that was spawned after `name_parent`. SGLang's own ask the kernel for this themselves, but only
    after seconds of loading: an engine that is killed in that time would leave them behind, and its GPU taken."""
    die_with(int(os.environ[PARENT]))
    name_parent()
