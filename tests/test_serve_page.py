"""The page of mlx-dsa serve, in a browser without a window, against a server with canned answers."""

import base64
import contextlib
import json
import os
import re
import shutil
import time
from importlib.resources import files
from pathlib import Path
from urllib.request import urlopen

import page_server
import pytest

from mlx_dsa.serve import pages

PICTURES = Path(__file__).resolve().parent.parent / "docs" / "images"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
REQUIRED = os.environ.get("MLX_DSA_BROWSER") == "required"  # CI: without a browser nothing of this is tested
WAIT = 5000  # milliseconds


def without(what):
    (pytest.fail if REQUIRED else pytest.skip)(f"the page is tested with {what}; it is not installed")


@pytest.fixture(scope="module")
def browser():
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        without("playwright (pip install 'mlx-dsa[page]')")
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if not program:
        without("Chromium (on Debian: apt-get install chromium)")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def running():
    server = page_server.PageServer()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def server(running):
    running.reset()
    return running


@pytest.fixture
def open_page(browser, server):
    """Open the page; at the end nothing has left the origin, and no script failed."""
    contexts, outside, failed = [], [], []

    def keep_inside(route):
        if not route.request.url.startswith(server.url):
            outside.append(route.request.url)
            return route.abort()
        return route.continue_()

    def open_it(width=1100, height=760, load=True, **settings):
        context = browser.new_context(viewport={"width": width, "height": height}, **settings)
        context.set_default_timeout(WAIT)
        contexts.append(context)
        page = context.new_page()
        page.route("**/*", keep_inside)
        page.on("pageerror", lambda error: failed.append(str(error)))
        page.on("console", lambda said: failed.append(said.text) if "Security Policy" in said.text else None)
        if load:
            page.goto(server.url)
            page.wait_for_selector("#documents .option", state="attached")
        return page

    open_it.outside, open_it.failed = outside, failed
    yield open_it
    for context in contexts:
        context.close()
    assert not outside, "a request left the origin"
    assert not failed


def say(page, text):
    page.fill("#question", text)
    page.press("#question", "Enter")


def answered(page, number=1):
    """Wait for an answer's statistics; return what the answer says."""
    page.wait_for_function("n => document.querySelectorAll('.statistics').length >= n", arg=number)
    return page.locator(".turn.model").last.inner_text()


def until(page, holds, seconds=5):
    end = time.monotonic() + seconds
    while not holds() and time.monotonic() < end:
        page.wait_for_timeout(20)  # the page's requests pass through this process
    return holds()


def drop(page, name, text):
    """Drop a file of this text on the page."""
    page.evaluate(
        """([name, text]) => {
            const data = new DataTransfer();
            data.items.add(new File([text], name));
            const settings = { dataTransfer: data, bubbles: true, cancelable: true };
            for (const kind of ["dragover", "drop"]) document.body.dispatchEvent(new DragEvent(kind, settings));
        }""",
        [name, text],
    )


def violations(page):
    """Return what axe finds, as lines."""
    from axe_playwright_python.sync_playwright import Axe

    found = Axe().run(page).response["violations"]
    return [f"{one['id']}: {node['html'][:120]}" for one in found for node in one["nodes"]]


def chats(server):
    return [body for _, path, body in server.seen if path.endswith("chat/completions")]


# Files


def test_every_file_of_the_page_is_served_and_no_other():
    shipped = {entry.name for entry in files("mlx_dsa.serve").joinpath("page").iterdir()}
    served = {name for name in shipped if pages.static_file(f"/{name}")}
    assert served == shipped
    assert pages.static_file("/")[1].startswith("text/html")
    for path in ("", "page.js", "/../pages.py", "/pages.py", "//page.js", "/page.js/", "/page.JS", "/%2e/page.js", "/x"):
        assert pages.static_file(path) is None, path


def test_files_of_the_page_are_short_and_name_no_other_place():
    for entry in files("mlx_dsa.serve").joinpath("page").iterdir():
        text = entry.read_text(encoding="utf-8")
        lines = text.splitlines()
        assert len(lines) <= 350 and max(map(len, lines)) <= 120, entry.name
        places = re.findall(r"(?:https?:)?//[a-z][\w.-]+\.[a-z]+", text)
        assert set(places) <= {"http://www.w3.org"}, entry.name  # the name of SVG, which nothing fetches
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(", text), entry.name


def test_the_policy_is_sent(server):
    with urlopen(server.url) as answer:
        policy = answer.headers["Content-Security-Policy"]
    assert "default-src 'self'" in policy and "unsafe" not in policy


# Chat


def test_an_answer_streams(server, open_page):
    server.pause = 0.05
    page = open_page()
    say(page, "hello there")
    page.wait_for_function("() => document.querySelector('.turn.model .text')?.textContent.length > 5")
    assert page.locator(".statistics").count() == 0  # in the middle of it
    text = answered(page)
    assert "You said: hello there. That is all." in text
    assert "31,954 tokens seen · 2,048 entries kept (6.4 %) · KV memory 302 MB, dense 4.7 GB · 41.3 tokens/s" in text
    assert "first token after 380 ms · 512 read before" in text


def test_turns_follow_each_other(server, open_page):
    page = open_page()
    say(page, "one")
    answered(page)
    say(page, "two")
    answered(page, 2)
    roles = [message["role"] for message in chats(server)[1]["messages"]]
    assert roles == ["user", "assistant", "user"] and "document" not in chats(server)[1]
    page.click("#new-chat")
    assert page.locator(".turn").count() == 0 and page.is_visible("#welcome")
    say(page, "three")
    answered(page)
    assert len(chats(server)[2]["messages"]) == 1


def test_what_is_unknown_is_left_out(open_page):
    page = open_page()
    say(page, "little")
    answered(page)
    assert page.inner_text(".statistics") == "9.0 tokens/s · 512 read before"


def test_progress_of_a_prompt(server, open_page):
    server.pause = 0.3
    page = open_page()
    say(page, "hello")
    page.wait_for_selector("text=Reading: 512 of 2,048 tokens")
    assert page.evaluate("document.querySelector('.waiting progress').value") == 512
    page.click("#stop")


def test_stop_ends_the_request(server, open_page):
    page = open_page()
    say(page, "endless")
    page.wait_for_selector("text=more and more")
    page.click("#stop")
    assert until(page, lambda: server.gone == ["/v1/chat/completions"]), "the server still writes"
    assert "Stopped." in page.locator(".turn.model").inner_text()
    assert page.evaluate("document.activeElement.id") == "question"
    say(page, "hello")  # what came stays part of the conversation
    answered(page)
    assert [m["role"] for m in chats(server)[1]["messages"]] == ["user", "assistant", "user"]


def test_stop_before_an_answer_gives_the_question_back(server, open_page):
    server.pause = 0.3
    page = open_page()
    say(page, "hello")
    page.wait_for_selector("text=Reading: 512")
    page.press("#question", "Escape")
    page.wait_for_function("() => document.getElementById('question').value === 'hello'")
    assert page.locator(".turn").count() == 0 and until(page, lambda: server.gone)


def test_reasoning_is_folded(open_page):
    page = open_page()
    say(page, "please think")
    answered(page)
    assert page.locator(".reasoning").get_attribute("open") is None
    assert page.locator(".reasoning .text").text_content() == "The person greets me. I greet back."
    assert page.locator(".turn.model > div .text").inner_text() == "Hello! How can I help?"


def test_code_has_a_frame_and_a_copy_button(open_page):
    page = open_page(permissions=["clipboard-read", "clipboard-write"])
    say(page, "show code")
    answered(page)
    code = 'for name in names:\n    print(f"<b>{name}</b>")\n'
    assert page.locator("pre code").text_content() == code
    assert page.locator(".code + .text").text_content() == "It prints <b>names</b>."
    page.click(".code button")
    page.wait_for_selector("button:text('Copied')")
    assert page.evaluate("navigator.clipboard.readText()") == code
    say(page, "show fence")
    answered(page, 2)
    assert page.locator(".turn.model").last.locator(".text").first.text_content() == "One ``` in a line.\n"
    assert page.locator("pre code").last.text_content() == "code without an end"


def test_markup_of_a_model_stays_text(open_page):
    page = open_page()
    say(page, "show markup")
    assert page_server.ANSWERS["markup"][1] in answered(page)
    assert page.locator("#log img, #log script").count() == 0 and page.title() == "mlx-dsa"


@pytest.mark.parametrize(
    "question, line",
    [
        ("refused", "the prompt has 90,000 tokens; this server takes 40,000"),
        ("busy", "all places are taken. Try again in 5 s."),
        ("plain", "The server answered 502."),
        ("inner", "the model ran out of memory"),
    ],
)
def test_an_error_is_one_line(open_page, question, line):
    page = open_page()
    say(page, question)
    page.wait_for_selector("#error")
    assert page.inner_text("#error-text") == line
    assert page.input_value("#question") == question  # to be sent again
    say(page, "hello")
    answered(page)
    assert page.is_hidden("#error") and page.locator(".turn").count() == 2


def test_a_broken_answer_is_told(open_page):
    page = open_page()
    say(page, "broken")
    page.wait_for_selector("text=Broken off.")
    assert page.inner_text("#error-text") == "The connection ended before the answer was complete."
    say(page, "cut")
    assert "Cut here: the limit of tokens for one answer." in answered(page)


def test_no_server(open_page):
    page = open_page()
    page.unroute_all()
    page.route("**/v1/**", lambda route: route.abort())
    say(page, "hello")
    page.wait_for_selector("text=The server does not answer. Is it still running?")


def test_a_key_is_asked_for(server, open_page):
    server.key = "right"
    page = open_page(load=False)
    page.goto(server.url)
    page.wait_for_selector("#key-form")
    assert page.evaluate("document.activeElement.id") == "key"
    page.fill("#key", "wrong")
    page.press("#key", "Enter")
    page.wait_for_selector("text=did not accept that key")
    page.fill("#key", "right")
    page.press("#key", "Enter")
    page.wait_for_selector("#model:text('Qwen3-8B')")
    say(page, "hello")
    answered(page)
    assert page.is_hidden("#key-form") and page.is_hidden("#error")
    page.reload()  # kept for this tab
    page.wait_for_selector("#model:text('Qwen3-8B')")
    assert page.is_hidden("#key-form")
    assert page.evaluate("[localStorage.length, document.cookie]") == [0, ""]


# Documents


def test_a_dropped_file_becomes_a_document(server, open_page):
    server.pause = 0.08
    page = open_page()
    drop(page, "tides.txt", page_server.TIDES)
    page.wait_for_function("() => document.querySelector('#readings progress')?.value > 0")
    total = len(page_server.pieces_of(page_server.TIDES))
    assert re.fullmatch(rf"\d+ of {total} tokens", page.inner_text("#readings .quiet"))
    server.pause = 0.002
    page.wait_for_selector("#documents .option:has-text('tides.txt')")
    assert page.locator("#readings li").count() == 0
    assert page.inner_text("#asked") == "Asking tides.txt"
    say(page, "Where is the key?")
    answered(page)
    (name,) = server.documents
    assert chats(server)[-1]["document"] == name and server.texts[name] == page_server.TIDES
    page.check("input[value='']")  # another conversation, the first one waits
    assert page.is_visible("#welcome")
    page.check(f"input[value='{name}']")
    assert page.locator(".turn:visible").count() == 2


def test_reading_can_be_cancelled(server, open_page):
    server.pause = 0.2
    page = open_page()
    drop(page, "tides.txt", page_server.TIDES)
    page.click("#readings button")
    assert until(page, lambda: server.gone == ["/v1/documents?stream=true"]) and not server.documents
    assert page.locator("#readings li").count() == 0 and page.is_hidden("#error")


def test_a_file_that_is_no_text(server, open_page):
    page = open_page()
    page.set_input_files("#file", {"name": "a.bin", "mimeType": "text/plain", "buffer": b"\xff\xfe\x00\x01"})
    page.wait_for_selector("text=a.bin is not a text file in UTF-8. Save it as plain text and add that.")
    assert not any(method == "POST" for method, _, _ in server.seen)


def test_a_document_is_deleted_once_that_is_confirmed(server, open_page):
    server.add("tides.txt", page_server.TIDES)
    page = open_page()
    page.check("#documents .option:has-text('tides.txt') input")
    for answer in ("Keep it", "Delete it"):
        page.click("button:text('Delete')")
        page.click(f"dialog button:text('{answer}')")
        assert until(page, lambda: bool(server.documents) == (answer == "Keep it"))
    page.wait_for_function("() => document.querySelectorAll('#documents .option').length === 1")
    assert page.is_checked("input[value='']")


# What is kept


def kept_page(server, open_page, **settings):
    server.add("tides.txt", page_server.TIDES)
    page = open_page(**settings)
    if page.locator("#side[open]").count() == 0:
        page.click("#side summary")
    page.check("#documents .option:has-text('tides.txt') input")
    page.click("#tab-kept")
    page.wait_for_selector("#kept-text .k4")
    return page


def shades(page):
    """Return the shade of each character of the text in view."""
    runs = page.evaluate(
        "[...document.querySelectorAll('#kept-text [class]')].map(s => [s.className.match(/k\\d/)[0], s.textContent])"
    )
    return "".join(text for _, text in runs), "".join(name[1] * len(text) for name, text in runs)


def test_shades_are_the_share_of_layers(server, open_page):
    page = kept_page(server, open_page)
    pieces = page_server.pieces_of(page_server.TIDES)
    rows = [base64.b64decode(row) for row in page_server.kept_of(pieces)]
    bits = [[row[i // 8] >> (7 - i % 8) & 1 for i in range(len(pieces))] for row in rows]
    text, shade = shades(page)
    assert text == page_server.TIDES
    expected = [-(-4 * sum(column) // len(bits)) for column in zip(*bits)]
    assert shade == "".join(str(level) * len(piece) for level, piece in zip(expected, pieces))
    page.fill("#layer", "3")
    page.wait_for_selector("text=Layer 2 keeps")
    assert page.inner_text("#layer-name") == "Layer 2"
    assert page.get_attribute("#layer", "aria-valuetext") == "Layer 2"
    _, shade = shades(page)
    assert shade == "".join("04"[bit] * len(piece) for bit, piece in zip(bits[2], pieces))
    assert f"Layer 2 keeps {sum(bits[2])} of {len(pieces)} tokens" in page.inner_text("#kept-summary")
    assert "dropped" in page.inner_text("#legend") and f"kept: {sum(bits[2])}" in page.inner_text("#legend")
    page.check("#only-kept")
    kept = "".join(piece if bit else "\0" for bit, piece in zip(bits[2], pieces))
    assert page.text_content("#kept-text") == re.sub("\0+", " … ", kept)


def test_what_an_answer_read_is_underlined(server, open_page):
    page = kept_page(server, open_page)
    page.click("#tab-chat")
    say(page, "Where is the key?")
    answered(page)
    page.click("button:text('What it read')")
    page.wait_for_selector("#kept-text mark.current")
    _, path, body = server.seen[-1]
    assert path.endswith("/read") and body["messages"][-1]["content"] == "Where is the key?"
    assert body["answer"] == page_server.ANSWERS["key"][1]
    marked = [text.strip() for text in page.locator("#kept-text mark").all_text_contents()]
    assert set(marked) == {"kitchen", "blue", "key", "lower", "motor"} & set(marked) and len(marked) >= 4
    style = page.eval_on_selector("mark", "mark => getComputedStyle(mark).textDecorationLine")
    assert style == "underline"
    assert page.evaluate("document.activeElement.id") == "read-next"
    first = page.inner_text("#read-text")
    assert re.fullmatch(r"1 of \d+: “.+”, 20 % of its attention, kept by \d+ of 12 layers\.", first)
    page.press("#read-next", "Enter")
    assert page.inner_text("#read-text").startswith("2 of")
    page.click("#read-previous")
    assert page.inner_text("#read-text") == first
    page.fill("#layer", "5")
    assert page.locator("#kept-text mark").count() == len(marked)
    page.click("#read-clear")
    assert page.locator("#kept-text mark").count() == 0


def test_a_long_document_is_quick(server, open_page):
    text = "\n".join(page_server.TIDES for _ in range(320))
    pieces = page_server.pieces_of(text)
    assert len(pieces) > 100_000
    (name,) = [server.add("long.txt", text)["id"]]
    # Answered in advance: this is about the page, not about this server.
    body = json.dumps({"pieces": pieces, "layers": list(range(12)), "kept": page_server.kept_of(pieces)})
    page = open_page()
    page.route("**/kept", lambda route: route.fulfill(body=body, content_type="application/json"))
    page.check(f"input[value='{name}']")
    start = time.monotonic()
    page.click("#tab-kept")
    page.wait_for_selector("#kept-text .k4")
    opened = time.monotonic() - start
    assert page.evaluate("document.querySelector('#kept-text').textContent") == text
    took = page.evaluate(
        """() => new Promise((done) => {
            const start = performance.now();
            const layer = document.getElementById("layer");
            for (let value = 1; value <= 12; value += 1) {
                layer.value = value;
                layer.dispatchEvent(new Event("input"));
            }
            requestAnimationFrame(() => setTimeout(() => done((performance.now() - start) / 12)));
        })"""
    )
    page.evaluate("document.querySelector('#kept-text').scrollTop = 1e7")
    page.wait_for_selector("#kept-text > div:last-child .k4", state="attached")
    assert page.locator("#kept-text [class]").count() < 8000  # what is far from the view is plain text
    print(f"100,000 tokens: opened after {opened:.2f} s, a move of the slider {took:.0f} ms")
    assert opened < 6 and took < 300


# For everybody


def test_all_by_keyboard(server, open_page):
    page = open_page()

    def tab_to(wanted, limit=25):
        for _ in range(limit):
            page.keyboard.press("Tab")
            if page.evaluate("wanted => document.activeElement.matches(wanted)", wanted):
                outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
                assert outline != "none", f"the focus on {wanted} is not seen"
                return
        pytest.fail(f"Tab does not reach {wanted}")

    tab_to(".skip", 1)
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    page.reload()
    page.wait_for_selector("#documents .option")
    tab_to("#show-paste")
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "paste-text"
    page.keyboard.insert_text(page_server.TIDES)
    tab_to("#paste button", 2)
    page.keyboard.press("Enter")
    page.wait_for_selector("#documents .option:has-text('The harbour of Skarrow, a')")
    assert page.evaluate("document.activeElement.id") == "show-paste"
    tab_to("#documents input:checked")
    page.keyboard.press("ArrowUp")
    assert "without a document" in page.inner_text("#asked")
    page.keyboard.press("ArrowDown")
    assert "The harbour" in page.inner_text("#asked")
    tab_to("#question")
    page.keyboard.type("endless")
    page.keyboard.press("Shift+Enter")
    assert page.input_value("#question") == "endless\n"
    page.keyboard.press("Enter")
    page.wait_for_selector("text=more and more")
    page.keyboard.press("Escape")
    page.wait_for_selector("text=Stopped.")
    assert until(page, lambda: server.gone)
    page.keyboard.type("Where is the key?")
    page.keyboard.press("Enter")
    answered(page)
    page.keyboard.press("Shift+Tab")  # the conversation's last button stands before the field
    assert page.evaluate("document.activeElement.textContent") == "What it read"
    page.keyboard.press("Enter")
    page.wait_for_selector("mark.current")
    page.keyboard.press("Enter")
    page.wait_for_selector("text=2 of")
    for _ in range(3):
        page.keyboard.press("Shift+Tab")
    assert page.evaluate("document.activeElement.id") == "layer"
    page.keyboard.press("ArrowRight")
    page.wait_for_selector("text=Layer 0 keeps")
    page.keyboard.press("Shift+Tab")
    assert page.evaluate("document.activeElement.id") == "tab-kept"
    page.keyboard.press("ArrowLeft")
    assert page.is_visible("#panel-chat") and page.evaluate("document.activeElement.id") == "tab-chat"
    page.focus("#documents .option:last-child button")
    page.keyboard.press("Enter")
    page.keyboard.press("Escape")  # keeps it
    assert server.documents
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert until(page, lambda: not server.documents)


def test_answers_are_spoken_by_sentence(open_page):
    page = open_page()
    page.evaluate(
        """() => {
            window.spoken = [];
            const note = (changes) => changes.forEach((c) => c.addedNodes.forEach((n) => spoken.push(n.textContent)));
            new MutationObserver(note).observe(document.getElementById("live"), { childList: true });
        }"""
    )
    say(page, "hello")
    answered(page)
    spoken = page.evaluate("spoken")
    assert spoken[:2] == ["You said: hello.", "That is all."] and len(spoken) == 3  # and the statistics
    assert page.get_attribute("#live", "aria-live") == "polite"
    assert page.locator("#log[aria-live], #log [aria-live]").count() == 0


def wide_elements(page):
    return page.evaluate(
        """() => [...document.querySelectorAll("body *")].filter((e) => e.getBoundingClientRect().right >
            document.documentElement.clientWidth + 1 && !e.closest("pre, .out-of-sight, .skip")).map((e) => e.outerHTML.slice(0, 80))"""
    )


def test_a_phone_is_wide_enough(server, open_page):
    page = kept_page(server, open_page, width=360, height=640)
    for prepare in (
        lambda: None,
        lambda: page.click("#tab-chat"),
        lambda: (say(page, "show code"), answered(page)),
        lambda: (say(page, "w" * 400), answered(page, 2)),
        lambda: (say(page, "refused"), page.wait_for_selector("#error")),
        lambda: page.click("#show-paste"),
    ):
        prepare()
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        assert not wide_elements(page)
    page.evaluate("document.querySelector('.drop').style.width = '500px'")
    assert wide_elements(page)  # the check can fail


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(server, open_page, scheme):
    page = open_page(color_scheme=scheme)
    assert violations(page) == []
    page.click("#tab-kept")
    assert violations(page) == []
    page = kept_page(server, open_page, color_scheme=scheme)
    assert violations(page) == []
    page.click("#tab-chat")
    for number, question in enumerate(("please think", "show code", "Where is the key?"), 1):
        say(page, question)
        answered(page, number)
    page.click(".reasoning summary")
    page.click("#show-paste")
    say(page, "refused")
    page.wait_for_selector("#error")
    assert violations(page) == []
    page.locator("button:text('What it read')").last.click()
    page.wait_for_selector("mark.current")
    page.fill("#layer", "4")
    assert violations(page) == []
    page.click("#documents button:text('Delete')")
    assert violations(page) == []


def test_axe_finds_what_is_wrong(open_page):
    page = open_page()
    page.evaluate("document.querySelector('#panel-chat').append(document.createElement('button'))")
    assert any(line.startswith("button-name") for line in violations(page))
    page.evaluate("document.getElementById('keys').style.color = '#ccc'")
    assert any(line.startswith("color-contrast") for line in violations(page))


def test_the_guards_of_these_tests_see(open_page):
    page = open_page()
    page.evaluate("fetch('http://127.0.0.1:9/').catch(() => {})")
    assert until(page, lambda: "violates" in " ".join(open_page.failed))
    assert page.evaluate("() => { try { document.body.innerHTML = '<b>'; } catch (error) { return error.name; } }")
    with contextlib.suppress(Exception):  # the policy says nothing of where a person goes
        page.goto("http://127.0.0.1:9/")
    assert open_page.outside == ["http://127.0.0.1:9/"]
    open_page.failed.clear()
    open_page.outside.clear()


# Pictures of the docs: MLX_DSA_PICTURES=1 python -m pytest tests/test_serve_page.py -k pictures


@pytest.mark.skipif(not os.environ.get("MLX_DSA_PICTURES"), reason="pictures are made where MLX_DSA_PICTURES is set")
def test_pictures(server, open_page):
    server.add("minutes-of-march.txt", page_server.TIDES[:900] * 9)
    page = kept_page(server, open_page, height=700)
    page.click("#tab-chat")
    say(page, "Where is the key?")
    answered(page)
    shoot(page, "serve-chat")
    page.click("button:text('What it read')")
    page.wait_for_selector("mark.current")
    shoot(page, "serve-kept")
    phone = kept_page(server, open_page, width=390, height=780, color_scheme="dark", device_scale_factor=2)
    phone.click("#side summary")
    phone.click("#tab-chat")
    say(phone, "Where is the key?")
    answered(phone)
    shoot(phone, "serve-dark-phone")


def shoot(page, name):
    PICTURES.mkdir(exist_ok=True)
    page.screenshot(path=PICTURES / f"{name}.png")
    assert (PICTURES / f"{name}.png").stat().st_size < 150_000
