"""The static site that make html writes, in a real browser."""

import shutil
import subprocess
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
from conftest import ROOT, python, run_python
from playwright.sync_api import sync_playwright
from test_jupyterlab import CHROMIUM, SCREENSHOTS

NOTEBOOKS = [*ROOT.glob("notebooks/[0-9]*_*.ipynb"), *ROOT.glob("studies/*.ipynb")]
LINKS = "links => links.map(link => link.href.split('#')[0])"
PICTURE = "images => images.every(image => image.complete && image.naturalWidth > 0)"


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


@pytest.fixture(scope="module")
def site():
    """The address at which the site is served, on this machine alone."""
    subprocess.run(python("tools/write_html.py"), cwd=ROOT, check=True)
    handler = partial(QuietHandler, directory=str(ROOT / "site"))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


@pytest.mark.browser
@pytest.mark.parametrize(("width", "scheme"), [(830, "light"), (1366, "dark")])
def test_every_page_is_whole_without_a_network(site, width, scheme):
    SCREENSHOTS.mkdir(exist_ok=True)
    faults, requested = [], []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(**CHROMIUM)
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        page.on("console", lambda message: faults.append(message.text))
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("requestfailed", lambda request: faults.append(request.url))
        page.on("response", lambda r: faults.append(r.url) if r.status >= 400 else None)
        page.on("request", lambda request: requested.append(request.url))
        seen, to_see = set(), {f"{site}index.html"}
        while to_see:
            address = to_see.pop()
            seen.add(address)
            page.goto(address)
            links = page.eval_on_selector_all("a[href]", LINKS)
            to_see |= {link for link in links if link.startswith(site)} - seen
            # Nothing makes the page itself scroll sideways, and every picture has its text.
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            assert page.locator("img:not([alt]), img[alt='']").count() == 0
            assert page.eval_on_selector_all("img", PICTURE)
            assert page.locator("h1").count() == 1
            assert "find_spec" not in page.content()  # the cell that fetches the helpers
            name = address.removeprefix(site).removesuffix(".html").replace("/", "-")
            page.screenshot(path=SCREENSHOTS / f"site-{name}-{width}-{scheme}.png", full_page=True)

        # From the landing page "next" leads through all of them, and "previous" back.
        page.goto(f"{site}index.html")
        chain = [page.url]
        while page.locator("a[rel=next]").count():
            page.click("a[rel=next]")
            assert page.locator("a[rel=prev]").evaluate("link => link.href") == chain[-1]
            chain.append(page.url)
        browser.close()
    assert faults == []
    assert [url for url in requested if not url.startswith((site, "data:"))] == []
    assert set(chain) == seen
    places = [path.relative_to(ROOT).with_suffix(".html").as_posix() for path in NOTEBOOKS]
    assert {f"{site}{place}" for place in places} <= seen


def test_what_is_none_of_the_notebooks_is_named_and_left_out(tmp_path):
    for name in ("docs", "benchmarks"):
        (tmp_path / name).symlink_to(ROOT / name)
    for name in ("README.md", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "notebooks").mkdir()
    shutil.copy(ROOT / "notebooks/1_model_a1.ipynb", tmp_path / "notebooks")
    shutil.copy(ROOT / "notebooks/2_model_a2.ipynb", tmp_path / "notebooks/Untitled.ipynb")
    (tmp_path / "notebooks/9_empty.ipynb").touch()
    shutil.copytree(ROOT / "tools", tmp_path / "tools")
    done = run_python("tools/write_html.py", cwd=tmp_path, check=True)
    assert "notebooks/Untitled.ipynb: left out" in done.stdout
    assert "notebooks/9_empty.ipynb: left out" in done.stdout
    pages = sorted(path.name for path in tmp_path.glob("site/notebooks/*"))
    assert pages == ["1_model_a1.html"]

    # A site that cannot be written whole leaves the older one as it is.
    readme = tmp_path / "README.md"
    readme.write_text(readme.read_text(encoding="utf-8").replace("training.png", "missing.png"))
    done = run_python("tools/write_html.py", cwd=tmp_path)
    assert done.returncode == 1
    assert "missing.png" in done.stderr
    assert (tmp_path / "site/notebooks/1_model_a1.html").exists()
    assert list(tmp_path.glob(".site-*")) == []
