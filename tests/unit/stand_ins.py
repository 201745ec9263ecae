"""What tests make up: models, workers, and Dynamo's client of instances that live in this process."""

import gc
import json
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from common.messages import ModelIdentity, WorkerInfo
from common.routing.prefix_index import PrefixIndex

from dynamo.runtime import Context

BLOCK_SIZE = 16

Handler = Callable[[Any, Context], AsyncIterator[Any]]


def identity(name: str = "m", *, block_size: int = BLOCK_SIZE, tokenizer: str | None = None) -> ModelIdentity:
    return ModelIdentity(name=name, block_size=block_size, tokenizer=tokenizer)


def worker_info(
    instance_id: int = 1,
    *,
    model: ModelIdentity | None = None,
    worker_id: str | None = None,
    kv_events: str = "tcp://somewhere:1",
    kv_replay: str = "tcp://somewhere:2",
    load: str = "tcp://somewhere:3",
) -> WorkerInfo:
    return WorkerInfo(
        instance_id=instance_id,
        worker_id=worker_id or f"w{instance_id}",
        model=model or identity(),
        total_blocks=100,
        context_length=1600,
        kv_events=kv_events,
        kv_replay=kv_replay,
        load=load,
    )


class LocalClient:
    """Answers with a handler for each instance, which takes and yields what goes over the wire."""

    def __init__(self, handlers: Mapping[int, Handler]) -> None:
        self.handlers = dict(handlers)
        self.bodies: list[Any] = []
        self.contexts: list[Context] = []

    def instance_ids(self) -> list[int]:
        return list(self.handlers)

    async def direct(self, body: Any, instance_id: int, annotated: bool, context: Context) -> AsyncIterator[Any]:
        assert not annotated
        self.bodies.append(body)
        self.contexts.append(context)
        return self.handlers[instance_id](body, context)


def tree_blocks(index: PrefixIndex, instance_id: int) -> set[int]:
    """The ids of a worker's blocks that prompts can reach, which the index's tree has, and no others."""
    events = [
        event for event in map(json.loads, index._tree.dump_tree_as_events()) if event["worker_id"] == instance_id
    ]
    nodes = {block["block_hash"] for event in events for block in event["event"]["data"]["stored"]["blocks"]}
    blocks = index._caches[instance_id].blocks if instance_id in index._caches else {}
    reached = {
        name: block.sequence_hash for name, block in blocks.items() if name is not None and block.sequence_hash >= 0
    }
    assert nodes == set(reached.values())
    return set(reached)


@contextmanager
def without_garbage_collection() -> Iterator[None]:
    """What goes while the block runs has gone by itself: nothing had to find out that it only holds itself."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
