"""The static site that make html writes, in a real browser."""

import subprocess
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
from conftest import NOTEBOOKS, ROOT, python
from test_jupyterlab import CHROMIUM_OPTIONS, SCREENSHOTS, find_chromium

pytestmark = pytest.mark.browser


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


@pytest.fixture(scope="module")
def site():
    """The address at which the site is served, on this machine alone."""
    subprocess.run(python("tools/write_html.py"), cwd=ROOT, check=True)
    server = ThreadingHTTPServer(
        ("127.0.0.1", 0), partial(QuietHandler, directory=str(ROOT / "site"))
    )
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


@pytest.mark.parametrize(("width", "scheme"), [(830, "light"), (1366, "dark")])
def test_every_page_is_whole_without_a_network(site, width, scheme):
    from playwright.sync_api import sync_playwright

    SCREENSHOTS.mkdir(exist_ok=True)
    faults, outside = [], []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_chromium(), args=CHROMIUM_OPTIONS)
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        page.on("console", lambda message: faults.append(message.text))
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("requestfailed", lambda request: faults.append(request.url))
        page.on("response", lambda r: faults.append(r.url) if r.status >= 400 else None)
        page.on(
            "request",
            lambda r: outside.append(r.url) if not r.url.startswith((site, "data:")) else None,
        )
        seen, to_see = set(), [f"{site}index.html"]
        while to_see:
            address = to_see.pop()
            seen.add(address)
            page.goto(address)
            links = page.eval_on_selector_all(
                "a[href]", "links => links.map(link => link.href.split('#')[0])"
            )
            to_see += {
                link for link in links if link.startswith(site) and link not in {*seen, *to_see}
            }
            # Nothing makes the page itself scroll sideways, and every picture has its text.
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            assert page.locator("img:not([alt]), img[alt='']").count() == 0
            name = address.removeprefix(site).removesuffix(".html")
            page.screenshot(path=SCREENSHOTS / f"site-{name}-{width}-{scheme}.png", full_page=True)
        browser.close()
    assert faults == []
    assert outside == []
    # A page a notebook, all reached from the index.
    assert len(seen) == len(list(NOTEBOOKS.glob("*.ipynb")))
