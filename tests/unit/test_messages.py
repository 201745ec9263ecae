"""What crosses a process is what was meant, no more and no less."""

import json

from common.errors import InvalidRequest, StartupError
from common.messages import (
    CACHE,
    DESCRIBE_WORKER,
    FIND_WORKER,
    GENERATE,
    WORKERS,
    EngineOutput,
    FindWorkerRequest,
    GenerateRequest,
    ModelIdentity,
    OutputOptions,
    RouterStatus,
    RoutingDecision,
    SamplingOptions,
    StopConditions,
    WorkerStatus,
)
from common.openai_api import CHAT_COMPLETIONS, COMPLETE, DESCRIBE_MODEL, DETOKENIZE, PROCESS, TOKENIZE
from tests.unit.stand_ins import identity, worker_info

import pytest

BIG = 2**63 - 1


class TestMessage:
    def test_only_fields_that_were_given_are_sent(self) -> None:
        request = FindWorkerRequest(model=identity(), local_hashes=[1], tokens=3)
        model = {"name": "m", "block_size": 16, "tokenizer": None}
        assert request.encode() == {"model": model, "local_hashes": [1], "tokens": 3}
        assert EngineOutput(token_ids=[1]).encode() == {"token_ids": [1]}

    def test_what_was_sent_is_what_is_read(self) -> None:
        for message in (worker_info(), FindWorkerRequest(model=identity(), local_hashes=[2**64 - 1], tokens=3)):
            assert type(message).decode(message.encode()) == message

    def test_a_request_to_an_engine_is_sent_whole(self) -> None:
        """Dynamo's own workers require all of its fields."""
        request = GenerateRequest(
            token_ids=[1], model="m", stop_conditions=StopConditions(), sampling_options=SamplingOptions(seed=1)
        )
        sent = request.encode()
        assert sent.keys() == GenerateRequest.model_fields.keys()
        assert sent["stop_conditions"].keys() == StopConditions.model_fields.keys()
        assert sent["sampling_options"].keys() == SamplingOptions.model_fields.keys()
        assert sent["output_options"].keys() == OutputOptions.model_fields.keys()

    def test_a_field_from_a_newer_version_is_ignored(self) -> None:
        body = {**identity().encode(), "new": 1}
        assert ModelIdentity.decode(body) == identity()

    def test_a_field_that_is_wrong_is_named(self) -> None:
        with pytest.raises(InvalidRequest, match=r"^invalid FindWorkerRequest: model\.block_size: "):
            FindWorkerRequest.decode({"model": {"name": "m", "block_size": "x"}, "local_hashes": [], "tokens": 1})

    def test_an_engine_s_field_that_does_not_exist_is_refused(self) -> None:
        """It would seem to say nothing."""
        with pytest.raises(InvalidRequest, match=r"^invalid EngineOutput: there are no fields tokens_ids$"):
            EngineOutput.decode({"tokens_ids": [1]})
        assert EngineOutput.decode({"token_ids": [1], "text": None, "newer": 1}) == EngineOutput(token_ids=[1])

    def test_what_an_engine_says_goes_together_with_what_follows(self) -> None:
        first = EngineOutput(token_ids=[1], log_probs=[-1.0], top_logprobs=[[{"token_id": 1, "logprob": -1.0}]])
        first.extend(EngineOutput(token_ids=[2, 3], log_probs=[-2.0, -3.0], top_logprobs=[[], []]))
        first.extend(EngineOutput(finish_reason="stop", completion_usage={"total_tokens": 3}))
        assert first == EngineOutput(
            token_ids=[1, 2, 3],
            log_probs=[-1.0, -2.0, -3.0],
            top_logprobs=[[{"token_id": 1, "logprob": -1.0}], [], []],
            finish_reason="stop",
            completion_usage={"total_tokens": 3},
        )

    def test_without_logprobs_it_stays_without(self) -> None:
        output = EngineOutput(token_ids=[1])
        output.extend(EngineOutput(token_ids=[2]))
        assert output.encode() == {"token_ids": [1, 2]}

    def test_an_engine_s_output_always_has_its_tokens(self) -> None:
        """Dynamo's own frontend requires them (LLMEngineOutput in lib/llm/src/protocols/common/llm_backend.rs)."""
        assert EngineOutput(finish_reason="stop").encode() == {"token_ids": [], "finish_reason": "stop"}

    def test_64_bit_ids_are_strings_in_json_and_numbers_on_the_wire(self) -> None:
        worker = WorkerStatus(instance_id=BIG, worker_id="w", status="joined")
        status = RouterStatus(router=BIG, policy="kv", workers=[worker])
        sent = status.encode()
        assert (sent["router"], sent["workers"][0]["instance_id"]) == (BIG, BIG)
        shown = json.loads(status.model_dump_json())
        assert (shown["router"], shown["workers"][0]["instance_id"]) == (str(BIG), str(BIG))
        decision = RoutingDecision(instance_id=BIG, worker_id="w", overlap_blocks=0, cost=0.0)
        assert RoutingDecision.decode(decision.encode()).instance_id == BIG


class TestModelIdentity:
    @pytest.mark.parametrize(
        ("worker", "reason"),
        [
            (identity("m", tokenizer="t"), None),
            (identity("m"), None),
            (identity("n", block_size=32, tokenizer="u"), "serves n"),
            (identity("m", block_size=32, tokenizer="u"), "has KV blocks of 32 tokens (--block-size)"),
            (identity("m", tokenizer="u"), "has a different tokenizer, u and not t (--model)"),
        ],
    )
    def test_what_does_not_match_is_said(self, worker: ModelIdentity, reason: str | None) -> None:
        assert identity("m", tokenizer="t").mismatch(worker) == reason

    def test_a_request_of_unknown_tokenizer_matches_any(self) -> None:
        assert identity().mismatch(identity(tokenizer="t")) is None


class TestEndpointSpec:
    def test_the_endpoints_that_were_asked_for(self) -> None:
        ours = (CHAT_COMPLETIONS, PROCESS, COMPLETE, TOKENIZE, DETOKENIZE, DESCRIBE_MODEL)
        specs = (*ours, FIND_WORKER, WORKERS, GENERATE, DESCRIBE_WORKER, CACHE)
        assert [spec.path for spec in specs] == [
            "inference.frontend.chat_completions",
            "inference.processor.process",
            "inference.processor.complete",
            "inference.processor.tokenize",
            "inference.processor.detokenize",
            "inference.processor.describe",
            "inference.router.find_worker",
            "inference.router.workers",
            "inference.engine.generate",
            "inference.engine.describe",
            "inference.engine.cache",
        ]

    def test_another_component_can_serve_the_same(self) -> None:
        spec = PROCESS.at("inference.guard.check")
        assert spec.path == "inference.guard.check"
        assert (spec.request, spec.answer) == (PROCESS.request, PROCESS.answer)

    @pytest.mark.parametrize(
        "path", ["", "guard", "guard.process", "other.guard.process", "inference..x", "inference.a.b.c"]
    )
    def test_what_is_no_path_is_said(self, path: str) -> None:
        with pytest.raises(StartupError, match=r"give one like inference\.guard\.process"):
            PROCESS.at(path)
