"""Ends a process that the engine library spawned when its parent ends, however that went. Import it first.

SGLang's processes ask the kernel for this themselves, but only after seconds of loading: an engine that is killed in
that time would leave them behind, and its GPU taken. They import engine.py, and so this, before anything else.
"""

import ctypes
import os
import signal
import sys

PARENT = "INFERENCE_PARENT_PID"  # in the environment of each process, as its parent set it
PR_SET_PDEATHSIG = 1

# Where multiprocessing spawned this process, the program goes by another name than the process's own main module.
if sys.modules.get("__mp_main__", sys.modules["__main__"]) is not sys.modules["__main__"]:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if str(os.getppid()) != os.environ[PARENT]:  # it has ended already
        os._exit(1)
os.environ[PARENT] = str(os.getpid())
