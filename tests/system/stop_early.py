"""Runs an engine without a pipeline, stops a request that has not reached SGLang's scheduler, and prints how it ends.

A paused SGLang holds new requests back, which is where one is for an instant otherwise.
"""

import asyncio

from common import parent  # noqa: F401  for SGLang's own processes, as in engine.py
from common.messages import GenerateRequest, SamplingOptions, StopConditions
from common.sglang_engine import SglangEngine
from engine import arguments

from dynamo.runtime import Context


async def main() -> None:
    engine = SglangEngine.start(arguments().parse_args([]), instance_id=1, on_sigterm=lambda: None)
    try:
        manager = engine._engine.tokenizer_manager
        manager.is_pause = True
        context = Context()
        request = GenerateRequest(
            token_ids=[1, 2, 3],
            model=engine.info.model,
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
