"""The page of mlx-dsa serve: documents, and what is kept of them."""

import base64
import itertools
import json
import re
import time

import page_server
from page_actions import answered, chats, kept_page, say, until

pytest_plugins = ("page_fixtures",)


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


def test_a_document_that_is_gone_leaves_the_list(server, open_page):
    name = server.add("tides.txt", page_server.TIDES)["id"]
    page = open_page()
    page.check(f"input[value='{name}']")
    server.documents.clear()
    say(page, "Where is the key?")
    page.wait_for_selector(f"text=there is no document {name}")
    page.wait_for_function("() => document.querySelectorAll('#documents .option').length === 1")
    assert "without a document" in page.inner_text("#asked")


# What is kept


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
    runs = itertools.groupby(zip(bits[2], pieces), lambda pair: pair[0])
    runs = [(bit, "".join(piece for _, piece in pairs)) for bit, pairs in runs]
    expected = [text if bit else " …\n" if "\n" in text else " … " for bit, text in runs]
    assert page.text_content("#kept-text") == "".join(expected)


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
    assert set(marked) == {*page_server.READ, ""} and len(marked) > len(page_server.READ)
    style = page.eval_on_selector("mark", "mark => getComputedStyle(mark).textDecorationLine")
    assert style == "underline"
    assert page.evaluate("document.activeElement.id") == "read-next"
    first = page.inner_text("#read-text")
    assert re.fullmatch(r"1 of \d+: “.+”, 20 % of its attention, kept by \d+ of 36 layers\.", first)
    page.press("#read-next", "Enter")
    assert page.inner_text("#read-text").startswith("2 of")
    page.click("#read-previous")
    assert page.inner_text("#read-text") == first
    page.click("#read-previous")  # the last one is white space, and is seen all the same
    assert ": a line break, " in page.inner_text("#read-text")
    assert "⏎" in page.eval_on_selector("mark.current", "mark => getComputedStyle(mark, '::before').content")
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
    body = json.dumps(
        {"pieces": pieces, "layers": list(range(page_server.LAYERS)), "kept": page_server.kept_of(pieces)}
    )
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
    assert opened < 10 and took < 500
