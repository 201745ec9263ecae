"""What a program serves, from registration to the last answer."""

import argparse
import asyncio
import logging
import os
import signal
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, cast

from common import service as service_module
from common.errors import Cancelled, Internal, InvalidRequest, PipelineError, StartupError, Unavailable
from common.log import request_id
from common.messages import EndpointSpec, Failure, Message, TokenMessage
from common.service import Service, first_of, parser, run
from tests.unit.stand_ins import without_garbage_collection

import pytest
from dynamo.runtime import Context, DistributedRuntime


class Question(Message):
    text: str


class Reply(Message):
    text: str


SPEC = EndpointSpec("thing", "work", Question, Reply)


class Discovery:
    """The endpoint's client: it sees whoever is registered."""

    def __init__(self, endpoint: "FakeEndpoint") -> None:
        self._endpoint = endpoint

    def instance_ids(self) -> list[int]:
        return [self._endpoint.connection_id()] if self._endpoint.registered else []


class FakeEndpoint:
    """An endpoint of Dynamo's runtime in this process."""

    def __init__(self, runtime: "FakeRuntime") -> None:
        self._runtime = runtime
        self.registered = False
        self.handler: Any = None
        self.fails: Exception | None = None

    def connection_id(self) -> int:
        return 7

    async def client(self) -> Discovery:
        return Discovery(self)

    @property
    def metrics(self) -> "FakeEndpoint":
        return self

    def register_prometheus_expfmt_callback(self, callback: Callable[[], str]) -> None:
        self.text = callback

    async def serve_endpoint(self, handler: Any, metrics_labels: list[tuple[str, str]] | None) -> None:
        self.handler, self.registered, self.labels = handler, True, metrics_labels
        if self.fails:
            await asyncio.sleep(0.01)
            raise self.fails
        await self._runtime.ended.wait()

    async def unregister_endpoint_instance(self) -> None:
        self.registered = False


class FakeRuntime:
    def __init__(self) -> None:
        self.ended = asyncio.Event()
        self.system: str | None = None
        self.ready = False

    def system_status_server_url(self) -> str | None:
        return self.system

    def set_health_status(self, ready: bool) -> None:
        self.ready = ready

    def shutdown(self) -> None:
        self.ended.set()


Handler = Callable[[Question, Context], AsyncIterator[Reply]]


class Scene:
    """A service with one endpoint, and callers."""

    def __init__(self, handler: Any, drain_seconds: float, spec: EndpointSpec[Any, Any] = SPEC) -> None:
        self.runtime = FakeRuntime()
        self.endpoint = FakeEndpoint(self.runtime)
        self.service = Service(cast(Any, self.runtime), drain_seconds=drain_seconds)
        self.service.add(cast(Any, self.endpoint), spec, handler)

    async def call(self, context: Context, body: Any = None) -> list[Any]:
        return [item async for item in self.endpoint.handler(body or {"text": "?"}, context)]

    async def begin(self, context: Context) -> asyncio.Task[list[Any]]:
        """A call that is in progress."""
        task = asyncio.create_task(self.call(context))
        while not self.service._in_progress:
            await asyncio.sleep(0)
        return task


def play(
    handler: Any,
    scenario: Callable[[Scene], Awaitable[None]],
    *,
    drain_seconds: float = 30.0,
    spec: EndpointSpec[Any, Any] = SPEC,
) -> None:
    """Play a scenario while the service is up. Ends when the service has left."""

    async def main() -> None:
        scene = Scene(handler, drain_seconds, spec)
        async with scene.service:
            await scene.service.serve()
            await scenario(scene)

    asyncio.run(main())


@pytest.fixture(autouse=True)
def process_as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`serve` forbids new endpoints from then on, and `run` sets up logs, signals and the environment."""
    monkeypatch.setattr(DistributedRuntime, "endpoint", DistributedRuntime.endpoint)
    environment, loggers = dict(os.environ), [logging.getLogger(name) for name in ("__main__", "common")]
    states = [(logger.level, logger.propagate, list(logger.handlers)) for logger in loggers]
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    for logger, (level, propagate, of_logger) in zip(loggers, states, strict=True):
        logger.setLevel(level)
        logger.propagate, logger.handlers = propagate, of_logger
    os.environ.clear()
    os.environ.update(environment)


async def echo(request: Question, context: Context) -> AsyncIterator[Reply]:
    yield Reply(text=request.text)
    yield Reply(text="done")


async def until_stopped(request: Question, context: Context) -> AsyncIterator[Reply]:
    yield Reply(text="first")
    await context.async_killed_or_stopped()
    raise Cancelled("stopped")


def raises(error: Exception) -> Handler:
    async def handler(request: Question, context: Context) -> AsyncIterator[Reply]:
        yield Reply(text="first")
        raise error

    return handler


def answers(handler: Handler, body: Any = None) -> list[Any]:
    got = list[Any]()

    async def scenario(scene: Scene) -> None:
        got.extend(await scene.call(Context("x", {"x-request-id": "mine"}), body))

    play(handler, scenario)
    return got


def failure_in(item: Any) -> PipelineError:
    return Failure.decode(item).exception


class Sender:
    """Dynamo's ResponseSender, to a caller that leaves after some messages."""

    def __init__(self, leaves_after: int = 99) -> None:
        self._leaves_after = leaves_after
        self.sent: list[Any] = []

    def send(self, message: Any) -> None:
        if len(self.sent) == self._leaves_after:
            raise RuntimeError("response stream is closed")
        self.sent.append(message)


class Word(TokenMessage):
    text: str


class TestTokenMessages:
    """They are sent, instead of being asked for."""

    def play(self, sender: Sender) -> bool:
        """Send three words. Returns whether the handler was ended, however it ended."""
        ended = False

        async def words(request: Question, context: Context) -> AsyncIterator[Word]:
            nonlocal ended
            try:
                for text in "abc":
                    yield Word(text=text)
                raise Unavailable("no more")
            finally:
                ended = True

        async def scenario(scene: Scene) -> None:
            handled = scene.endpoint.handler({"text": "?"}, Context(), response_sender=sender)
            assert [item async for item in handled] == []

        play(words, scenario, spec=EndpointSpec("thing", "words", Question, Word, alive=True))
        return ended

    def test_all_of_them_and_the_error_that_ends_them(self) -> None:
        sender = Sender()
        assert self.play(sender)
        assert sender.sent[:3] == [{"text": "a"}, {"text": "b"}, {"text": "c"}]
        assert failure_in(sender.sent[3]).message == "no more"

    def test_a_caller_that_left_ends_the_handler(self) -> None:
        assert self.play(Sender(leaves_after=1))

    def test_what_is_over_does_not_wait_for_the_garbage_collector(self) -> None:
        sender = Sender()
        kept = weakref.ref(sender)
        with without_garbage_collection():
            assert self.play(sender)
            del sender
            assert kept() is None


class TestHandlers:
    def test_they_get_and_yield_messages(self) -> None:
        assert answers(echo, {"text": "hello"}) == [{"text": "hello"}, {"text": "done"}]

    def test_what_is_no_message_of_the_endpoint_is_refused(self) -> None:
        (item,) = answers(echo, {"txt": "hello"})
        error = failure_in(item)
        assert (type(error), error.message) == (InvalidRequest, "invalid Question: text: Field required")

    @pytest.mark.parametrize("error", [InvalidRequest("no", param="x", code="c"), Unavailable("later"), Internal("oh")])
    def test_a_typed_error_is_the_last_message(self, error: PipelineError, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.INFO)
        first, last = answers(raises(error))
        assert first == {"text": "first"}
        assert (type(failure_in(last)), failure_in(last).body) == (type(error), error.body)
        (record,) = [record for record in caplog.records if "request_id=mine" in record.message]
        assert record.levelno == (logging.ERROR if isinstance(error, Internal) else logging.INFO)
        assert record.exc_info is None

    def test_a_bug_is_internal_and_logged_with_its_traceback(self, caplog: pytest.LogCaptureFixture) -> None:
        _, last = answers(raises(ZeroDivisionError("by nothing")))
        error = failure_in(last)
        assert type(error) is Internal
        assert error.message == "inference.thing.work failed: ZeroDivisionError: by nothing"
        (record,) = [record for record in caplog.records if record.exc_info]
        assert record.message == "request_id=mine failed"

    def test_one_that_was_cancelled_by_its_caller_just_ends(self) -> None:
        assert answers(raises(Cancelled("gone"))) == [{"text": "first"}]

    def test_the_id_of_a_request_is_its_caller_s(self) -> None:
        assert request_id(Context("x", {"x-request-id": "mine"})) == "mine"
        assert request_id(Context("x")) == "x"


class TestLeaving:
    def test_it_waits_for_requests_in_progress_out_of_discovery(self) -> None:
        go = asyncio.Event()

        async def handler(request: Question, context: Context) -> AsyncIterator[Reply]:
            await go.wait()
            assert not context.is_stopped()
            yield Reply(text="done")

        async def main() -> None:
            scene = Scene(handler, 30.0)
            async with scene.service:
                await scene.service.serve()
                assert scene.endpoint.registered
                task = await scene.begin(Context("x"))
                os.kill(os.getpid(), signal.SIGTERM)
                await scene.service.stopped()
                asyncio.get_running_loop().call_later(0.2, go.set)
            assert await task == [{"text": "done"}]
            assert not scene.endpoint.registered

        asyncio.run(main())

    def test_what_does_not_finish_is_cut_off_and_its_caller_told(self) -> None:
        tasks = []

        async def scenario(scene: Scene) -> None:
            tasks.append(await scene.begin(Context("x")))
            scene.service.stop()

        async def main() -> None:
            scene = Scene(until_stopped, 0.05)
            async with scene.service:
                await scene.service.serve()
                await scenario(scene)
            first, last = await tasks[0]
            assert first == {"text": "first"}
            assert type(failure_in(last)) is Cancelled

        asyncio.run(main())

    def test_a_second_signal_does_not_wait(self) -> None:
        async def scenario(scene: Scene) -> None:
            await scene.begin(Context("x"))
            scene.service.stop()
            asyncio.get_running_loop().call_later(0.05, scene.service.stop)

        play(until_stopped, scenario, drain_seconds=600.0)

    def test_a_request_whose_caller_is_gone_is_not_waited_for(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Its handler does not look at its context."""
        monkeypatch.setattr(service_module, "LAST_WORDS_SECONDS", 0.1)

        async def deaf(request: Question, context: Context) -> AsyncIterator[Reply]:
            await asyncio.Event().wait()
            yield Reply(text="never")

        async def scenario(scene: Scene) -> None:
            await scene.begin(context := Context("x"))
            context.stop_generating()
            scene.service.stop()

        play(deaf, scenario, drain_seconds=600.0)

    def test_requests_may_end_while_the_others_are_being_cut_off(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A handler that ignores its context, told to stop just while its caller hangs up."""
        monkeypatch.setattr(service_module, "LAST_WORDS_SECONDS", 0.1)

        async def main() -> None:
            scene = Scene(echo, 0.01)

            class Vanishing:
                """A request that ends as soon as it is told to stop, and others with it."""

                def is_stopped(self) -> bool:
                    return False

                def stop_generating(self) -> None:
                    scene.service._in_progress.clear()

            async with scene.service:
                await scene.service.serve()
                contexts = [cast(Any, Vanishing()) for _ in range(5)]
                scene.service._in_progress.update(contexts)
                scene.service.stop()

        asyncio.run(main())

    def test_one_request_may_be_marked_twice(self) -> None:
        async def scenario(scene: Scene) -> None:
            context = Context("x")
            with scene.service.in_progress(context), scene.service.in_progress(context):
                pass

        play(echo, scenario)


class TestServing:
    def test_it_returns_once_everything_is_registered(self) -> None:
        async def scenario(scene: Scene) -> None:
            assert scene.endpoint.registered

        play(echo, scenario)

    def test_an_endpoint_that_is_made_later_is_an_error_at_once(self) -> None:
        """The process would stand still."""

        async def scenario(scene: Scene) -> None:
            with pytest.raises(RuntimeError, match=r"before Service\.serve"):
                DistributedRuntime.endpoint(cast(Any, scene.runtime), "inference.thing.late")

        play(echo, scenario)

    def test_if_what_is_served_fails_the_program_ends(self, caplog: pytest.LogCaptureFixture) -> None:
        async def main() -> None:
            scene = Scene(echo, 30.0)
            scene.endpoint.fails = ConnectionError("lease lost")
            async with scene.service:
                await scene.service.serve()
                await scene.service.stopped()

        with pytest.raises(StartupError, match=r"ended before it was asked to: ConnectionError\('lease lost'\)"):
            asyncio.run(main())
        assert "stopping: ConnectionError('lease lost')" in caplog.text

    def test_so_it_does_if_it_is_no_longer_served(self) -> None:
        async def scenario(scene: Scene) -> None:
            scene.runtime.ended.set()
            await scene.service.stopped()

        with pytest.raises(StartupError, match="was the connection to etcd lost"):
            play(echo, scenario)

    def test_and_if_what_runs_beside_it_ends(self) -> None:
        async def fail() -> None:
            raise ZeroDivisionError

        async def scenario(scene: Scene) -> None:
            scene.service.background(fail())
            await scene.service.stopped()

        with pytest.raises(StartupError, match="ZeroDivisionError"):
            play(echo, scenario)

    def test_what_runs_beside_it_is_cancelled_when_it_leaves(self) -> None:
        cancelled = list[bool]()

        async def work() -> None:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                cancelled.append(True)
                raise

        async def main() -> None:
            scene = Scene(echo, 30.0)
            async with scene.service:
                scene.service.background(work())
                await scene.service.serve()
            await asyncio.sleep(0)
            assert cancelled == [True]

        asyncio.run(main())


class TestRun:
    ARGS = parser("").parse_args([])

    @pytest.fixture(autouse=True)
    def without_nats_and_etcd(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("DYN_REQUEST_PLANE", "none")
        monkeypatch.setenv("DYN_DISCOVERY_BACKEND", "none")

    def test_a_program_that_ends_well_ends_with_0(self) -> None:
        async def main(args: argparse.Namespace) -> None:
            assert args.drain_seconds == 30.0

        assert run(main, self.ARGS) == 0

    def test_one_that_cannot_start_says_why_in_a_line_and_ends_with_1(self, capsys: pytest.CaptureFixture[str]) -> None:
        async def main(args: argparse.Namespace) -> None:
            raise StartupError("no model: name one")

        assert run(main, self.ARGS) == 1
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1
        assert lines[0].endswith("no model: name one")

    def test_it_waits_for_nats_and_etcd(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("DYN_REQUEST_PLANE", "DYN_DISCOVERY_BACKEND", "NATS_SERVER", "ETCD_ENDPOINTS"):
            monkeypatch.delenv(name, raising=False)
        waited = list[tuple[str, str]]()

        async def until_reachable(name: str, addresses: str) -> None:
            waited.append((name, addresses))

        monkeypatch.setattr(service_module, "until_reachable", until_reachable)

        async def main(args: argparse.Namespace) -> None:
            assert os.environ["DYN_EVENT_PLANE"] == "nats"

        assert run(main, self.ARGS) == 0
        assert waited == [("NATS", "nats://127.0.0.1:4222"), ("etcd", "http://127.0.0.1:2379")]


def test_the_first_of_many_ends_the_others() -> None:
    async def main() -> None:
        waiting = asyncio.ensure_future(asyncio.Event().wait())
        await first_of(asyncio.sleep(0), waiting)
        await asyncio.sleep(0)
        assert waiting.cancelled()
        await first_of(asyncio.Event().wait(), seconds=0.01)

    asyncio.run(main())


class TestMetrics:
    def served(self, caplog: pytest.LogCaptureFixture, system: str | None, model: str | None = None) -> FakeEndpoint:
        async def scenario() -> FakeEndpoint:
            caplog.set_level(logging.INFO)
            scene = Scene(echo, 0.0)
            scene.runtime.system, scene.service.model = system, model
            async with scene.service:
                await scene.service.serve()
                assert scene.runtime.ready
            assert not scene.runtime.ready
            return scene.endpoint

        return asyncio.run(scenario())

    def test_they_are_on_the_system_port_and_the_log_says_where(self, caplog: pytest.LogCaptureFixture) -> None:
        endpoint = self.served(caplog, "http://127.0.0.1:18000")
        assert "metrics at http://127.0.0.1:18000/metrics" in caplog.text
        assert "process_cpu_seconds_total" in endpoint.text()

    def test_without_a_system_port_there_is_no_word_of_them(self, caplog: pytest.LogCaptureFixture) -> None:
        self.served(caplog, None)
        assert "metrics" not in caplog.text

    def test_endpoints_of_an_engine_are_labelled_with_its_model(self, caplog: pytest.LogCaptureFixture) -> None:
        """As Dynamo's dashboard wants those of workers."""
        assert self.served(caplog, None).labels is None
        assert self.served(caplog, None, model="m").labels == [("model", "m")]


class TestServers:
    """What the environment says of NATS and etcd."""

    def ended(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception) -> str:
        async def until_reachable(name: str, addresses: str) -> None: ...

        async def main(args: argparse.Namespace) -> None:
            raise error

        monkeypatch.setattr(service_module, "until_reachable", until_reachable)
        assert run(main, parser(None).parse_args([])) == 1
        (line,) = capsys.readouterr().err.splitlines()
        return line

    @pytest.mark.parametrize(
        ("said", "hint"),
        [
            ("Failed to connect to NATS", "NATS_AUTH_TOKEN"),
            ("server: Validation error: server must start with 'nats://' or 'tls://'", "NATS_SERVER"),
            ("reading CA cert: ca.pem", "NATS_TLS_CA_CERT_PATH"),
            ("etcd startup connection timed out after 10 seconds", "ETCD_AUTH_PASSWORD"),
            (
                'Internal etcd error: grpc request error: message: "etcdserver: user name is empty"',
                "ETCD_AUTH_USERNAME",
            ),
        ],
    )
    def test_an_error_of_the_runtime_is_a_line_that_says_what_to_look_at(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], said: str, hint: str
    ) -> None:
        line = self.ended(monkeypatch, capsys, Exception(said))
        assert said in line
        assert hint in line

    def test_any_other_is_not_dressed_up(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        for error in (RuntimeError("nats"), Exception("no")):
            with pytest.raises(type(error), match=str(error)):
                self.ended(monkeypatch, capsys, error)

    @pytest.mark.parametrize(
        ("nats", "host"),
        [("nats://127.0.0.1:4222", "127.0.0.1"), ("localhost", "127.0.0.1"), ("tls://a,nats://127.0.0.1", None)],
    )
    def test_answers_come_to_this_machine_alone_if_nats_does(
        self, monkeypatch: pytest.MonkeyPatch, nats: str, host: str | None
    ) -> None:
        monkeypatch.setenv("NATS_SERVER", nats)
        monkeypatch.setattr(os, "environ", dict(os.environ))
        os.environ.pop("DYN_TCP_RESPONSE_STREAM_HOST", None)
        service_module._set_environment()
        assert os.environ.get("DYN_TCP_RESPONSE_STREAM_HOST") == host

    def test_a_certificate_is_given_as_a_file_or_as_it_is(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        file = tmp_path / "ca.pem"
        file.write_text("-----BEGIN")
        monkeypatch.setenv("ETCD_AUTH_CA", str(file))
        monkeypatch.setenv("ETCD_AUTH_CLIENT_CERT", "-----BEGIN CERTIFICATE-----\n" + "A" * 5000)
        service_module._set_environment()
        assert os.environ["ETCD_AUTH_CA"] == "-----BEGIN"
        assert len(os.environ["ETCD_AUTH_CLIENT_CERT"]) > 5000
