"""The page at /, in a real browser, beside a real pipeline with simulated engines."""

import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from common.engines.ports import free_ports
from tests.system.conftest import PATIENCE, REPOSITORY, Pipeline, until

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Locator, Page, Request, expect, sync_playwright

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# Nothing that a browser does beside showing a page.
QUIET = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run", "--disable-sync")
LONG = "What does the router do, and how does it know which worker has my prompt cached? Answer in a few short words."
SPEEDUP = "0.3"  # so that there is time to kill an engine in the middle of an answer

pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no browser: install chromium (apt-get install chromium)")
expect.set_options(timeout=PATIENCE * 1000)

Open = Callable[..., Page]


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pipeline]:
    """A pipeline with three simulated engines, as `--demo --show-prompts` starts them."""
    pipeline = Pipeline(tmp_path_factory.mktemp("watched"))
    try:
        for number in ("0", "1", "2"):
            options = ("--backend", "mocker", "--mocker-speedup", SPEEDUP, "--demo", "--worker-id", number)
            pipeline.start("engine", *options, name=f"engine-{number}")
        for program in ("router", "processor"):
            pipeline.start(program)
        pipeline.start("frontend", "--demo", "--show-prompts")
        pipeline.wait_for_instances(processor=1, router=1, engine=3)
        yield pipeline
    finally:
        pipeline.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(QUIET))
        yield browser
        browser.close()


@pytest.fixture
def visit(watched: Pipeline, browser: Browser) -> Iterator[Open]:
    """Opens the page. At the end there must have been no error on it, and no request to anybody else."""
    faults: list[str] = []
    address = f"http://127.0.0.1:{watched.port}/"

    def note(message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            faults.append(message.text)

    def check(request: Request) -> None:
        if urlsplit(request.url).netloc != urlsplit(address).netloc:
            faults.append(request.url)

    def visit(width: int = 1280, height: int = 900, script: str = "", *, live: bool = True) -> Page:
        page = browser.new_context(viewport={"width": width, "height": height}).new_page()
        page.set_default_timeout(PATIENCE * 1000)
        page.on("console", note)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("request", check)
        if script:
            page.add_init_script(script)
        page.goto(address)
        if live:
            expect(page.locator("#connection")).to_contain_text("live")
        return page

    yield visit
    for context in browser.contexts:
        context.close()
    assert not faults


def ask(page: Page, text: str, max_tokens: int = 8) -> Locator:
    """Send something in the chat. Returns the newest decision, once there is one."""
    before = page.locator("li.decision").count()
    if not page.locator("#max-tokens").is_visible():
        page.get_by_text("Model, system prompt, tools").click()
    page.get_by_label("Max tokens").fill(str(max_tokens))
    page.get_by_label("Your message").fill(text)
    page.get_by_label("Your message").press("Enter")
    expect(page.locator("li.decision")).to_have_count(before + 1)
    return page.locator("li.decision").first


def test_a_first_visit_explains_itself(visit: Open) -> None:
    page = visit()
    expect(page.locator("header")).to_contain_text("Each prompt goes to the engine")
    expect(page.locator("#decisions")).to_contain_text("Send something in the chat")
    for stage, count in (("frontend", 1), ("processor", 1), ("router", 1), ("engine", 3)):
        expect(page.locator(f".stage.{stage} .card")).to_have_count(count)
    expect(page.locator(".stage.engine .card").first).to_contain_text("KV cache 0 of 16,384 blocks")


def test_a_prompt_shows_up_with_its_decision_and_the_next_one_with_its_overlap(visit: Open) -> None:
    page = visit()
    first = ask(page, LONG)
    expect(first.locator(".title")).to_have_text(LONG)
    expect(first.locator(".why")).to_have_text(re.compile("none of its 3 blocks and are equally busy: drawn by lot"))
    expect(first.locator(".costs li")).to_have_count(3)
    expect(page.locator(".turn.answer .took")).to_contain_text("tokens/s")
    worker = first.locator(".costs .won .name").inner_text()
    page.get_by_role("button", name="New conversation").click()
    second = ask(page, LONG)
    expect(second.locator(".why")).to_have_text(
        re.compile(rf"Worker {worker}: 2 of 3 blocks cached, so 1 to compute; .* would have had to compute 3\.")
    )
    expect(page.locator(".turn.answer .took")).to_contain_text(f"worker {worker} · 2 blocks cached of 3")
    expect(page.locator(".card.chosen")).to_contain_text(f"engine {worker}")
    expect(page.locator(".card.chosen .strip")).to_have_attribute("aria-label", re.compile("^2 of 3 blocks"))


def test_a_decision_opens_into_the_life_of_its_request(visit: Open) -> None:
    page = visit()
    decision = ask(page, "What is a KV cache?")
    expect(page.locator(".turn.answer .took")).to_contain_text("8 tokens")
    page.locator(".turn.answer .took").click()
    for text in ("template and tokens", "route", "queue and prefill", "decode", "answer8 tokens", "ended withlength"):
        expect(decision.locator(".more")).to_contain_text(text)
    page.get_by_role("button", name="Follow the newest").click()
    expect(decision.locator(".more")).to_be_hidden()


@pytest.mark.parametrize(("button", "cached"), [("Send 20 like it", True), ("Send 20 different ones", False)])
def test_twenty_requests_lead_to_decisions(visit: Open, button: str, cached: bool) -> None:
    page = visit()
    page.get_by_label("Your message").fill("What does a router do?")
    page.get_by_role("button", name=button).click()
    expect(page.locator("#burst")).to_have_text(re.compile("^20 answers"))
    expect(page.locator("li.decision")).to_have_count(20)
    share = re.search(r"(\d+) % of their blocks", page.locator("#burst").inner_text())
    assert share
    assert int(share[1]) > 50 if cached else int(share[1]) == 0


def test_what_others_send_is_seen_as_text(watched: Pipeline, visit: Open) -> None:
    page = visit()
    prompt = "<img src=x onerror=alert(1)><b>bold</b>"
    assert watched.ask(prompt).status_code == 200
    expect(page.locator("li.decision .title")).to_have_text(prompt)
    assert page.locator("img, b").count() == 0


def test_errors_are_said_in_words(visit: Open) -> None:
    page = visit()
    page.get_by_text("Model, system prompt, tools").click()
    page.get_by_label("Tools, a JSON list").fill("[{")
    page.get_by_label("Your message").fill("Hello!")
    page.get_by_label("Your message").press("Enter")
    expect(page.locator(".turn.failed")).to_contain_text("The tools are not JSON")
    page.get_by_label("Tools, a JSON list").fill("")

    def refuse(status: int, body: str, content_type: str = "application/json") -> Locator:
        page.unroute_all()
        page.route(
            "**/v1/chat/completions",
            lambda route: route.fulfill(status=status, body=body, content_type=content_type),
        )
        page.get_by_label("Your message").fill("Hello!")
        page.get_by_label("Your message").press("Enter")
        return page.locator(".turn.answer").last

    error = {"error": {"message": "no engine fits", "code": "no_worker"}}
    events = f"data: {json.dumps(chunk(content='Once'))}\n\ndata: {json.dumps(error)}\n\n"
    answer = refuse(200, events, "text/event-stream")
    expect(answer).to_contain_text("Once")
    expect(answer).to_contain_text("Error (no_worker): no engine fits")


def test_tool_calls_are_shown_and_their_results_asked_for(visit: Open) -> None:
    page = visit()
    begin = {"index": 0, "id": "call-1", "function": {"name": "stop", "arguments": ""}}
    rest = {"index": 0, "function": {"arguments": '{"engine": 0}'}}
    chunks = [chunk(tool_calls=[begin]), chunk(tool_calls=[rest])]
    body = "".join(f"data: {json.dumps(one)}\n\n" for one in chunks) + "data: [DONE]\n\n"
    sent: list[Any] = []
    page.on("request", lambda request: sent.append(request.post_data_json) if request.method == "POST" else None)
    page.route("**/v1/chat/completions", lambda route: route.fulfill(body=body, content_type="text/event-stream"))
    page.get_by_label("Your message").fill("Stop engine 0, please.")
    page.get_by_label("Your message").press("Enter")
    expect(page.locator(".calls li")).to_have_text('stop({"engine": 0})')
    page.get_by_label("Result of the tool stop").fill("stopped")
    page.get_by_label("Result of the tool stop").press("Enter")
    expect(page.locator(".calls li")).to_have_count(2)
    messages = sent[-1]["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant", "tool"]
    assert messages[1]["tool_calls"][0]["function"] == {"name": "stop", "arguments": '{"engine": 0}'}
    assert messages[2] == {"role": "tool", "tool_call_id": "call-1", "content": "stopped"}


def chunk(**delta: object) -> dict[str, object]:
    return {"choices": [{"index": 0, "delta": delta}]}


def test_everything_can_be_reached_by_keyboard(visit: Open) -> None:
    page = visit()
    ask(page, "Where can the Tab key go?")
    expect(page.get_by_role("button", name="Stop")).to_be_hidden()
    controls = "a, button, summary, input, select, textarea"
    wanted = page.locator(controls).evaluate_all("""(all) => all
        .filter((one) => one.checkVisibility() && !one.disabled)
        .map((one, place) => one.dataset.at = place)""")
    page.evaluate("document.activeElement.blur()")
    reached: set[str] = set()
    for _ in range(3 * len(wanted)):
        page.keyboard.press("Tab")
        at = page.evaluate("document.activeElement.dataset.at")
        outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        if at is not None:
            reached.add(at)
            assert outline != "none", page.evaluate("document.activeElement.outerHTML")
    assert reached == {str(at) for at in wanted}
    page.locator("li.decision > button").focus()
    page.keyboard.press("Enter")
    expect(page.locator("li.decision > button")).to_have_attribute("aria-expanded", "true")
    kill = page.get_by_role("button", name="Kill engine 0")
    kill.focus()
    page.keyboard.press("Enter")
    expect(page.get_by_role("dialog", name="Kill engine 0?")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_be_hidden()
    expect(kill).to_be_focused()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_fits_a_phone(visit: Open, scheme: str) -> None:
    page = visit(390, 844)
    page.emulate_media(color_scheme="dark" if scheme == "dark" else "light", reduced_motion="reduce")
    ask(page, f"A word without an end: {'blocks' * 40}").locator("button").click()
    assert page.evaluate("document.documentElement.scrollWidth") == 390


def test_stays_small_and_answers_with_64_workers_and_500_requests_a_second(visit: Open) -> None:
    page = visit(script="window.PER_TICK = 50;" + (Path(__file__).parent / "many_workers.js").read_text())
    expect(page.locator(".engine .card")).to_have_count(64)
    expect(page.locator("#connection")).to_contain_text("1 of 16 requests shown")
    until(lambda: page.evaluate("made > 3000"), "3000 requests")
    assert page.locator("li.decision").count() <= 30
    assert page.locator("*").count() < 10_000
    page.locator("li.decision > button").first.click()
    expect(page.locator("li.decision.open")).to_have_count(1)
    title = page.locator("li.decision.open .title").inner_text()
    until(lambda: page.evaluate("made > 5000"), "5000 requests")
    expect(page.locator("li.decision.open .title")).to_have_text(title)  # it stays while one reads it
    page.get_by_label("Your message").fill("still there")
    expect(page.get_by_label("Your message")).to_have_value("still there")


def test_a_killed_engine_disappears_and_its_answer_goes_on(watched: Pipeline, visit: Open) -> None:
    page = visit()
    ask(page, "Tell me all that there is to say.", max_tokens=400)
    victim = page.locator(".card.chosen")
    name = victim.locator("strong").inner_text()
    expect(page.locator(".turn.answer p").first).not_to_be_empty()
    victim.get_by_role("button", name="Kill").click()
    page.get_by_role("dialog").get_by_role("button", name="Keep it").click()
    expect(page.locator(".card.lost")).to_have_count(0)
    victim.get_by_role("button", name="Kill").click()
    page.get_by_role("dialog").get_by_role("button", name="Kill it").click()
    worker = name.removeprefix("engine ")
    expect(page.locator(".turn.answer .note")).to_have_text(re.compile(f"Worker {worker} was lost after .* goes on"))
    expect(page.locator(".turn.answer .took")).to_contain_text(re.compile(rf"worker {worker} → \d .* 400 tokens"))
    expect(page.locator("li.decision .why").first).to_contain_text(f"Moved from worker {worker} after")
    expect(page.locator(".engine .card", has_text=name)).to_have_count(0)
    assert watched.instances()["engine"] == 2


def test_says_when_it_is_disconnected_and_comes_back(watched: Pipeline, visit: Open, browser: Browser) -> None:
    page = browser.new_context().new_page()  # not a visit: the browser writes lost connections on the console
    page.goto(f"http://127.0.0.1:{watched.port}/")
    expect(page.locator("#connection")).to_contain_text("live")
    frontend = next(process for process in watched.processes if process.log.name == "frontend.log")
    frontend.close()
    watched.processes.remove(frontend)
    expect(page.locator("#connection")).to_contain_text("disconnected")
    page.get_by_label("Your message").fill("Hello?")
    page.get_by_label("Your message").press("Enter")
    expect(page.locator(".turn.failed")).to_contain_text("The pipeline does not answer")
    watched.start("frontend", "--demo", "--show-prompts")
    expect(page.locator("#connection")).to_contain_text("live")
    expect(page.locator(".frontend .card")).to_have_count(1)
    ask(page, "And now?")


@pytest.mark.skipif(not os.environ.get("PICTURES"), reason="makes the README's picture: PICTURES=1")
def test_the_picture(pipeline: Pipeline, browser: Browser) -> None:
    """With the real engines, whose answers make sense."""
    page = browser.new_context(viewport={"width": 1280, "height": 800}, color_scheme="light").new_page()
    page.goto(f"http://127.0.0.1:{pipeline.port}/")
    expect(page.locator(".engine .card")).to_have_count(2)
    for question in ("What does the router do?", "What is a KV cache?", "How does the router choose?"):
        ask(page, question, max_tokens=64)
        expect(page.get_by_role("button", name="Stop")).to_be_hidden()
    page.get_by_text("Model, system prompt, tools").click()
    page.get_by_role("button", name="Send 20 like it").click()
    expect(page.locator("#burst")).to_contain_text("20 answers")  # and their dots, which are slower, still fly
    until(lambda: page.locator("li.decision").count() == 23, "all decisions")
    page.evaluate("Promise.all(document.getAnimations().map((animation) => animation.finished))")
    (REPOSITORY / "pictures").mkdir(exist_ok=True)
    page.screenshot(path=REPOSITORY / "pictures" / "page.png")


def test_where_a_key_is_needed_it_asks_for_it_until_it_is_right(watched: Pipeline, browser: Browser) -> None:
    keys = watched.folder / "keys"
    keys.write_text("sk-mine")
    keys.chmod(0o600)
    (port,) = free_ports(1)
    options = ("--port", str(port), "--api-keys-file", str(keys))
    frontend = watched.run("closed", sys.executable, "frontend.py", *options).wait_for("serving")
    page = browser.new_page()
    page.goto(f"http://127.0.0.1:{port}/")
    for key in ("sk-wrong", "sk-mine"):
        expect(page.locator("#key")).to_be_visible()
        page.locator("#key input").fill(key)
        page.locator("#key button").click()
    expect(page.locator("#connection")).to_contain_text("live")
    expect(page.locator("#key")).to_be_hidden()
    page.reload()  # which keeps it
    expect(page.locator("#connection")).to_contain_text("live")
    page.get_by_role("button", name="What does the router do?").click()
    expect(page.locator(".turn.answer .took")).to_contain_text("worker")
    page.close()
    frontend.close()
