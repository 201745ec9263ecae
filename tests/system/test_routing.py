"""The router over real engines: what it knows is true, what does not fit is shown, and its death does no harm."""

import concurrent.futures
import itertools
import json
import shutil
import signal
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common.messages import GenerateRequest, SamplingOptions, StopConditions
from common.model import DEFAULT_MODEL
from common.routing.overlap_watch import REPEATS
from common.routing.policy import POLICIES
from tests.system.conftest import Cluster, Pipeline, Process, until

import httpx
import psutil
import pytest

PAUSE = 14.0  # seconds: longer than anything here waits for an answer


def lines(process: Process) -> list[dict[str, Any]]:
    """The lines of JSON that a program has written before it ended."""
    assert process.exit_code() == 0, process.text
    return [json.loads(line) for line in process.text.splitlines() if line.startswith("{")]


def start_mockers(cluster: Cluster, count: int, *options: str) -> list[Process]:
    return [
        cluster.start("engine", "--backend", "mocker", "--worker-id", str(number), *options, name=f"engine-{number}")
        for number in range(count)
    ]


@contextmanager
def simulated(folder: Path, engines: int, *options: str, router: Sequence[str] = ()) -> Iterator[Pipeline]:
    """A pipeline with so many simulated engines. options: of each; router: options of that."""
    pipeline = Pipeline(folder)
    try:
        start_mockers(pipeline, engines, *options)
        pipeline.start("router", *router)
        for program in ("processor", "frontend"):
            pipeline.start(program)
        pipeline.wait_for_instances(processor=1, router=1, engine=engines)
        yield pipeline
    finally:
        pipeline.close()


@pytest.fixture
def mockers(tmp_path: Path) -> Iterator[Pipeline]:
    with simulated(tmp_path, 3) as pipeline:
        yield pipeline


def follow_over_a_bad_network(cluster: Cluster, part_tokens: int) -> list[dict[str, Any]]:
    program = (sys.executable, "-m", "tests.system.lossy_caches", Pipeline.model, str(part_tokens))
    return lines(cluster.run("lossy", *program))


def test_the_index_becomes_the_cache_of_sglang_whatever_the_network_does(pipeline: Pipeline) -> None:
    for report in follow_over_a_bad_network(pipeline, 320):
        assert report["equal"], report
        assert report["dropped"] > 10
        assert report["removed"] > 0
        assert report["blocks"] > 100


def test_the_index_becomes_the_cache_of_the_mocker_whatever_the_network_does(cluster: Cluster) -> None:
    cluster.start("engine", "--backend", "mocker", "--mocker-blocks", "512")
    (report,) = follow_over_a_bad_network(cluster, 320)
    assert report["equal"], report
    assert report["dropped"] > 10
    assert report["removed"] > 0
    assert report["blocks"] > 100


def test_a_pause_of_sglang_s_scheduler_takes_nothing_from_what_is_known_of_its_cache(pipeline: Pipeline) -> None:
    overlaps(pipeline, [f"{number}: " + "before the pause, " * 40 for number in range(8)])
    before = {worker["worker_id"]: worker["cached_blocks"] for worker in pipeline.workers()[0]}
    assert min(before.values()) > 0
    schedulers = [
        child
        for process in pipeline.processes
        if process.log.stem.startswith("engine-") and process.popen.poll() is None
        for child in psutil.Process(process.popen.pid).children(recursive=True)
        if child.cmdline()[:1] == ["sglang::scheduler"]
    ]
    assert len(schedulers) == 2
    for scheduler in schedulers:
        scheduler.suspend()
    time.sleep(PAUSE)
    for scheduler in schedulers:
        scheduler.resume()
    late = pipeline.start("router", name="late")

    def both_know_as_much() -> bool:
        caches = cached_blocks(pipeline)
        return len(caches) == 2 and all(cache.get(name, 0) >= before[name] for cache in caches for name in before)

    until(both_know_as_much, "the caches at both routers")
    late.signal()
    assert late.exit_code() == 0
    pipeline.wait_for_instances(router=1)


def cached_blocks(pipeline: Pipeline) -> list[dict[str, int]]:
    """By router and worker, how many blocks the worker has."""
    return [{worker["worker_id"]: worker["cached_blocks"] for worker in router} for router in pipeline.workers()]


def overlaps(pipeline: Pipeline, prompts: list[str]) -> list[tuple[str, int]]:
    """Who answers each prompt, and how many blocks of it were cached there."""
    headers = [pipeline.ask(prompt, max_tokens=1).headers for prompt in prompts]
    return [(header["x-worker-id"], int(header["x-kv-overlap-blocks"])) for header in headers]


def test_a_router_that_is_killed_under_load_loses_nothing_and_soon_knows_all(mockers: Pipeline) -> None:
    prompts = [f"{number}: " + f"what is {number}? " * 500 for number in range(12)]
    overlaps(mockers, prompts)
    before = overlaps(mockers, prompts)
    assert min(blocks for _, blocks in before) > 100  # more than the load below could outweigh
    (router,) = [process for process in mockers.processes if process.log.stem == "router"]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        load = [pool.submit(mockers.ask, f"more {number}", max_tokens=40) for number in range(200)]
        until(lambda: sum(answer.done() for answer in load) > 40, "load")
        router.signal(signal.SIGKILL)
        mockers.start("router", name="router-2").wait_for("serving inference.router.find_worker")
        after = overlaps(mockers, prompts)
        assert Counter(answer.result().status_code for answer in load) == {200: 200}
    assert after == before


def test_an_engine_that_starts_again_has_an_empty_cache(mockers: Pipeline) -> None:
    prompt = "the same again, " * 30
    (worker, _), (again, blocks) = overlaps(mockers, [prompt, prompt])
    assert again == worker and blocks > 5
    (engine,) = [process for process in mockers.processes if process.log.stem == f"engine-{worker}"]
    engine.signal()
    assert engine.exit_code() == 0
    mockers.start("engine", "--backend", "mocker", "--worker-id", worker, name=f"engine-{worker}-again")
    mockers.wait_for_instances(engine=3)
    until(lambda: len(mockers.workers()[0]) == 3, "the new engine at the router")
    (status,) = [status for status in mockers.workers()[0] if status["worker_id"] == worker]
    assert status["cached_blocks"] == 0
    assert overlaps(mockers, [prompt])[0][1] == 0


def test_callers_who_leave_while_it_decides_leave_no_load_behind(mockers: Pipeline) -> None:
    callers = mockers.run("callers", sys.executable, "-m", "tests.system.hasty_callers")
    assert callers.exit_code() == 0, callers.text
    assert int(callers.text.splitlines()[-1]) > 1000
    assert sum(worker["routed_requests"] for worker in mockers.workers()[0]) > 1000
    until(lambda: not any(worker["requests"] for worker in mockers.workers()[0]), "the end of all leases", timeout=30)


def test_two_routers_do_not_herd(mockers: Pipeline) -> None:
    mockers.start("router", name="router-2").wait_for("serving inference.router.find_worker")
    mockers.wait_for_instances(router=2)
    with concurrent.futures.ThreadPoolExecutor(24) as pool:
        ask = lambda number: mockers.ask(f"{number} is new, " * 40, max_tokens=60)  # noqa: E731
        counts = Counter(response.headers["x-worker-id"] for response in pool.map(ask, range(240)))
    shares = [sum(worker["routed_requests"] for worker in router) for router in mockers.workers()]
    assert min(shares) > 80  # both had a part in it
    assert max(counts.values()) < 1.35 * 240 / 3


def test_a_burst_of_siblings_computes_its_prefix_once(mockers: Pipeline) -> None:
    prefix = "all of them begin with this, " * 300
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        ask = lambda number: mockers.ask(f"{prefix} and ask {number}", max_tokens=40)  # noqa: E731
        workers = [response.headers["x-worker-id"] for response in pool.map(ask, range(12))]
    assert len(set(workers)) == 1


def test_work_that_somebody_else_gave_a_worker_is_seen(mockers: Pipeline) -> None:
    request = GenerateRequest(
        token_ids=list(range(300, 1500)),
        model=mockers.model,
        stop_conditions=StopConditions(max_tokens=2000, ignore_eos=True),
        sampling_options=SamplingOptions(),
    )
    program = ("-m", "tests.system.call_endpoint", "inference.engine.generate", json.dumps(request.encode()))
    caller = mockers.run("caller", sys.executable, *program)

    def busy() -> list[dict[str, Any]]:
        return [worker for worker in mockers.workers()[0] if worker["decode_blocks"] > 1200 / 16]

    (worker,) = until(busy, "the load of the worker")
    assert worker["requests"] == 0
    before = worker["decode_blocks"]
    until(lambda: busy()[0]["decode_blocks"] > before + 5, "growth of its sequence")
    caller.close()
    until(lambda: not busy(), "the end of the load")


def test_workers_that_do_not_fit_get_no_requests_and_are_shown(mockers: Pipeline, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(DEFAULT_MODEL, other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["truncation"] = None
    tokenizer["version"] = "1.0"
    (other / "tokenizer.json").write_text(json.dumps(tokenizer, indent=1))
    odd = {
        "blocks": ("--block-size", "32"),
        "tokenizer": ("--model", str(other), "--model-name", Pipeline.model),
    }
    for name, options in odd.items():
        mockers.start("engine", "--backend", "mocker", "--worker-id", name, *options, name=f"engine-{name}")
    until(lambda: len(mockers.workers()[0]) == 5, "all engines at the router")
    assert {mockers.ask(f"{n}").headers["x-worker-id"] for n in range(12)} <= {"0", "1", "2"}
    reasons = {worker["worker_id"]: worker["reason"] for worker in mockers.workers()[0] if worker["reason"]}
    assert reasons.keys() == {"blocks", "tokenizer"}
    assert "has KV blocks of 32 tokens" in reasons["blocks"]
    assert "has a different tokenizer" in reasons["tokenizer"]
    log = (mockers.folder / "router.log").read_text()
    assert log.count("ERROR") == log.count("gets no requests for pipeline-chat in blocks of 16 tokens") == 2


def test_of_more_than_the_engines_can_do_a_part_is_answered_and_the_rest_refused_soon(tmp_path: Path) -> None:
    ended: list[str] = []  # in their order

    def ask(name: str, priority: int = 0) -> tuple[httpx.Response, float]:
        began, headers = time.monotonic(), {"x-priority": str(priority)}
        answer = slow.ask(f"{name} " + "is a long story, " * 200, headers=headers, max_tokens=1)  # 1,000 tokens
        ended.append(name)
        return answer, time.monotonic() - began

    def waiting() -> int:
        with slow.client() as client:
            count: int = client.get("/workers").json()["routers"][0]["waiting"]
        return count

    with (
        simulated(tmp_path, 1, "--mocker-speedup", "0.1", router=("--max-waiting", "4")) as slow,
        concurrent.futures.ThreadPoolExecutor(32) as pool,
    ):
        assert ask("the first, from which the router knows how fast the engine is,")[0].status_code == 200
        early = [pool.submit(ask, f"early {number}") for number in range(24)]
        until(lambda: waiting() > 2, "a queue")
        late = [pool.submit(ask, f"late {number}", priority=1) for number in range(2)]
        answers = [asked.result() for asked in early]
        assert [asked.result()[0].status_code for asked in late] == [200, 200]
        assert waiting() == 0
        until(lambda: not any(worker["requests"] for worker in slow.workers()[0]), "the end of all requests")

    refused = [(answer, seconds) for answer, seconds in answers if answer.status_code != 200]
    assert 3 < len(refused) < 21
    assert {answer.status_code for answer, _ in refused} == {503}
    assert {answer.json()["error"]["code"] for answer, _ in refused} == {"overloaded"}
    assert all(int(answer.headers["retry-after"]) >= 1 for answer, _ in refused)
    slowest = max(seconds for answer, seconds in answers if answer.status_code == 200)
    assert statistics.median(seconds for _, seconds in refused) < slowest / 3
    answered = {f"early {number}" for number, (answer, _) in enumerate(answers) if answer.status_code == 200}
    last_of_late = max(ended.index(f"late {number}") for number in range(2))
    assert answered.intersection(ended[last_of_late:])  # which came before, and had to wait for them


def test_events_that_never_come_are_noticed(cluster: Cluster) -> None:
    cluster.start("engine", "--backend", "mocker", "--worker-id", "far", "--host", "nowhere.invalid")
    router = cluster.start("router")
    for program in ("processor", "frontend"):
        cluster.start(program)
    cluster.wait_for_instances(processor=1, router=1, engine=1)
    body = {"model": Pipeline.model, "messages": [{"role": "user", "content": "Again! " * 20}], "max_tokens": 1}
    with cluster.client() as client:
        for _ in range(REPEATS + 2):
            assert client.post("/v1/chat/completions", json=body).status_code == 200
    router.wait_for("no KV event has come from worker far: is tcp://nowhere.invalid")


def test_a_router_says_what_it_knows_and_why_it_chooses(mockers: Pipeline) -> None:
    prompt = "tell me of the workers, " * 20
    overlaps(mockers, [prompt, prompt])
    workers = mockers.workers()[0]
    assert {worker["worker_id"] for worker in workers} == {"0", "1", "2"}
    assert {worker["status"] for worker in workers} == {"joined"}
    (one,) = [worker for worker in workers if worker["routed_requests"] >= 2]
    assert one["cached_blocks"] > 5
    assert one["overlap_blocks"] > 5
    assert one["requests"] == 0
    assert one["last_event_seconds"] is not None
    tokens = json.dumps([list(range(100, 164))])
    (decision,) = lines(mockers.run("ask", sys.executable, "-m", "tests.system.ask_router", mockers.model, tokens))
    assert {reason["worker_id"] for reason in decision["reasons"]} == {"0", "1", "2"}
    assert decision["cost"] == min(reason["cost"] for reason in decision["reasons"])


@pytest.mark.parametrize("policy", [*POLICIES, "dynamo"])
def test_every_policy_answers(cluster: Cluster, policy: str) -> None:
    start_mockers(cluster, 2)
    cluster.start("router", "--policy", policy)
    cluster.start("processor")
    cluster.start("frontend")
    cluster.wait_for_instances(processor=1, router=1, engine=2)
    body = {"model": Pipeline.model, "messages": [{"role": "user", "content": "Hello! " * 40}], "max_tokens": 4}

    def ask() -> httpx.Response:
        with cluster.client() as client:
            return client.post("/v1/chat/completions", json=body)

    until(lambda: ask().status_code == 200, "an answer")
    answers = [ask() for _ in range(6)]
    assert {answer.status_code for answer in answers} == {200}
    workers = [answer.headers["x-worker-id"] for answer in answers]
    if policy in ("kv", "dynamo"):
        assert len(set(workers)) == 1
        assert int(answers[-1].headers["x-kv-overlap-blocks"]) > 2
    if policy == "round-robin":
        assert all(one != following for one, following in itertools.pairwise(workers))
