"""Programs start in any order, leave politely, and survive each other's deaths. The engines are simulated."""

import concurrent.futures
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from tests.system.conftest import REPOSITORY, Pipeline, Process, until

import httpx
import pytest

PROGRAMS = ("engine", "router", "processor", "frontend")


def start(pipeline: Pipeline, program: str, **options: str) -> Process:
    own: dict[str, tuple[str, ...]] = {
        "engine": ("--backend", "mocker", "--worker-id", options.get("name", "engine")),
        "frontend": ("--processor-seconds", "3"),  # where there is to be none, that is not worth half a minute
    }
    return pipeline.start(program, *own.get(program, ()), **options)  # type: ignore[arg-type]


@pytest.fixture
def bare(tmp_path: Path) -> Iterator[Pipeline]:
    """NATS and etcd, and nothing else yet."""
    pipeline = Pipeline(tmp_path)
    yield pipeline
    pipeline.close()


@pytest.fixture
def running(bare: Pipeline) -> dict[str, Process]:
    """All four programs."""
    processes = {program: start(bare, program) for program in PROGRAMS}
    bare.wait_for_instances(processor=1, router=1, engine=1)
    return processes


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_explains(program: str) -> None:
    done = subprocess.run([sys.executable, f"{program}.py", "--help"], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0
    assert "In production Dynamo this is" in done.stdout
    assert "--drain-seconds" in done.stdout


def test_any_order_will_do(bare: Pipeline) -> None:
    """Backwards, each only once the one before says what it is waiting for."""
    start(bare, "frontend").wait_for("waiting for inference.processor.process")
    response = bare.ask()
    assert response.status_code == 503
    assert response.headers["retry-after"]
    start(bare, "processor").wait_for("waiting for inference.router.find_worker")
    start(bare, "router").wait_for("waiting for inference.engine.generate")
    until(lambda: bare.instances()["router"], "a router")
    response = bare.ask()
    assert (response.status_code, response.json()["error"]["code"]) == (503, "no_worker")
    with bare.client() as client:
        assert client.get("/health").status_code == 503
    start(bare, "engine")
    bare.wait_for_instances(engine=1)
    assert bare.ask().status_code == 200


def test_programs_wait_for_nats_and_etcd(tmp_path: Path) -> None:
    pipeline = Pipeline(tmp_path)
    try:
        pipeline.etcd.close()
        router = start(pipeline, "router").wait_for("waiting for etcd")
        router.signal(signal.SIGTERM)
        assert router.exit_code() == 0
    finally:
        pipeline.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("program", PROGRAMS)
def test_a_signal_ends_an_idle_program_with_0(
    bare: Pipeline, running: dict[str, Process], program: str, number: signal.Signals
) -> None:
    running[program].signal(number)
    assert running[program].exit_code() == 0
    assert "Traceback" not in running[program].text
    if program != "frontend":
        bare.wait_for_instances(**{program: 0})


@pytest.mark.parametrize("program", PROGRAMS)
def test_what_is_in_progress_is_finished_first(bare: Pipeline, running: dict[str, Process], program: str) -> None:
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(bare.ask, f"question {number}", max_tokens=150) for number in range(8)]
        until(lambda: sum(worker["requests"] for worker in bare.workers()[0]) == 8, "work")
        running[program].signal(signal.SIGTERM)
        if program != "frontend":
            bare.wait_for_instances(**{program: 0})
        assert not any(answer.done() for answer in answers)  # it left at once, while they go on
        responses = [answer.result() for answer in answers]
    assert running[program].exit_code() == 0
    for response in responses:
        assert response.status_code == 200
        assert response.json()["usage"]["completion_tokens"] == 150


def test_a_second_signal_does_not_wait(bare: Pipeline, running: dict[str, Process]) -> None:
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        answer = pool.submit(bare.ask, max_tokens=5000)
        until(lambda: any(worker["requests"] for worker in bare.workers()[0]), "work")
        running["processor"].signal(signal.SIGTERM)
        bare.wait_for_instances(processor=0)
        running["processor"].signal(signal.SIGTERM)
        running["processor"].exit_code()
        assert answer.result().status_code == 503


def test_what_a_worker_does_not_say_is_not_made_up(bare: Pipeline, running: dict[str, Process]) -> None:
    """The simulated engine does not report what it had cached."""
    usage = bare.ask(max_tokens=1).json()["usage"]
    assert usage["completion_tokens"] == 1
    assert usage["prompt_tokens_details"] is None
    running["frontend"].wait_for("completion_tokens=1")
    assert "cached_tokens" not in running["frontend"].text


def test_a_client_that_hangs_up_is_no_fault(bare: Pipeline, running: dict[str, Process]) -> None:
    with bare.client() as client, pytest.raises(httpx.ReadTimeout):
        body = {"model": bare.model, "messages": [{"role": "user", "content": "Hello!"}]}
        client.post("/v1/chat/completions", json=body, timeout=1)
    running["frontend"].wait_for("status=499")
    assert bare.ask(max_tokens=1).status_code == 200
    for process in running.values():
        assert "Traceback" not in process.text
        assert "\x1b" not in process.text


class TestDrainLimit:
    """A stream that would go on for a minute, and a frontend that is told to leave."""

    LEAVES = 30.0  # seconds: much more than any --drain-seconds here, much less than the stream takes

    def leave(self, bare: Pipeline, frontend: Process, signals: int) -> str:
        """What a client reads of its stream when the frontend gets signals."""
        body = {"model": bare.model, "messages": [{"role": "user", "content": "Hello!"}], "stream": True}
        with bare.client() as client, client.stream("POST", "/v1/chat/completions", json=body) as response:
            lines = response.iter_lines()
            read = [next(lines)]
            for _ in range(signals):
                frontend.signal()
                threading.Event().wait(0.5)
            read += lines
        assert frontend.popen.wait(self.LEAVES) == 0
        return "\n".join(read)

    def test_a_stream_is_cut_off_with_an_error(self, bare: Pipeline) -> None:
        for program in ("engine", "router", "processor"):
            start(bare, program)
        frontend = bare.start("frontend", "--drain-seconds", "1")
        bare.wait_for_instances(processor=1, router=1, engine=1)
        text = self.leave(bare, frontend, signals=1)
        assert "this server is being stopped" in text.rstrip().splitlines()[-1], text[-600:]
        assert "[DONE]" not in text

    def test_a_second_signal_does_not_wait(self, bare: Pipeline, running: dict[str, Process]) -> None:
        assert "this server is being stopped" in self.leave(bare, running["frontend"], signals=2)

    def test_half_a_request_does_not_hold_it_up(self, bare: Pipeline) -> None:
        frontend = bare.start("frontend", "--drain-seconds", "1").wait_for("listening on")
        with socket.create_connection(("127.0.0.1", bare.port)) as connection:
            connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{")
            threading.Event().wait(0.5)
            frontend.signal()
            assert frontend.popen.wait(self.LEAVES) == 0

    def test_a_processor_cuts_its_work_off_too_and_another_one_goes_on_with_it(self, bare: Pipeline) -> None:
        for program in PROGRAMS:
            start(bare, program)
        leaving = bare.start("processor", "--drain-seconds", "0.2", name="leaving")
        bare.wait_for_instances(processor=2, router=1, engine=1)
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            answers = [pool.submit(bare.ask, max_tokens=800) for _ in range(2)]  # one for each
            threading.Event().wait(0.5)
            leaving.signal()
            assert leaving.popen.wait(self.LEAVES) == 0
            assert "cutting off 1 requests" in leaving.text
            assert not any(answer.done() for answer in answers)
            assert [answer.result().json()["usage"]["completion_tokens"] for answer in answers] == [800, 800]

    def test_a_frontend_leaves_its_port_to_another_one_at_once(
        self, bare: Pipeline, running: dict[str, Process]
    ) -> None:
        body = {"model": bare.model, "messages": [{"role": "user", "content": "Hello!"}], "stream": True}
        with bare.client() as client:
            assert client.get("/live").headers.get("connection") != "close"  # a connection that stays open
            with bare.client() as other, other.stream("POST", "/v1/chat/completions", json=body) as response:
                lines = response.iter_lines()
                next(lines)
                running["frontend"].signal()
                running["frontend"].wait_for("left discovery; finishing 1 requests")
                start(bare, "frontend", name="second").wait_for("listening on")
                answer = client.get("/live")  # there it is still served, and sent away
                assert (answer.status_code, answer.headers["connection"]) == (200, "close")
                assert bare.ask(max_tokens=1).status_code == 200
                assert running["frontend"].popen.poll() is None
                assert next(line for line in lines if line)


def test_health_is_what_becomes_of_a_request(bare: Pipeline) -> None:
    for program in ("router", "processor", "frontend"):
        start(bare, program)
    engine = bare.start("engine", "--backend", "mocker", "--worker-id", "one", env={"ETCD_LEASE_TTL": "90"})
    bare.wait_for_instances(processor=1, router=1, engine=1)

    def status(path: str) -> tuple[int, str]:
        with bare.client() as client:
            answer = client.get(path)
        return answer.status_code, answer.json().get("reason", "")

    until(lambda: status("/health/ready") == (200, ""), "a token")
    assert status("/health") == (200, "")
    until(lambda: bare.heard_of("one"), "its first report")  # without any it may be one that reports nothing
    engine.signal(signal.SIGSTOP)
    try:
        until(lambda: status("/health/ready") == (503, f"{bare.model} has made no token in 5 s"), "silence")
        until(lambda: status("/health")[0] == 503, "the router's word")
        assert f"no engine can be asked for {bare.model}: one silent since" in status("/health")[1]
    finally:
        engine.signal(signal.SIGCONT)
    until(lambda: status("/health/ready")[0] == 200, "an answer")
    assert status("/health") == (200, "")
    bare.nats.signal(signal.SIGSTOP)
    try:
        assert status("/health") == (503, "no processor answers; no router answers")
    finally:
        bare.nats.signal(signal.SIGCONT)
    until(lambda: status("/health")[0] == 200, "health")
    with bare.client() as client:
        assert "time_to_first_token_seconds_count{" not in client.get("/metrics").text  # nobody asked but probes


def test_a_processor_that_died_takes_no_more_requests(bare: Pipeline, running: dict[str, Process]) -> None:
    """For seconds etcd still lists it, and every now and then the runtime tries it again."""
    start(bare, "processor", name="spare").wait_for("serving inference.processor.process")
    bare.wait_for_instances(processor=2)
    running["processor"].signal(signal.SIGKILL)
    running["processor"].exit_code()
    statuses = set()
    while bare.instances()["processor"] == 2:
        statuses.add(bare.ask(max_tokens=1).status_code)
    assert statuses == {200}


def test_a_router_that_is_restarted_under_load_fails_no_request(bare: Pipeline, running: dict[str, Process]) -> None:
    stop = threading.Event()

    def keep_asking(number: int) -> set[int]:
        statuses = set()
        while not stop.is_set():
            statuses.add(bare.ask(f"caller {number}", max_tokens=8).status_code)
        return statuses

    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        callers = [pool.submit(keep_asking, number) for number in range(6)]
        threading.Event().wait(1)
        running["router"].signal(signal.SIGKILL)
        running["router"].exit_code()
        start(bare, "router", name="router-2").wait_for("joined")
        threading.Event().wait(2)
        stop.set()
        assert [caller.result() for caller in callers] == [{200}] * 6


def test_an_engine_that_dies_in_the_middle_is_replaced(bare: Pipeline, running: dict[str, Process]) -> None:
    start(bare, "engine", name="spare").wait_for("serving inference.engine.generate")
    bare.wait_for_instances(engine=2)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(bare.ask, f"question {number}", max_tokens=200) for number in range(8)]
        threading.Event().wait(0.5)
        running["engine"].signal(signal.SIGKILL)
        for answer in answers:
            assert answer.result().status_code == 200
            assert answer.result().json()["usage"]["completion_tokens"] == 200


def test_a_caller_that_dies_leaves_no_load_behind(bare: Pipeline, running: dict[str, Process]) -> None:
    """Killed with requests in progress, neither frontend nor processor leaves a lease at the router."""
    for program in ("frontend", "processor"):
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            answers = [pool.submit(bare.ask, f"question {number}", max_tokens=5000) for number in range(4)]
            threading.Event().wait(0.5)
            running[program].signal(signal.SIGKILL)
            for answer in answers:
                answer.exception()
        start(bare, program, name=f"{program}-2")
        bare.wait_for_instances(processor=1, router=1, engine=1)
        until(lambda: bare.ask(max_tokens=1).status_code == 200, "an answer")
    running["router"].signal(signal.SIGTERM)
    assert running["router"].exit_code() == 0
    assert "finishing" not in running["router"].text


class TestMismatches:
    @pytest.mark.parametrize(
        ("options", "reason"),
        [
            (("--block-size", "32"), "engine odd has KV blocks of 32 tokens"),
            (("--model-name", "other"), "engine odd serves other"),
        ],
    )
    def test_an_engine_that_does_not_fit_is_named_at_the_first_request(
        self, bare: Pipeline, options: tuple[str, ...], reason: str
    ) -> None:
        router = start(bare, "router")
        bare.start("engine", "--backend", "mocker", "--worker-id", "odd", *options)
        router.wait_for("worker odd joined")
        for program in ("processor", "frontend"):
            start(bare, program)
        bare.wait_for_instances(processor=1, router=1, engine=1)
        response = bare.ask()
        assert (response.status_code, response.json()["error"]["code"]) == (503, "no_worker")
        message = response.json()["error"]["message"]
        assert f"no engine fits: you ask for pipeline-chat in blocks of 16 tokens; {reason}" in message
        with bare.client() as client:
            (status,) = client.get("/workers").json()["routers"]
        assert status["unserved"] == [message]
        assert router.text.count("ERROR") == ("--block-size" in options)  # another model is none

    def test_a_processor_with_other_blocks_is_told(self, bare: Pipeline) -> None:
        for program in ("engine", "router", "frontend"):
            start(bare, program)
        bare.start("processor", "--block-size", "32")
        bare.wait_for_instances(processor=1, router=1, engine=1)
        response = bare.ask()
        assert response.status_code == 503
        assert "in blocks of 32 tokens; engine engine has KV blocks of 16 tokens" in response.json()["error"]["message"]

    @pytest.mark.parametrize("model", ["/nowhere", "./nowhere", "nowhere"])
    @pytest.mark.parametrize("program", ["engine", "processor"])
    def test_a_missing_model_is_said_plainly(self, bare: Pipeline, program: str, model: str) -> None:
        process = bare.start(program, "--model", model)
        assert process.exit_code() == 1
        assert f"no model at '{model}'" in process.text
        assert "Traceback" not in process.text


def test_an_address_that_nobody_can_listen_on_is_said_plainly(bare: Pipeline) -> None:
    frontend = bare.start("frontend", "--host", "192.0.2.1")
    assert frontend.exit_code() == 1
    assert "cannot listen on 192.0.2.1" in frontend.text
    assert "Traceback" not in frontend.text


def test_without_a_processor_or_router_the_code_says_so(bare: Pipeline) -> None:
    start(bare, "frontend").wait_for("listening on")
    response = bare.ask()
    assert (response.status_code, response.json()["error"]["code"]) == (503, "no_processor")
    start(bare, "processor").wait_for("waiting for inference.router.find_worker")
    response = bare.ask()
    assert (response.status_code, response.json()["error"]["code"]) == (503, "no_router")
    assert response.headers["retry-after"]
