"""The notebooks in a real JupyterLab, in a real browser: make test-browser."""

import json
import os
import re
import shlex
import shutil
import subprocess
import time
import urllib.request
from contextlib import suppress
from pathlib import Path

import nbformat
import pytest
from conftest import ROOT, python
from playwright.sync_api import sync_playwright

from mnist_utils.runs import load_runs

pytestmark = pytest.mark.browser

SCREENSHOTS = ROOT / "browser-screenshots"
EPOCHS = 3
DIGITS = "7_your_digits"
CHROMIUM = {
    "executable_path": shutil.which("chromium") or shutil.which("google-chrome"),
    "args": ["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-sync"],
}


@pytest.fixture(scope="module")
def project(small_mnist, tmp_path_factory) -> Path:
    """A copy of the project whose notebooks train on little data."""
    folder = tmp_path_factory.mktemp("project")
    for name in ("mnist_utils", "results"):
        (folder / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "notebooks", folder / "notebooks")
    small = {"epochs": EPOCHS, "batch_size": 64, "dataset": str(small_mnist)}
    for path in folder.glob("notebooks/*.ipynb"):
        notebook = nbformat.read(path, 4)
        # Drawn digits are for the reference models, not for what is trained here.
        given = small | ({"results_dir": str(folder / "none")} if path.stem == DIGITS else {})
        for cell in notebook.cells:
            if cell.cell_type == "code":
                cell.outputs, cell.execution_count = [], None
        (cell,) = (c for c in notebook.cells if "parameters" in c.metadata.get("tags", []))
        for name, value in given.items():
            changed = rf"\g<1>{value!r}"
            cell.source = re.sub(rf"(?m)^({name}: .+? = )\S+", changed, cell.source)
        nbformat.write(notebook, path)
    return folder


@pytest.fixture(scope="module")
def server(project, tmp_path_factory):
    """The address of a JupyterLab server over the copy, started as make jupyter does."""
    home = tmp_path_factory.mktemp("home")
    options = "--no-browser --allow-root --expose-app-in-browser --IdentityProvider.token=test"
    options += " --ServerApp.ip=127.0.0.1 --ServerApp.port=0"
    make = ["make", "-n", "jupyter", f"JUPYTER_OPTIONS={options}"]
    printed = subprocess.run(make, cwd=ROOT, capture_output=True, text=True).stdout
    folders = dict.fromkeys(("HOME", "JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR"), str(home))
    command = python(*shlex.split(re.search("/python (-m jupyterlab .*)", printed)[1]))
    quiet = dict.fromkeys(("stdout", "stderr"), subprocess.DEVNULL)
    with subprocess.Popen(command, cwd=project, env=os.environ | folders, **quiet) as process:
        try:
            yield _address(process, home)
        finally:
            process.terminate()


def _address(process, runtime: Path) -> str:
    """Wait until the server has said where it listens and answers there."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert process.poll() is None, "the server ended"
        for path in runtime.glob("jpserver-*.json"):
            with suppress(OSError, ValueError):  # not whole, or not listening, yet
                address = json.loads(path.read_text())["url"]
                urllib.request.urlopen(f"{address}api").close()
                return address
        time.sleep(0.2)
    raise AssertionError("the server did not start in two minutes")


@pytest.fixture(scope="module")
def page(server):
    SCREENSHOTS.mkdir(exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(**CHROMIUM)
        page = browser.new_page(viewport={"width": 1366, "height": 900})  # a laptop's
        yield page
        browser.close()


def open_notebook(page, server, name: str) -> None:
    page.goto(f"{server}lab/tree/notebooks/{name}.ipynb?token=test&reset")
    page.wait_for_function(
        """() => {
            const panel = window.jupyterapp?.shell?.currentWidget;
            return panel?.sessionContext?.session?.kernel?.status === 'idle'
                && panel.content.widgets.length > 5;
        }""",
        timeout=120_000,
    )


def show_cell(page, index: int) -> None:
    """Bring a cell to the window's top, as a reader who scrolls to it does."""
    notebook = "window.jupyterapp.shell.currentWidget.content"
    scroll = f"{notebook}.activeCellIndex = index; await {notebook}.scrollToItem(index, 'start');"
    page.evaluate(f"async index => {{ {scroll} }}", index)


def cell_index(project, name: str, text: str) -> int:
    cells = nbformat.read(project / f"notebooks/{name}.ipynb", 4).cells
    return next(i for i, c in enumerate(cells) if c.cell_type == "code" and text in c.source)


def wait_until_done(page) -> None:
    page.wait_for_function(
        """() => {
            const panel = window.jupyterapp.shell.currentWidget;
            const code = panel.content.widgets.filter(cell => cell.model.type === 'code');
            const failed = code.some(cell => cell.model.outputs.toJSON().some(
                output => output.output_type === 'error'));
            return failed || (panel.sessionContext.session.kernel.status === 'idle'
                && code.every(cell => cell.model.executionCount));
        }""",
        timeout=300_000,
    )


def take_pictures(page, name: str, indices: list[int]) -> None:
    """Keep what a reader sees of cells, in both themes, where the workflow shows it to somebody."""
    if not os.environ.get("CI"):
        return
    for shade in ("Light", "Dark"):
        change = f"'apputils:change-theme', {{theme: 'JupyterLab {shade}'}}"
        page.evaluate(f"window.jupyterapp.commands.execute({change})")
        page.wait_for_timeout(1000)
        for index in indices:
            show_cell(page, index)
            page.wait_for_timeout(500)
            page.screenshot(path=SCREENSHOTS / f"{name}-{index:02d}-{shade.lower()}.png")


# Notes at every change of the page, however fast, what a reader sees of the training cell.
WATCH_TRAINING = """() => {
    const seen = window.seen = {picturesWhileTraining: [], mostPicturesAtOnce: 0, bars: []};
    const add = (list, value) => { if (!list.includes(value)) list.push(value); };
    new MutationObserver(() => {
        const cell = [...document.querySelectorAll('.jp-Cell')].find(
            cell => cell.textContent.includes('DynamicLossPlot()'));
        const output = cell?.querySelector('.jp-Cell-outputArea');
        const pictures = [...(output?.querySelectorAll('img') ?? [])];
        seen.mostPicturesAtOnce = Math.max(seen.mostPicturesAtOnce, pictures.length);
        const bar = output?.textContent.match(/Epoch \\d+\\/\\d+ \\[[=.]+\\] +[\\w%]+/);
        if (!bar) return;
        add(seen.bars, bar[0]);
        pictures.forEach(picture => add(seen.picturesWhileTraining, picture.src));
    }).observe(document.body, {subtree: true, childList: true, characterData: true});
}"""


def run_without_fault(page) -> list[list[dict]]:
    """Run all cells of a notebook that was opened; return their outputs as JupyterLab has them."""
    page.evaluate("() => { window.jupyterapp.commands.execute('notebook:run-all-cells'); }")
    wait_until_done(page)
    outputs = page.evaluate(
        """() => window.jupyterapp.shell.currentWidget.content.widgets.map(
            cell => cell.model.type === 'code' ? cell.model.outputs.toJSON() : [])"""
    )
    assert not [o for cell in outputs for o in cell if o["output_type"] == "error"]
    assert not [o for cell in outputs for o in cell if o.get("name") == "stderr"]
    return outputs


# The training cells of A.2, C and D differ from these in numbers alone; nbval runs all six.
@pytest.mark.parametrize("name", ["1_model_a1", "3_model_b", "6_model_e"])
def test_the_loss_is_drawn_in_place_while_the_model_trains(name, page, server, project):
    open_notebook(page, server, name)
    training = cell_index(project, name, "model.fit(")
    show_cell(page, training)
    page.evaluate(WATCH_TRAINING)
    outputs = run_without_fault(page)
    seen = page.evaluate("window.seen")
    # It appeared, and changed while training ran, in one place; the bar below it moved.
    assert len(seen["picturesWhileTraining"]) >= 2 and len(seen["bars"]) >= 2
    assert seen["mostPicturesAtOnce"] == 1
    assert sum("image/png" in o.get("data", {}) for o in outputs[training]) == 1
    # The epoch lines stand beside the plot, one an epoch, on the page itself.
    show_cell(page, training)
    cell = page.locator(".jp-Cell").filter(has_text="DynamicLossPlot()")
    assert len(re.findall(rf"Epoch \d/{EPOCHS}: loss", cell.inner_text())) == EPOCHS
    runs, problems = load_runs(project / "runs")
    (run,) = runs[runs.model == name.split("_")[-1]].itertuples()
    assert (run.epochs, run.by_hand, problems) == (EPOCHS, True, [])
    figures = [i for i, cell in enumerate(outputs) if "image/png" in json.dumps(cell)]
    take_pictures(page, name, [0, *figures])


def test_make_jupyter_opens_at_the_notebooks_and_links_lead_out_of_their_folder(page, server):
    page.goto(f"{server}?token=test")
    page.locator(".jp-DirListing-item", has_text="1_model_a1.ipynb").wait_for()
    urllib.request.urlopen(f"{server}api/contents/mnist_utils/runs.py?token=test").close()


def test_the_comparison_shows_tables_and_figures(page, server, project):
    open_notebook(page, server, "8_comparison")
    outputs = run_without_fault(page)
    own = len(load_runs(project / "runs")[0])
    assert f"runs of the collection, {own} of your own." in json.dumps(outputs)
    tables = [i for i, cell in enumerate(outputs) if "<table" in json.dumps(cell)]
    figures = [i for i, cell in enumerate(outputs) if "image/png" in json.dumps(cell)]
    assert len(tables) >= 4 and len(figures) >= 3
    show_cell(page, tables[0])
    page.locator(".jp-RenderedHTMLCommon table", has_text="CNN A.1").first.wait_for()
    # The widest table fits its place: nothing is cut off or hidden behind a scroll bar.
    for index in tables:
        show_cell(page, index)
        page.wait_for_timeout(300)
        wide = "places => places.filter(place => place.scrollWidth > place.clientWidth + 1).length"
        assert page.eval_on_selector_all(".jp-RenderedHTMLCommon", wide) == 0
    take_pictures(page, "8_comparison", [0, *tables, *figures])


# Strokes, in shares of the canvas.
STROKES = {
    1: [[(0.5, 0.15), (0.48, 0.5), (0.47, 0.85)]],
    0: [
        [(0.5, 0.15), (0.3, 0.3), (0.28, 0.6), (0.45, 0.85), (0.65, 0.7), (0.68, 0.35), (0.5, 0.15)]
    ],
    7: [[(0.25, 0.2), (0.5, 0.19), (0.75, 0.2), (0.6, 0.5), (0.5, 0.85)]],
}
PALM = """() => {
    const paper = document.querySelector('.digit-canvas .paper');
    const { left, top, width, height } = paper.getBoundingClientRect();
    const place = { clientX: left + 0.9 * width, clientY: top + 0.1 * height };
    for (const kind of ['down', 'move', 'up'])
        paper.dispatchEvent(new PointerEvent(`pointer${kind}`, { pointerId: 99, ...place }));
}"""
INKED = """([x, y]) => {
    const paper = document.querySelector('.digit-canvas .paper');
    return paper.getContext('2d').getImageData(280 * x, 280 * y, 1, 1).data[3] > 0;
}"""
ANSWERS = """() => [...document.querySelectorAll('.digit-canvas .best')].map(e => e.textContent)"""


def draw(page, strokes, between=lambda: None) -> None:
    """Draw strokes; ``between`` is called after each of their parts."""
    box = page.locator(".digit-canvas .paper").bounding_box()
    for stroke in strokes:
        points = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in stroke]
        page.mouse.move(*points[0])
        page.mouse.down()
        for point in points[1:]:
            page.mouse.move(*point, steps=5)
            between()
        page.mouse.up()


def wait_for(page, expected: str) -> None:
    """Wait until every model's answer begins with ``expected``; empty: until there is none."""
    page.wait_for_function(
        f"""() => ({ANSWERS})().every(
            text => {expected!r} ? text.startsWith({expected!r}) : !text)""",
        timeout=10_000,
    )


def test_the_models_answer_what_is_drawn(page, server, project):
    open_notebook(page, server, DIGITS)
    outputs = run_without_fault(page)
    for text in ("read_picture(picture", "show_digits(images", "steps(photo)"):
        assert "image/png" in json.dumps(outputs[cell_index(project, DIGITS, text)])
    assert "The models disagree on:" in json.dumps(outputs)
    drawing = cell_index(project, DIGITS, "draw(models)")
    assert "image/png" not in outputs[drawing][0]["data"]  # the canvas, not its picture
    show_cell(page, drawing)
    page.locator(".digit-canvas .paper").wait_for()
    for digit, strokes in STROKES.items():
        draw(page, strokes)
        wait_for(page, str(digit))
        if digit != 7:
            page.get_by_role("button", name="Clear").click()
            wait_for(page, "")
    # Another stroke, in which a palm beside the pen draws nothing and ends nothing; and back again.
    draw(page, [[(0.1, 0.8), (0.9, 0.8)]])
    draw(page, [[(0.1, 0.9), (0.5, 0.9), (0.9, 0.9)]], between=lambda: page.evaluate(PALM))
    places = ([0.9, 0.1], [0.3, 0.9], [0.8, 0.9])
    assert [page.evaluate(INKED, place) for place in places] == [False, True, True]
    for _ in range(2):
        page.get_by_role("button", name="Undo").click()
    wait_for(page, "7")
    take_pictures(page, DIGITS, [drawing])
