"""What a person does on the page of mlx-dsa serve, for its tests."""

import time

import page_server


def say(page, text):
    page.fill("#question", text)
    page.press("#question", "Enter")


def answered(page, number=1):
    """Wait for an answer's statistics; return what the answer says."""
    page.wait_for_function("n => document.querySelectorAll('.statistics').length >= n", arg=number)
    return page.locator(".turn.model").last.inner_text().replace("\xa0", " ")


def until(page, holds, seconds=15):
    end = time.monotonic() + seconds
    while not holds() and time.monotonic() < end:
        page.wait_for_timeout(20)  # the page's requests pass through this process
    return holds()


def chats(server):
    return [body for _, path, body in server.seen if path.endswith("chat/completions")]


def kept_page(server, open_page, text=page_server.TIDES, **settings):
    server.add("tides.txt", text)
    page = open_page(**settings)
    if page.locator("#side[open]").count() == 0:
        page.click("#side summary")
    page.check("#documents .option:has-text('tides.txt') input")
    page.click("#tab-kept")
    page.wait_for_selector("#kept-text .k4")
    return page
