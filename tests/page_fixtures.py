"""A browser without a window for the tests of the page of mlx-dsa serve: fixtures, and what a person does."""

import os
import shutil

import page_server
import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
REQUIRED = os.environ.get("MLX_DSA_BROWSER") == "required"  # CI: without a browser nothing of this is tested
WAIT = 15_000  # milliseconds


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
