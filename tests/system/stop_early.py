"""Runs an engine without a pipeline, stops a request that has not reached SGLang's scheduler, and prints how it ends.

A paused SGLang holds new requests back, which is where one is for an instant otherwise.
"""

import asyncio

from common.engines.sglang_child import prepare
from common.engines.sglang_engine import SglangEngine
from common.messages import GenerateRequest, SamplingOptions, StopConditions
from common.model import identify, resolve_model

from dynamo.runtime import Context


async def main() -> None:
    model_path = resolve_model(None)
    engine = SglangEngine.start(
        1,
        model_path=model_path,
        identity=identify(model_path),
        worker_id=None,
        host="127.0.0.1",
        stream_interval=1,
        gpu_memory_fraction=None,
        deterministic=False,
    )
    try:
        manager = engine._engine.tokenizer_manager
        manager.is_pause = True
        context = Context()
        request = GenerateRequest(
            token_ids=[1, 2, 3],
            model=engine.info.model.name,
            stop_conditions=StopConditions(ignore_eos=True),
            sampling_options=SamplingOptions(),
        )
        answer = asyncio.create_task(reason(engine, request, context))
        await asyncio.sleep(0.5)
        assert manager.rid_to_state, "SGLang does not know the request yet"
        context.stop_generating()
        await asyncio.sleep(0.5)
        async with manager.is_pause_cond:
            manager.is_pause = False
            manager.is_pause_cond.notify_all()
        print(await asyncio.wait_for(answer, 30))
    finally:
        engine.close()


async def reason(engine: SglangEngine, request: GenerateRequest, context: Context) -> object:
    return [output async for output in engine.generate(request, context)][-1].finish_reason


if __name__ == "__main__":
    asyncio.run(main())
elif __name__ == "__mp_main__":  # as in engine.py
    prepare()
