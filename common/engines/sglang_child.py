"""What a process that SGLang spawned does before anything of SGLang is imported."""

import os
from typing import Any

from common.engines.die_with_parent import die_with_named_parent
from common.engines.sglang_cpu import FLAG, activate

LOOPBACK = "INFERENCE_LOOPBACK"  # in the environment: whether nobody else's machine is to reach the process


def prepare() -> None:
    """End with the engine, run on the CPU if it does, and listen to this machine alone if it does."""
    die_with_named_parent()
    if os.environ.get(FLAG) == "1":
        activate()
    if os.environ.get(LOOPBACK):
        _listen_here_alone()


def _listen_here_alone() -> None:
    """SGLang binds its publishers to all addresses: one that it is told it takes for a reader's, and connects to it."""
    import zmq

    bind = zmq.Socket.bind

    def bind_here(socket: zmq.Socket[Any], address: str) -> Any:
        return bind(socket, address.replace("//*:", "//127.0.0.1:"))

    zmq.Socket.bind = bind_here  # type: ignore[assignment,method-assign]
