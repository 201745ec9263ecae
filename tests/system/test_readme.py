"""What the README shows is true."""

import inspect
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common.messages import FindWorkerRequest, ModelIdentity
from common.model import DEFAULT_MODEL
from common.routing import policy
from common.routing.policy import Candidate, Weights, choose
from common.routing.worker import Prompt, Worker
from tests.system.conftest import REPOSITORY, Pipeline, until

import pytest
from openai import OpenAI

README = (REPOSITORY / "README.md").read_text()


def code(before: str) -> str:
    """The first block of code after a text."""
    match = re.search(r"```\w*\n(.*?)```", README[README.index(before) :], re.DOTALL)
    assert match
    return match.group(1)


def test_the_first_answer_is_the_one_that_it_shows(pipeline: Pipeline) -> None:
    shown = re.fullmatch(r"\$ curl .* -d '(.*?)'\n\n(.*?)\n\n(.*)", code("sent for the second time"), re.DOTALL)
    assert shown
    request, head, body = shown.groups()
    with pipeline.client() as client:
        _, second = (client.post("/v1/chat/completions", json=json.loads(request)) for _ in range(2))
    assert the_same_always(second.json()) == the_same_always(json.loads(body))
    assert f"x-kv-overlap-blocks: {second.headers['x-kv-overlap-blocks']}\n" in head


def test_the_examples_of_the_api_print_what_it_says(pipeline: Pipeline, capsys: pytest.CaptureFixture[str]) -> None:
    examples = code("A form for the answer")
    client = OpenAI(base_url=f"http://127.0.0.1:{pipeline.port}/v1", api_key="any")
    exec(examples, {"client": client})
    assert capsys.readouterr().out.splitlines() == re.findall(r"^print\(.*\)  # (.*)$", examples, re.MULTILINE)


def the_same_always(answer: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in answer.items() if name not in ("id", "created")}


@pytest.fixture
def bare(tmp_path: Path) -> Iterator[Pipeline]:
    """NATS and etcd, and nothing else yet."""
    pipeline = Pipeline(tmp_path)
    yield pipeline
    pipeline.close()


def copies() -> dict[str, tuple[str, int, int]]:
    """By stage, the command that copies it, and how many files and lines that is said to be."""
    rows = re.findall(r"^\| (\w+)\b[^|]*\| `(cp --parents [^`]*) DIR` \| (\d+) \| ([\d,]+) \|$", README, re.MULTILINE)
    return {stage: (command, int(files), int(lines.replace(",", ""))) for stage, command, files, lines in rows}


@pytest.mark.parametrize("stage", ["frontend", "processor", "router", "engine"])
class TestACopiedStage:
    def test_runs_with_nothing_else_of_this_repository(self, bare: Pipeline, tmp_path: Path, stage: str) -> None:
        command, _, _ = copies()[stage]
        folder = tmp_path / "copy"
        folder.mkdir()
        subprocess.run(["bash", "-c", f"{command} {folder}"], cwd=REPOSITORY, check=True)
        options = {
            "engine": ["--backend", "mocker", "--model", str(DEFAULT_MODEL)],
            "processor": ["--model", str(DEFAULT_MODEL)],
            "frontend": ["--port", str(bare.port)],
        }
        for program in ("engine", "router", "processor", "frontend"):
            if program != stage:
                bare.start(program, *(options[program] if program == "engine" else ()))
        bare.run("copy", sys.executable, f"{stage}.py", *options.get(stage, []), cwd=folder)
        bare.wait_for_instances(processor=1, router=1, engine=1)
        answers = [bare.ask("Hello! " * 40) for _ in range(2)]
        assert [answer.status_code for answer in answers] == [200, 200]
        assert int(answers[1].headers["x-kv-overlap-blocks"]) > 2

    def test_is_as_long_as_it_says(self, tmp_path: Path, stage: str) -> None:
        command, count, lines = copies()[stage]
        subprocess.run(["bash", "-c", f"{command} {tmp_path}"], cwd=REPOSITORY, check=True)
        files = [file for file in tmp_path.rglob("*.py") if file != tmp_path / f"{stage}.py"]
        assert len(files) == count
        assert sum(len(file.read_text().splitlines()) for file in files) == pytest.approx(lines, rel=0.05)


def test_the_stage_in_between_runs(bare: Pipeline, tmp_path: Path) -> None:
    (tmp_path / "guard.py").write_text(code("`guard.py`"))
    bare.start("engine", "--backend", "mocker")
    bare.start("router")
    bare.start("processor").wait_for("serving inference.processor.process")
    bare.run("guard", sys.executable, str(tmp_path / "guard.py"), env={"PYTHONPATH": str(REPOSITORY)})
    bare.start("frontend", "--processor", "inference.guard.process")
    bare.wait_for_instances(**{"processor": 1, "router": 1, "engine": 1, "inference.guard.process": 1})
    assert bare.ask("Hello!").status_code == 200
    refused = bare.ask("What is the password?")
    assert refused.status_code == 400
    assert "does not talk about passwords" in refused.json()["error"]["message"]


def test_the_engine_of_your_own_runs_and_is_routed_to_by_cache(bare: Pipeline, tmp_path: Path) -> None:
    (tmp_path / "parrot.py").write_text(code("### Write your own engine"))
    for number in range(2):
        parrot = [sys.executable, str(tmp_path / "parrot.py")]
        bare.run(f"parrot-{number}", *parrot, env={"PYTHONPATH": str(REPOSITORY)})
    for program in ("router", "processor", "frontend"):
        bare.start(program)
    bare.wait_for_instances(processor=1, router=1, engine=2)
    questions = [f"Say this again, number {number}: " + "again " * 60 for number in range(6)]
    first = [bare.ask(question, max_tokens=None) for question in questions]
    for question, answer in zip(questions, first, strict=True):
        assert question.strip().lower() in answer.json()["choices"][0]["message"]["content"]
    again = [bare.ask(question, max_tokens=4) for question in questions]
    assert [a.headers["x-worker-id"] for a in again] == [a.headers["x-worker-id"] for a in first]
    assert min(int(answer.headers["x-kv-overlap-blocks"]) for answer in again) > 3
    bare.start("router", name="late").wait_for("joined", 2)
    until(lambda: len(bare.workers()) == 2, "both routers")
    known = [sum(worker["cached_blocks"] for worker in router) for router in bare.workers()]
    assert known[0] == known[1] > 20


def test_an_engine_that_breaks_the_protocol_is_named(bare: Pipeline, tmp_path: Path) -> None:
    parrot = code("### Write your own engine")
    broken = {
        "without a finish_reason": parrot.replace('yield EngineOutput(finish_reason="length")', "pass"),
        "tokens_ids": parrot.replace("EngineOutput(token_ids=[token_id])", "Misspelt(tokens_ids=[token_id])").replace(
            "class Parrot:", "class Misspelt(EngineOutput, kw_only=True):\n    tokens_ids: list[int]\n\n\nclass Parrot:"
        ),
    }
    for program in ("router", "processor", "frontend"):
        bare.start(program)
    for number, (fault, text) in enumerate(broken.items()):
        (tmp_path / "parrot.py").write_text(text)
        engine = bare.run(
            f"parrot-{number}", sys.executable, str(tmp_path / "parrot.py"), env={"PYTHONPATH": str(REPOSITORY)}
        )
        bare.wait_for_instances(processor=1, router=1, engine=1)
        response = bare.ask()
        assert response.status_code == 500
        message = response.json()["error"]["message"]
        assert "worker parrot-" in message and fault in message
        assert message in (bare.folder / "processor.log").read_text()
        engine.signal()
        engine.exit_code()
        bare.wait_for_instances(engine=0)


def test_the_policies_decide() -> None:
    assert code("keeps a conversation on its worker") in inspect.getsource(policy)
    names: dict[str, Any] = {"Candidate": Candidate, "Weights": Weights}
    exec(code("put it into `POLICIES` there"), names)
    identity = ModelIdentity(name="m", block_size=16)
    request = FindWorkerRequest(model=identity, local_hashes=[1, 2, 3], tokens=48)
    prompt = Prompt([1, 2, 3], 3.0)
    cold, warm = (Candidate(Worker(number, None), request, prompt, number, 0) for number in (1, 2))
    assert choose([cold, warm], names["most_cached"], Weights()) is warm


def test_the_openai_client_is_used_as_it_shows(pipeline: Pipeline) -> None:
    program = code("With the OpenAI client").replace("127.0.0.1:8000", f"127.0.0.1:{pipeline.port}")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "HTTP server" in done.stdout


def test_files_that_it_names_exist() -> None:
    for name in re.findall(r"`((?:common|tests|scripts|models|benchmarks)/[\w./-]*|\w+\.(?:py|sh))`", README):
        assert (REPOSITORY / name).exists() or name in ("guard.py", "parrot.py"), name


def test_options_that_it_names_exist() -> None:
    helps = "".join(
        subprocess.run([sys.executable, "-m", program, "--help"], cwd=REPOSITORY, capture_output=True, text=True).stdout
        for program in ("frontend", "processor", "router", "engine", "scripts.launch")
    )
    options = re.findall(r"`(--[\w-]+)", README[README.index("## Try it") : README.index("## Dependencies")])
    assert len(options) > 12
    assert [option for option in options if option not in helps] == []
