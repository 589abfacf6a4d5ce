"""Digits drawn with the mouse in a real JupyterLab: make test-browser."""

import json
from pathlib import Path

import pytest
from conftest import ROOT
from test_jupyterlab import (  # noqa: F401 (server and page are fixtures)
    cell_index,
    open_notebook,
    page,
    run_without_fault,
    server,
    show_cell,
    take_pictures,
)

pytestmark = pytest.mark.browser

NAME = "7_your_digits"
# Strokes, in shares of the canvas.
DIGITS = {
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


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A copy of the project with the reference models alone."""
    folder = tmp_path_factory.mktemp("project")
    for name in ("mnist_utils", "results", "notebooks"):
        (folder / name).symlink_to(ROOT / name)
    return folder


def draw(page, strokes, between=lambda: None) -> None:  # noqa: F811
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


def wait_for(page, expected: str) -> None:  # noqa: F811
    """Wait until every model's answer begins with ``expected``; empty: until there is none."""
    page.wait_for_function(
        f"""() => ({ANSWERS})().every(
            text => {expected!r} ? text.startsWith({expected!r}) : !text)""",
        timeout=10_000,
    )


def test_the_models_answer_what_is_drawn(page, server, project):  # noqa: F811
    open_notebook(page, server, NAME)
    outputs = run_without_fault(page)
    for text in ("read_picture(picture", "show_digits(images", "steps(photo)"):
        assert "image/png" in json.dumps(outputs[cell_index(project, NAME, text)])
    assert "The models disagree on:" in json.dumps(outputs)
    drawing = cell_index(project, NAME, "draw(models)")
    assert "image/png" not in outputs[drawing][0]["data"]  # the canvas, not its picture
    show_cell(page, drawing)
    page.locator(".digit-canvas .paper").wait_for()
    for digit, strokes in DIGITS.items():
        draw(page, strokes)
        wait_for(page, str(digit))
        if digit != 7:
            page.get_by_role("button", name="Clear").click()
            wait_for(page, "")
    # Another stroke, in which a palm beside the pen draws nothing and ends nothing; and back again.
    draw(page, [[(0.1, 0.8), (0.9, 0.8)]])
    draw(page, [[(0.1, 0.9), (0.5, 0.9), (0.9, 0.9)]], between=lambda: page.evaluate(PALM))
    assert [page.evaluate(INKED, place) for place in ([0.9, 0.1], [0.3, 0.9], [0.8, 0.9])] == [
        *(False, True, True)
    ]
    for _ in range(2):
        page.get_by_role("button", name="Undo").click()
    wait_for(page, "7")
    take_pictures(page, NAME, [drawing])
