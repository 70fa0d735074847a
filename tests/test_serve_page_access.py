"""The page of mlx-dsa serve for everybody: by keyboard, spoken, on a phone, light and dark; and its pictures."""

import contextlib
import os
from pathlib import Path

import page_server
import pytest
from page_actions import answered, kept_page, say, until

pytest_plugins = ("page_fixtures",)

PICTURES = Path(__file__).resolve().parent.parent / "docs" / "images"


def violations(page):
    """Return what axe finds, as lines."""
    from axe_playwright_python.sync_playwright import Axe

    found = Axe().run(page).response["violations"]
    return [f"{one['id']}: {node['html'][:120]}" for one in found for node in one["nodes"]]


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
            document.documentElement.clientWidth + 1 && !e.closest("pre, .out-of-sight, .skip"))
            .map((e) => e.outerHTML.slice(0, 80))"""
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


# Pictures of the docs: MLX_DSA_PICTURES=1 python -m pytest tests/test_serve_page_access.py -k pictures


@pytest.mark.skipif(not os.environ.get("MLX_DSA_PICTURES"), reason="pictures are made where MLX_DSA_PICTURES is set")
def test_pictures(browser):
    """The page beside the bundled model: what it answers is the model's own."""
    from serving import Client, serving

    with serving(dense=False) as real:
        balloon = {"name": "balloon.txt", "text": (PICTURES.parent.parent / "prompts" / "balloon.txt").read_text()}
        Client(real).send("POST", "/v1/documents", balloon)
        page = asked(browser, real, viewport={"width": 1000, "height": 600})
        shoot(page, "serve-chat")
        page.click("button:text('What it read')")
        page.wait_for_selector("mark.current")
        page.evaluate("find('48213'); getSelection().anchorNode.parentElement.scrollIntoView({block: 'center'})")
        page.evaluate("getSelection().removeAllRanges()")
        shoot(page, "serve-kept")
        phone = {"width": 390, "height": 780}
        shoot(asked(browser, real, viewport=phone, color_scheme="dark", device_scale_factor=2), "serve-dark-phone")


def asked(browser, real, **settings):
    """Open the page, choose the document and ask it."""
    page = browser.new_context(**settings).new_page()
    page.goto(real.url)
    page.wait_for_selector("#documents .option", state="attached")
    if page.locator("#side[open]").count() == 0:
        page.click("#side summary")
    page.check("#documents .option:has-text('balloon.txt') input")
    if settings["viewport"]["width"] < 800:
        page.click("#side summary")
    say(page, "What is the access code of the lighthouse?")
    answered(page)
    return page


def shoot(page, name):
    PICTURES.mkdir(exist_ok=True)
    page.wait_for_timeout(300)
    page.screenshot(path=PICTURES / f"{name}.png")
    assert (PICTURES / f"{name}.png").stat().st_size < 150_000
