"""SGLang as a worker of Dynamo's protocol: token ids in, token ids out."""

import asyncio
import json
import logging
import os
import random
import re
import secrets
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from tempfile import TemporaryDirectory
from typing import Any

from common.engines import sglang_cpu
from common.engines.die_with_parent import name_parent
from common.engines.ports import LOCAL, loopback, reserved
from common.engines.sglang_child import LOOPBACK
from common.errors import Internal, InvalidRequest, Overloaded
from common.kv_events import load_stats
from common.log import log_request
from common.messages import (
    EngineOutput,
    GenerateRequest,
    ModelIdentity,
    PromptTokensDetails,
    SamplingOptions,
    Usage,
    WorkerInfo,
)

from dynamo.llm import (
    KvEventPublisher,
    ModelInput,
    ModelRuntimeConfig,
    ModelType,
    WorkerMetricsPublisher,
    WorkerType,
    register_model,
    unregister_model,
)
from dynamo.runtime import Context, Endpoint

log = logging.getLogger(__name__)

TOPIC = "kv-events"
CPU_CACHE_BYTES = 2**30  # memory for the KV cache of an engine on a CPU
CPU_CACHE_TOKENS = 65536  # at most, which is a lot for what a CPU can serve
CPU_REQUESTS = 16  # decoded together; more only take each other's time
HEAD_WIDTHS = (64, 128, 256)  # that the kernels take which SGLang chooses on most GPUs; Triton's take any
RESERVED_BLOCKS = 4  # that a request must leave over in SGLang's KV cache, or 0.5.21 never schedules it
DISPATCH_SECONDS = 0.05  # between looks whether SGLang's scheduler has a request


class SglangEngine:
    """One SGLang engine: what it announces, and how it is asked."""

    def __init__(self, engine: Any, model_path: str, info: WorkerInfo, *, seeded: bool, min_p: bool) -> None:
        self._engine = engine
        self._model_path = model_path
        self._seeded = seeded
        self._min_p = min_p
        self.info = info

    @classmethod
    def start(
        cls,
        instance_id: int,
        *,
        model_path: str,
        identity: ModelIdentity,
        worker_id: str | None,
        host: str,
        stream_interval: int,
        gpu_memory_fraction: float | None,
        deterministic: bool,
    ) -> "SglangEngine":
        """Load the model and start SGLang's processes, which takes from seconds on a CPU to minutes on a GPU.

        model_path: what `resolve_model` found; host: where routers reach this machine; stream_interval: tokens in a
        message; gpu_memory_fraction: of the GPU, None for SGLang to decide.
        """
        # Else the temperature is part of them, and they say how likely a token was made and not what the model thinks.
        os.environ.setdefault("SGLANG_RETURN_ORIGINAL_LOGPROB", "1")
        log.info("importing SGLang")
        import torch

        cpu = not torch.cuda.is_available()
        if cpu:
            log.info("no GPU found, so SGLang runs on the CPU")
            sglang_cpu.activate()
        import sglang

        log.info("loading %s", model_path)
        name_parent()
        block_size = identity.block_size
        with reserved(3) as (events, replay, load), TemporaryDirectory() as folder:
            # Its processes are all on this machine, but PyTorch's ways to bring them together would tell the network.
            os.environ |= {
                LOOPBACK: "1" if host in LOCAL else "",
                "GLOO_SOCKET_IFNAME": "lo",
                "SGLANG_DISTRIBUTED_INIT_METHOD_OVERRIDE": f"file://{folder}/rendezvous",
                "MASTER_ADDR": "127.0.0.1",  # these two name its shared memory, on some CPUs
                "MASTER_PORT": str(load),
            }
            kv_events = {
                "publisher": "zmq",
                "topic": TOPIC,
                "endpoint": f"tcp://*:{events}",
                "replay_endpoint": f"tcp://*:{replay}",
            }
            engine = sglang.Engine(
                model_path=model_path,
                # For the grammars that force the form of an answer; nothing else here needs the tokenizer.
                skip_tokenizer_init=False,
                grammar_backend="xgrammar",
                constrained_json_disable_any_whitespace=True,  # or small models fill an answer with it
                page_size=block_size,
                stream_interval=stream_interval,
                incremental_streaming_output=True,
                enable_deterministic_inference=cpu or deterministic,
                kv_events_config=json.dumps(kv_events),
                load_publish_endpoint=f"tcp://*:{load}",
                log_level="error" if cpu else "warning",  # the stand-ins make it warn of models that need more
                **(_cpu_options(model_path) if cpu else _gpu_options(model_path, gpu_memory_fraction)),
            )
        cache_tokens = engine._scheduler_init_result.scheduler_infos[0]["max_total_num_tokens"]
        info = WorkerInfo(
            instance_id=instance_id,
            worker_id=worker_id or str(instance_id),
            model=identity,
            total_blocks=cache_tokens // block_size,
            context_length=min(engine.tokenizer_manager.context_len, cache_tokens - RESERVED_BLOCKS * block_size),
            kv_events=f"tcp://{host}:{events}",
            kv_replay=f"tcp://{host}:{replay}",
            load=f"tcp://{host}:{load}",
        )
        return cls(engine, model_path, info, seeded=cpu or deterministic, min_p=cpu or not deterministic)

    async def warm_up(self) -> None:
        """Have a token made: SGLang compiles some kernels only for its first one, which takes seconds on a GPU."""
        params = {"max_new_tokens": 2, "ignore_eos": True}
        await self._engine.async_generate(input_ids=[0], sampling_params=params)

    async def generate(self, request: GenerateRequest, context: Context) -> AsyncGenerator[EngineOutput]:
        """Yield the answer's tokens as they are made. Stopping `context` aborts the request in SGLang."""
        params = self._sampling_params(request)
        logprobs = request.output_options.logprobs
        if context.is_stopped():
            return
        # SGLang aborts every request whose id begins with the one that is named, so no id may begin another.
        rid = f"{context.id()}.{secrets.token_hex(4)}"
        abort = asyncio.create_task(self._abort_when_stopped(context, rid))
        try:
            chunks = await self._engine.async_generate(
                input_ids=request.token_ids,
                sampling_params=params,
                return_logprob=logprobs is not None,
                top_logprobs_num=logprobs or 0,
                rid=rid,
                stream=True,
            )
            async with aclosing(chunks):  # which ends the request in SGLang if it has not ended
                first = True
                async for chunk in chunks:
                    output = _output(chunk, first)
                    first = False
                    if reason := output.finish_reason:
                        tokens = chunk["meta_info"].get("completion_tokens", 0)
                        log_request(log, context, finish_reason=reason, completion_tokens=tokens)
                    yield output
        except ValueError as error:
            raise InvalidRequest(str(error)) from error
        finally:
            abort.cancel()

    async def connect(self, endpoint: Endpoint) -> None:
        """Make the publishers for Dynamo's event plane. Comes before the Service, which takes SIGTERM for itself."""
        self._metrics = WorkerMetricsPublisher()
        await self._metrics.create_endpoint(endpoint)
        address = loopback(self.info.kv_events)
        block_size = self.info.model.block_size
        self._relay = KvEventPublisher(endpoint, kv_block_size=block_size, zmq_endpoint=address, zmq_topic=TOPIC)
        # Else with the first request: this takes SIGTERM too, to end the process in SGLang's own way.
        self._engine.tokenizer_manager.auto_create_handle_loop()

    async def publish(self, endpoint: Endpoint, *, register: bool) -> None:
        """Tell Dynamo's event plane of the KV events and the load; with `register`, also make the model known to
        Dynamo's own frontend and router. Runs until cancelled."""
        try:
            if register:
                await self._register(endpoint)
            async for stat in load_stats(loopback(self.info.load)):
                blocks = stat.used_tokens // self.info.model.block_size
                self._metrics.publish(active_decode_blocks=blocks, kv_used_blocks=blocks)
        finally:
            self._relay.shutdown()
            if register:
                await unregister_model(endpoint)

    async def _register(self, endpoint: Any) -> None:
        config = ModelRuntimeConfig()
        config.context_length = self.info.context_length
        config.total_kv_blocks = self.info.total_blocks
        await register_model(
            ModelInput.Tokens,
            ModelType.Chat | ModelType.Completions,
            endpoint,
            self._model_path,
            model_name=self.info.model.name,
            kv_cache_block_size=self.info.model.block_size,
            runtime_config=config,
            worker_type=WorkerType.Aggregated,
        )
        log.info("registered %s with Dynamo", self.info.model.name)

    def close(self) -> None:
        """End SGLang's processes."""
        self._engine.shutdown()

    def _sampling_params(self, request: GenerateRequest) -> dict[str, Any]:
        stop, prompt = request.stop_conditions, len(request.token_ids)
        if not prompt:
            raise InvalidRequest("the prompt is empty")
        room = self.info.context_length - prompt
        if room < (stop.max_tokens or 1):
            raise InvalidRequest(
                f"worker {self.info.worker_id} holds {self.info.context_length} tokens; the prompt has {prompt} and "
                f"{stop.max_tokens or 1} were asked for",
                code="context_length_exceeded",
            )
        if request.sampling_options.min_p and not self._min_p:
            raise InvalidRequest("this worker runs with --deterministic, which SGLang 0.5.21 cannot do with min_p")
        params: dict[str, Any] = {
            "max_new_tokens": stop.max_tokens or room,
            "min_new_tokens": stop.min_tokens or 0,
            "ignore_eos": bool(stop.ignore_eos),
            "stop_token_ids": [*(stop.stop_token_ids or ()), *(() if stop.ignore_eos else request.eos_token_ids)],
        }
        return params | _sampling_options(request.sampling_options, self._seeded)

    async def _abort_when_stopped(self, context: Context, rid: str) -> None:
        """SGLang sends an abort only once, even if its scheduler has not seen the request yet: wait for that."""
        manager = self._engine.tokenizer_manager
        await context.async_killed_or_stopped()
        while not ((state := manager.rid_to_state.get(rid)) and state.dispatched):
            await asyncio.sleep(DISPATCH_SECONDS)
        manager.abort_request(rid)


def _sampling_options(options: SamplingOptions, seeded: bool) -> dict[str, Any]:
    """Dynamo's sampling options in SGLang's names, without those that are not set."""
    params = {name: value for name, value in options if value is not None}
    params |= _grammar(params.pop("guided_decoding", {}))
    seed = params.pop("seed", None)
    if seeded:  # SGLang then gives every request that names no seed the same one
        params["sampling_seed"] = random.getrandbits(63) if seed is None else seed
    return params


def _grammar(form: dict[str, Any]) -> dict[str, str]:
    """The form that an answer must have, in SGLang's names; {} if it is free."""
    match form:
        case {"json": schema}:
            return {"json_schema": json.dumps(schema)}
        case {"regex": regex}:
            return {"regex": regex}
        case {"choice": choices}:
            return {"regex": "|".join(f"({re.escape(choice)})" for choice in choices)}
        case {"grammar": grammar}:
            return {"ebnf": grammar}
        case {"structural_tag": tag}:
            return {"structural_tag": json.dumps(tag)}
    return {}


def _output(chunk: dict[str, Any], first: bool) -> EngineOutput:
    """One of SGLang's chunks in Dynamo's words."""
    meta = chunk["meta_info"]
    finish = meta["finish_reason"] or {}
    reason = finish.get("type")
    if reason == "abort":
        _raise_if_failed(finish)
        reason = "cancelled"
    output = EngineOutput(token_ids=list(chunk["output_ids"]), finish_reason=reason)
    if (first or reason) and "prompt_tokens" in meta:  # which a request that was aborted in the queue does not have
        usage = Usage(
            prompt_tokens=meta["prompt_tokens"],
            completion_tokens=meta["completion_tokens"],
            total_tokens=meta["prompt_tokens"] + meta["completion_tokens"],
            prompt_tokens_details=PromptTokensDetails(cached_tokens=meta["cached_tokens"]),
        )
        output.completion_usage = usage.encode()
    if logprobs := meta.get("output_token_logprobs"):
        output.log_probs = [logprob for logprob, _, _ in logprobs]
        output.top_logprobs = [_ranked(top or ()) for top in meta.get("output_top_logprobs") or ()] or None
    return output


def _ranked(likeliest: Sequence[tuple[float, int, object]]) -> list[dict[str, Any]]:
    return [{"rank": rank, "token_id": token, "logprob": value} for rank, (value, token, _) in enumerate(likeliest, 1)]


def _raise_if_failed(finish: dict[str, Any]) -> None:
    """SGLang ends a request that it could not run as aborted too, with an HTTP status."""
    status = finish.get("status_code")
    if status is None:
        return
    kind = {400: InvalidRequest, 429: Overloaded, 503: Overloaded}.get(int(status), Internal)
    raise kind(finish.get("message") or "SGLang gave the request up")


def _gpu_options(model_path: str, memory_fraction: float | None) -> dict[str, Any]:
    options: dict[str, Any] = {} if memory_fraction is None else {"mem_fraction_static": memory_fraction}
    *_, width = _key_value_shape(model_path)
    if width not in HEAD_WIDTHS:
        options["attention_backend"] = "triton"
    return options


def _key_value_shape(model_path: str) -> tuple[int, int, int]:
    """How many layers the model has, heads with keys and values of their own in each, and numbers in each of those."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model_path).get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_hidden_layers, heads, width


def _cpu_options(model_path: str) -> dict[str, Any]:
    """What makes SGLang run without a GPU. float32, because its sums come out the same whatever runs beside them."""
    layers, heads, width = _key_value_shape(model_path)
    bytes_per_token = layers * heads * width * 2 * 4  # keys and values, of four bytes
    return {
        "device": "cpu",
        "dtype": "float32",
        "attention_backend": "torch_native",
        "disable_overlap_schedule": True,
        "disable_cuda_graph": True,
        "max_total_tokens": min(CPU_CACHE_TOKENS, CPU_CACHE_BYTES // bytes_per_token),
        "max_running_requests": CPU_REQUESTS,
        "sleep_on_idle": True,  # or its scheduler takes a whole core to wait
    }
