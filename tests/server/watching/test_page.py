"""The page in a browser, against a real server: it answers, shows the engine, and asks no other server."""

import json
import shutil
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest

pytest.importorskip("playwright", reason="needs playwright, to drive a browser")
from playwright.sync_api import Page, Route, expect, sync_playwright

from tests.server.process import serving

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine")
DESKTOP, PHONE = (1280, 860), (390, 800)


class Opened(NamedTuple):
    """page: in the browser. complaints: of the console, and errors. asked: every address that was asked for."""

    page: Page
    complaints: list[str]
    asked: list[str]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serving("--no-governor", "--memory", "25%") as process:
        yield process.url


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def open_page(browser: Any, url: str) -> Iterator[Callable[..., Opened]]:
    contexts = []

    def opening(size: tuple[int, int] = DESKTOP, before: Callable[[Page], None] = lambda page: None) -> Opened:
        context = browser.new_context(viewport={"width": size[0], "height": size[1]})
        contexts.append(context)
        opened = Opened(context.new_page(), [], [])
        opened.page.on("console", lambda message: opened.complaints.append(message.text))
        opened.page.on("pageerror", lambda error: opened.complaints.append(str(error)))
        opened.page.on("request", lambda request: opened.asked.append(request.url))
        before(opened.page)
        opened.page.goto(url)
        expect(opened.page.locator("#why-1")).to_contain_text("256 experts in 8 layers", timeout=20_000)
        return opened

    yield opening
    for context in contexts:
        context.close()


def say(page: Page, text: str) -> None:
    page.fill("#text", text)
    page.keyboard.press("Enter")


def colours_of(page: Page, canvas: str) -> int:
    """Different colours in a picture."""
    return page.evaluate(
        "id => { const shown = document.getElementById(id), copy = new OffscreenCanvas(shown.width, shown.height); "
        "const pen = copy.getContext('2d', {willReadFrequently: true}); pen.drawImage(shown, 0, 0); "
        "return new Set(new Uint32Array(pen.getImageData(0, 0, copy.width, copy.height).data.buffer)).size; }",
        canvas,
    )


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_a_message_is_answered_and_the_machine_is_seen_at_work(open_page, url: str, size: tuple[int, int]) -> None:
    page, complaints, asked = open_page(size)
    empty = page.evaluate("document.getElementById('timeline').toDataURL()")
    say(page, "4735 + 281")
    expect(page.locator(".turn.assistant")).to_contain_text("5016", timeout=30_000)
    expect(page.locator(".took")).to_contain_text("tokens", timeout=30_000)
    expect(page.locator("#caption")).to_contain_text("64 of 256 experts are in memory", timeout=10_000)
    for name in ("hit-rate", "read-mb", "stall-ms", "tpot-ms"):
        assert float(page.inner_text(f"#{name}").split()[0].replace(",", "")) > 0, name
    kinds = [int(page.inner_text(f"#n-{kind}")) for kind in ("hits", "in_time", "late_hits", "misses")]
    assert sum(kinds) == 8 * 4, "every token asks for 4 experts in each of 8 layers"
    assert colours_of(page, "grid") > 5
    assert page.evaluate("document.getElementById('timeline').toDataURL()") != empty
    assert "64 of 256" in page.get_attribute("#grid", "aria-label")
    assert page.evaluate("document.documentElement.scrollWidth") <= size[0], "nothing hangs over the edge"
    assert complaints == []
    assert asked
    assert all(one.startswith(url + "/") for one in asked)


def test_an_answer_can_be_stopped_and_the_chat_goes_on(open_page) -> None:
    page = open_page().page
    say(page, "import os\nimport sys\n\ndef main():")
    expect(page.locator("#send")).to_have_text("Stop")
    page.keyboard.press("Escape")
    expect(page.locator("#send")).to_have_text("Send", timeout=10_000)
    say(page, "12 + 30")
    expect(page.locator(".took").last).to_contain_text("tokens", timeout=30_000)
    page.click("#new-chat")
    assert page.locator(".turn").count() == 0


def test_a_square_tells_of_itself_by_key_and_pointer(open_page) -> None:
    page = open_page().page
    page.focus("#grid")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    expect(page.locator("#cell")).to_contain_text("Layer 1, expert 0: ")
    page.hover("#grid", position={"x": 40, "y": 8})
    expect(page.locator("#cell")).to_contain_text("Layer 0, expert ")


def test_text_of_a_model_is_no_markup(open_page) -> None:
    evil = '<img src=x onerror=\\"document.title=1\\">'
    stream = f'data: {{"choices": [{{"delta": {{"content": "{evil}"}}}}]}}\n\ndata: [DONE]\n\n'

    def answer(page: Page) -> None:
        page.route("**/v1/chat/completions", lambda route: route.fulfill(body=stream, content_type="text/event-stream"))

    opened = open_page(before=answer)
    say(opened.page, "hello")
    expect(opened.page.locator(".turn.assistant")).to_contain_text("<img src=x")
    assert opened.page.locator(".turn img").count() == 0
    assert opened.complaints == []


def test_the_page_asks_for_a_key_when_the_server_does(open_page) -> None:
    given: list[str | None] = []

    def guard(route: Route) -> None:
        given.append(route.request.headers.get("authorization"))
        if given[-1] == "Bearer right":
            route.fallback()
        else:
            route.fulfill(status=401, body="{}", content_type="application/json")

    opened = open_page(before=lambda page: page.route("**/v1/**", guard))
    page = opened.page
    say(page, "12 + 30")
    for key in ("wrong", "right"):
        expect(page.locator("#key-dialog")).to_be_visible()
        page.fill("#key", key)
        page.keyboard.press("Enter")
        page.wait_for_timeout(200)
    expect(page.locator(".took")).to_contain_text("tokens", timeout=30_000)
    assert given[:3] == [None, "Bearer wrong", "Bearer right"]
    assert page.evaluate("[localStorage.length, document.cookie]") == [0, ""]
    assert "right" not in page.evaluate("JSON.stringify({...sessionStorage})"), "the chat is kept, and never the key"


def stream_of(*deltas: dict[str, object]) -> str:
    chunks = [{"choices": [{"delta": delta}]} for delta in deltas]
    return "".join(f"data: {json.dumps(one)}\n\n" for one in chunks) + "data: [DONE]\n\n"


class Answering:
    """Answers for the server: in turn, and the last one again. asked: the bodies of requests."""

    def __init__(self, *answers: tuple[int, str]) -> None:
        self.answers, self.asked = list(answers), list[dict[str, Any]]()

    def __call__(self, page: Page) -> None:
        def fulfil(route: Route) -> None:
            self.asked.append(route.request.post_data_json)
            status, body = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
            kind = "text/event-stream" if status == 200 else "application/json"
            route.fulfill(status=status, body=body, content_type=kind)

        page.route("**/v1/chat/completions", fulfil)


def test_an_answer_is_markdown_and_what_was_thought_is_folded(open_page) -> None:
    text = "**Two** ways:\n\n```py\nprint(1)\n```"
    opened = open_page(before=Answering((200, stream_of({"reasoning_content": "so"}, {"content": text}))))
    page = opened.page
    say(page, "hello")
    expect(page.locator(".words strong")).to_have_text("Two")
    expect(page.locator(".code code")).to_have_text("print(1)")
    expect(page.locator("details summary")).to_have_text("Reasoning")
    assert opened.complaints == []


def test_a_refused_message_returns_to_the_box(open_page) -> None:
    page = open_page(before=Answering((400, '{"error": {"message": "too long"}}'))).page
    say(page, "a long one")
    expect(page.locator(".turn.error")).to_have_text("too long")
    expect(page.locator("#text")).to_have_value("a long one")
    assert page.locator(".turn.user").count() == 0


def test_the_chat_can_be_steered_and_outlives_a_reload(open_page) -> None:
    answering = Answering((200, stream_of({"content": "One"})), (200, stream_of({"content": "Two"})))
    page = open_page(before=answering).page
    page.click("#show-settings")
    page.fill("[name=system]", "Be brief.")
    page.fill("[name=temperature]", "0.5")
    say(page, "hello")
    expect(page.locator(".turn.assistant .words")).to_have_text("One")
    assert "max_tokens" not in answering.asked[0]
    page.click("text=Regenerate")
    expect(page.locator(".turn.assistant .words")).to_have_text("Two")
    wanted = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}]
    assert [one["messages"] for one in answering.asked] == [wanted, wanted]
    assert answering.asked[0]["temperature"] == 0.5
    page.reload()
    expect(page.locator(".turn.assistant .words")).to_have_text("Two")
    assert page.input_value("[name=system]") == "Be brief."
    page.click("text=Edit")
    expect(page.locator("#text")).to_have_value("hello")
    assert page.locator(".turn").count() == 0
