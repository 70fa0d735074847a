"""The page of mlx-dsa serve in a browser, against a server with canned answers: its files, chat, errors, key."""

import re
from importlib.resources import files
from urllib.request import urlopen

import page_server
import pytest
from page_actions import answered, chats, say, until

from mlx_dsa.serve import pages

pytest_plugins = ("page_fixtures",)


# Files


def test_every_file_of_the_page_is_served_and_no_other():
    shipped = {entry.name for entry in files("mlx_dsa.serve").joinpath("page").iterdir()}
    served = {name for name in shipped if pages.static_file(f"/{name}")}
    assert served == shipped
    assert pages.static_file("/")[1].startswith("text/html")
    for path in (
        "",
        "page.js",
        "/../pages.py",
        "/pages.py",
        "//page.js",
        "/page.js/",
        "/page.JS",
        "/%2e/page.js",
        "/x",
    ):
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
    assert "3,881 tokens seen · 1,001 entries kept (26 %) · KV memory 148 MB, dense 572 MB · 41.3 tokens/s" in text
    assert "first token after 380 ms · 512 tokens re-used" in text


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
    assert page.inner_text(".statistics") == "9.0 tokens/s\xa0· 512 tokens re-used"


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


def test_a_new_chat_ends_the_old_answer(server, open_page):
    page = open_page()
    say(page, "endless")
    page.wait_for_selector("text=more and more")
    page.click("#new-chat")
    assert until(page, lambda: server.gone) and page.locator(".turn").count() == 0
    say(page, "hello")
    assert "You said: hello." in answered(page) and page.is_hidden("#error")


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
    assert page.locator(".turn.model").last.locator(".text").first.text_content() == "One ``` in a line."
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
