"""NATS and etcd that want credentials, an HTTP port that wants a key, and no port that other machines reach unasked."""

import json
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from common.engines.ports import free_ports
from scripts.part import etcd_command
from tests.system.conftest import BIN, Process, until
from tests.system.test_launch import Launch

import httpx
import psutil
import pytest

pytestmark = pytest.mark.skipif(not shutil.which("openssl"), reason="no openssl to make certificates with")

# One that is its own authority, and serves as a client's too.
CERTIFICATE = (
    *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"),
    *("-subj", "/CN=test", "-addext", "subjectAltName=IP:127.0.0.1", "-addext", "basicConstraints=critical,CA:FALSE"),
)
LINE = re.compile(r"\d{4}-\d\d-\d\d [\d:,]+ [A-Z]+ \w+: .*|    .*|")  # of a log in text; a traceback's is indented
ESCAPE = "\x1b[31m"


class Secured:
    """Two servers of each kind, by what they want: TLS with a client's certificate, or no TLS and a secret."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._processes: list[Process] = []
        self.certificate, self.key = folder / "certificate.pem", folder / "key.pem"
        subprocess.run([*CERTIFICATE, "-out", self.certificate, "-keyout", self.key], check=True, capture_output=True)
        ports = free_ports(6)
        tls = [f"--tlscert={self.certificate}", f"--tlskey={self.key}", f"--tlscacert={self.certificate}"]
        self._nats(ports[0], "--user=ada", "--pass=secret", "--tlsverify", *tls)
        self._nats(ports[1], "--auth=token")
        https = [f"--trusted-ca-file={self.certificate}", f"--cert-file={self.certificate}", f"--key-file={self.key}"]
        self._etcd(ports[2], ports[3], "--client-cert-auth", *https)
        self._etcd(ports[4], ports[5])
        etcdctl = [str(BIN / "etcdctl"), f"--endpoints=127.0.0.1:{ports[4]}"]
        for words in ("user add root:secret", "user grant-role root root", "auth enable"):
            subprocess.run([*etcdctl, *words.split()], check=True, capture_output=True, timeout=30)
        self.by_certificate = {
            "NATS_SERVER": f"tls://127.0.0.1:{ports[0]}",
            "NATS_AUTH_USERNAME": "ada",
            "NATS_AUTH_PASSWORD": "secret",
            "NATS_TLS_CA_CERT_PATH": str(self.certificate),
            "NATS_TLS_CLIENT_CERT_PATH": str(self.certificate),
            "NATS_TLS_CLIENT_KEY_PATH": str(self.key),
            "ETCD_ENDPOINTS": f"https://127.0.0.1:{ports[2]}",
            "ETCD_AUTH_CA": self.certificate.read_text(),
            "ETCD_AUTH_CLIENT_CERT": str(self.certificate),
            "ETCD_AUTH_CLIENT_KEY": str(self.key),
        }
        self.by_secret = {
            "NATS_SERVER": f"nats://127.0.0.1:{ports[1]}",
            "NATS_AUTH_TOKEN": "token",
            "ETCD_ENDPOINTS": f"http://127.0.0.1:{ports[4]}",
            "ETCD_AUTH_USERNAME": "root",
            "ETCD_AUTH_PASSWORD": "secret",
            "ETCD_STARTUP_CONNECT_TIMEOUT_SECONDS": "1",
        }

    def run(self, name: str, *command: str, env: dict[str, str] | None = None) -> Process:
        process = Process([*command], self._folder / f"{name}.log", env or {})
        self._processes.append(process)
        return process

    def router(self, name: str, env: dict[str, str]) -> Process:
        return self.run(name, sys.executable, "router.py", env=env)

    def _nats(self, port: int, *options: str) -> None:
        store = str(self._folder / f"nats-{port}")
        command = (str(BIN / "nats-server"), "-js", "-a", "127.0.0.1", "-p", str(port), "-sd", store)
        self.run(f"nats-{port}", *command, *options).wait_for("Server is ready")

    def _etcd(self, client: int, peer: int, *options: str) -> None:
        command = etcd_command(str(BIN / "etcd"), self._folder / str(client), client, peer)
        if options:
            command = [word.replace(f"http://127.0.0.1:{client}", f"https://127.0.0.1:{client}") for word in command]
        self.run(f"etcd-{client}", *command, *options).wait_for("ready to serve client requests")

    def close(self) -> None:
        for process in reversed(self._processes):
            process.close()


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    secured = Secured(tmp_path_factory.mktemp("secured"))
    yield secured
    secured.close()


@pytest.fixture(scope="module")
def launch(secured: Secured, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launch]:
    """A pipeline that meets at the two with certificates, with a simulated engine, for those who have a key."""
    folder = tmp_path_factory.mktemp("launched")
    keys = folder / "keys"
    keys.write_text("sk-mine\n")
    keys.chmod(0o600)
    options = ("--engines", "1", "--api-keys-file", str(keys), "--log-level", "debug")
    launch = Launch(folder, *options, **secured.by_certificate)
    try:
        launch.wait_for("Ctrl-C ends it")
        yield launch
    finally:
        launch.close()


def test_a_launch_works_with_servers_that_want_certificates(launch: Launch) -> None:
    assert "a first request was answered" in launch.text
    assert "sk-" not in launch.text


def test_its_answers_are_for_those_who_have_a_key(launch: Launch) -> None:
    assert launch.ask().status_code == 401
    assert launch.health() == "healthy"
    address, headers = f"http://127.0.0.1:{launch.port}", {"authorization": "Bearer sk-mine"}
    assert httpx.get(f"{address}/v1/models", headers=headers).json()["data"][0]["id"] == "pipeline-chat"
    assert httpx.get(f"{address}/workers", headers=headers).status_code == 200


def test_no_port_is_open_to_other_machines(launch: Launch) -> None:
    """But those of the simulated engine's KV events, for which the runtime knows no other address."""
    listening = [
        (part.name(), connection.laddr.ip)
        for part in launch.parts()
        for connection in part.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert len(listening) > 8
    engine = launch.part("engine").name()
    assert [where for where in listening if where[1] != "127.0.0.1"] == [(engine, "0.0.0.0")] * 2


def test_what_clients_send_forges_no_line_of_a_log_and_no_header(launch: Launch) -> None:
    odd = [ESCAPE, "\x00", "\x7f", "\x85", "\x9b31m", "\t", "a b=c", '"', "\xff", "x" * 9000]
    asked = [f"GET /{text} HTTP/1.1\r\n\r\n" for text in odd]
    for name in ("x-request-id", "x-session-id", "x-priority", "traceparent", "authorization", "expect", "origin"):
        asked += [post(json.dumps({"model": "x"}), f"{name}: {text}\r\n{AUTHORIZATION}") for text in odd]
    forged = f"x\n2026-01-01 00:00:00,000 ERROR frontend: forged\r{ESCAPE}\u2028\u2029\x85\u202e\x00"
    hello = [{"role": "user", "content": "hi"}]
    asked += [
        post(json.dumps(body, ensure_ascii=ascii))
        for ascii in (True, False)
        for body in (
            {"model": forged, "messages": hello},
            {"model": "pipeline-chat", "messages": hello, forged: 1, "max_tokens": 1},
            {"model": "pipeline-chat", "messages": hello, "tools": [{"type": forged}]},
            {"model": "pipeline-chat", "messages": hello, "stop": [forged], "max_tokens": 1},
            {"model": "pipeline-chat", "messages": [{"role": forged, "content": forged}]},
            {forged: forged},
        )
    ]
    for request in asked:
        head = sent(launch.port, request).partition(b"\r\n\r\n")[0].decode("latin-1")
        names = [line.partition(":")[0] for line in head.split("\r\n")[1:]]
        assert "\n" not in head.replace("\r\n", "") and len(names) == len(set(names)), head
        assert ESCAPE not in head
    logs = [log.read_text(errors="surrogateescape") for log in launch.data.parent.glob("*.log") if log.stem in PROGRAMS]
    assert len(logs) == len(PROGRAMS)
    assert any("forged" in log for log in logs)
    for log in logs:
        lines = log.split("\n")
        assert [line for line in lines if not LINE.fullmatch(line) or not line.isprintable()] == []
        assert not any(re.match(r"[\d :,-]+ ERROR frontend: forged", line) for line in lines)
        assert max(map(len, lines)) < 11_000


PROGRAMS = ("frontend", "processor", "router", "engine-0")


AUTHORIZATION = "authorization: Bearer sk-mine\r\n"


def post(body: str, headers: str = AUTHORIZATION) -> str:
    length = len(body.encode("utf-8", "surrogatepass"))
    return f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\n{headers}content-length: {length}\r\n\r\n{body}"


def sent(port: int, request: str) -> bytes:
    """The beginning of the answer to what is sent just so. Header bytes are latin-1, bodies UTF-8."""
    head, _, body = request.partition("\r\n\r\n")
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.sendall(head.encode("latin-1") + b"\r\n\r\n" + body.encode("utf-8", "surrogatepass"))
        return connection.recv(65536)


def test_a_program_works_with_a_token_and_a_password(secured: Secured) -> None:
    secured.router("router", secured.by_secret).wait_for("serving inference.router.find_worker")


@pytest.mark.parametrize(
    ("how", "wrong", "says"),
    [
        ("by_secret", {"NATS_AUTH_TOKEN": "guessed"}, "Failed to connect to NATS: are NATS_SERVER, NATS_AUTH_"),
        ("by_certificate", {"NATS_AUTH_PASSWORD": "guessed"}, "Failed to connect to NATS: are NATS_SERVER, NATS_AUTH_"),
        ("by_certificate", {"NATS_SERVER": "nats"}, "wants TLS: write tls:// and not nats:// into NATS_SERVER"),
        ("by_certificate", {"NATS_TLS_CA_CERT_PATH": "/none"}, "NATS_TLS_CA_CERT_PATH?"),
        ("by_secret", {"ETCD_AUTH_PASSWORD": "guessed"}, "timed out after 1 seconds: are ETCD_ENDPOINTS, ETCD_AUTH_"),
        ("by_secret", {"ETCD_ENDPOINTS": "http://root:guessed@127.0.0.1"}, "no password from the address of etcd"),
    ],
)
def test_what_is_wrong_with_the_credentials_is_said_soon_in_a_line(
    secured: Secured, how: str, wrong: dict[str, str], says: str
) -> None:
    env = {**getattr(secured, how), **wrong}
    if env["NATS_SERVER"] == "nats":
        env["NATS_SERVER"] = secured.by_certificate["NATS_SERVER"].replace("tls", "nats")
    router = secured.router("wrong", env)
    until(lambda: router.popen.poll() is not None, "its end", 30)
    assert router.exit_code() == 1
    (line,) = router.text.splitlines()
    assert says in line
    assert "guessed" not in line
