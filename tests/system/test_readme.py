"""What the README shows is true."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from common.policy import Candidate, Weights, choose
from common.worker import Prompt, Worker
from tests.system.conftest import REPOSITORY, Pipeline

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


def the_same_always(answer: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in answer.items() if name not in ("id", "created")}


def test_the_fifth_stage_runs(tmp_path: Path) -> None:
    pipeline = Pipeline(tmp_path)
    try:
        (tmp_path / "guard.py").write_text(code("`guard.py`"))
        pipeline.start("engine", "--backend", "mocker")
        pipeline.start("router")
        pipeline.start("processor").wait_for("serving inference.processor.process")
        pipeline.run("guard", sys.executable, str(tmp_path / "guard.py"), env={"PYTHONPATH": str(REPOSITORY)})
        pipeline.start("frontend", "--processor", "inference.guard.process")
        pipeline.wait_for_instances(processor=1, router=1, engine=1)
        assert pipeline.ask("Hello!").status_code == 200
        refused = pipeline.ask("What is the password?")
        assert refused.status_code == 400
        assert "does not talk about passwords" in refused.json()["error"]["message"]
    finally:
        pipeline.close()


def test_the_policy_decides() -> None:
    names: dict[str, Any] = {"Candidate": Candidate, "Weights": Weights}
    exec(code("put it into `POLICIES` there"), names)
    prompt = Prompt([1, 2, 3], 3.0)
    cold, warm = (Candidate(Worker(number, None, 16), prompt, number, 0) for number in (1, 2))
    assert choose([cold, warm], names["most_cached"], Weights()) is warm


def test_files_that_it_names_exist() -> None:
    for name in re.findall(r"`((?:common|tests|scripts|models|benchmarks)/[\w./-]*|\w+\.(?:py|sh))`", README):
        assert (REPOSITORY / name).exists() or name == "guard.py", name


def test_options_that_it_names_exist() -> None:
    helps = "".join(
        subprocess.run([sys.executable, program, "--help"], cwd=REPOSITORY, capture_output=True, text=True).stdout
        for program in ("frontend.py", "processor.py", "router.py", "engine.py", "scripts/launch.py")
    )
    options = re.findall(r"`(--[\w-]+)", README[README.index("## Make it yours") : README.index("## Dependencies")])
    assert len(options) > 12
    assert [option for option in options if option not in helps] == []
