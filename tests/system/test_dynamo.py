"""Our parts work with Dynamo's own: its workers in our pipeline, its router over our engines."""

import json
import sys

from common.engines.ports import free_ports
from common.model import DEFAULT_MODEL
from tests.system.conftest import BIN, Cluster, Pipeline, until

import httpx

DYNAMO = BIN.parent / "ai-dynamo"  # where scripts/install --dev puts the ai-dynamo package, apart from everything else


def test_dynamo_s_mocker_answers_through_our_pipeline(cluster: Cluster) -> None:
    """A worker that announces nothing: it is routed to by load alone."""
    cluster.run(
        "mocker",
        sys.executable,
        *("-m", "dynamo.mocker", "--model-path", str(DEFAULT_MODEL), "--model-name", Pipeline.model),
        *("--endpoint", "dyn://inference.engine.generate", "--num-workers", "2", "--block-size", "16"),
        *("--discovery-backend", "etcd", "--request-plane", "nats", "--event-plane", "nats"),
        env={"PYTHONPATH": str(DYNAMO)},
    )
    router = cluster.start("router")
    cluster.start("processor")
    cluster.start("frontend")
    cluster.wait_for_instances(processor=1, router=1, engine=2)
    router.wait_for("announces nothing, so it is routed to by load alone", 2)
    body = {"model": Pipeline.model, "messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 12}
    with cluster.client() as client:
        response = client.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    assert response.json()["usage"]["completion_tokens"] == 12
    assert response.json()["choices"][0]["finish_reason"] == "length"


def test_dynamo_s_frontend_gets_the_same_answers_from_our_engines(pipeline: Pipeline) -> None:
    port = free_ports(1)[0]
    pipeline.run(
        "dynamo-frontend",
        sys.executable,
        *("-m", "dynamo.frontend", "--http-port", str(port), "--router-mode", "kv", "--kv-cache-block-size", "16"),
        *("--discovery-backend", "etcd", "--request-plane", "nats", "--event-plane", "nats"),
        env={"PYTHONPATH": str(DYNAMO)},
    )
    body = {"model": pipeline.model, "messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 16}

    def theirs() -> str:
        try:
            url = f"http://127.0.0.1:{port}/v1/chat/completions"
            response = httpx.post(url, json={**body, "temperature": 0}, timeout=60)
        except httpx.TransportError:
            return ""
        return response.json()["choices"][0]["message"]["content"] if response.status_code == 200 else ""

    assert until(theirs, "an answer of Dynamo's frontend") == pipeline.answer()


def test_dynamo_s_router_sees_the_overlap_that_ours_sees(pipeline: Pipeline) -> None:
    """Its Rust KvRouter is fed by the publishers of our engines, ours by ZMQ."""
    tokens = list(range(300, 300 + 21 * 16))
    asker = pipeline.run("overlaps", sys.executable, "-m", "tests.system.compare_routers", json.dumps(tokens))
    assert asker.exit_code() == 0, asker.text
    report = json.loads(next(line for line in asker.text.splitlines() if line.startswith("{")))
    assert report["before"] == {"ours": 0, "dynamo": 0}
    assert report["after"]["ours"] == report["after"]["dynamo"] == 20
    assert report["instance"]["ours"] == report["instance"]["dynamo"]


def test_a_sglang_engine_has_told_dynamo_of_its_model(pipeline: Pipeline) -> None:
    until(lambda: "registered pipeline-chat with Dynamo" in (pipeline.folder / "engine-0.log").read_text(), "its card")
