"""Make the moving picture of the README from a real training: make picture.

Runs the notebook of A.1 on little data, as far as its training, and keeps each image that its
loss plot shows; of these, evenly spread, docs/training.png is made, an animated PNG. A GIF has no
half-transparent pixels, and would need a background that suits light or dark pages, not both.
"""

import base64
import io
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode
from PIL import Image

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "notebooks" / "1_model_a1.ipynb"
PICTURE = ROOT / "docs" / "training.png"
PARAMETERS = {"epochs": 6, "batch_size": 64, "dataset": "mnist-small"}
# The plot is drawn a third of the time, more often than a reader would want it.
OFTEN = "from mnist_utils import loss_plot\nloss_plot.LEAST_REST, loss_plot.REST = 0.0, 2"
FRAMES, MILLISECONDS, LAST_MILLISECONDS = 36, 150, 3000


class Watcher(NotebookClient):
    """Executes a notebook and keeps each image that its last cell shows, older ones as well."""

    images: list[bytes]

    def process_message(self, msg: dict, cell: NotebookNode, cell_index: int) -> Any:
        png = msg["content"].get("data", {}).get("image/png")
        if png and cell_index == len(self.nb.cells) - 1:
            self.images.append(base64.b64decode(png))
        return super().process_message(msg, cell, cell_index)


def main() -> None:
    notebook = nbformat.read(NOTEBOOK, 4)
    ids = [cell.id for cell in notebook.cells]
    with tempfile.TemporaryDirectory() as folder:
        values = {**PARAMETERS, "results_dir": folder}
        lines = [f"{name} = {value!r}" for name, value in values.items()]
        given = nbformat.v4.new_code_cell("\n".join([*lines, OFTEN]))
        cells = notebook.cells[: ids.index("training") + 1]
        cells.insert(ids.index("parameters") + 1, given)
        notebook.cells = cells
        watcher = Watcher(notebook, resources={"metadata": {"path": str(NOTEBOOK.parent)}})
        watcher.images = []
        watcher.extra_arguments = ["--IPKernelApp.log_level=CRITICAL"]
        watcher.execute()
    write(watcher.images)
    print(f"{len(watcher.images)} images drawn")
    print(f"{PICTURE.relative_to(ROOT)}: {PICTURE.stat().st_size:,} bytes")


def write(images: list[bytes]) -> None:
    """Write the animated PNG, with one palette for all frames."""
    last = len(images) - 1
    chosen = [images[round(i * last / (FRAMES - 1))] for i in range(FRAMES)]
    frames = [Image.open(io.BytesIO(png)).convert("RGBA") for png in chosen]
    width, height = frames[0].size
    column = Image.new("RGBA", (width, height * FRAMES))
    for i, frame in enumerate(frames):
        column.paste(frame, (0, i * height))
    column = column.quantize(method=Image.Quantize.FASTOCTREE)
    parts = [column.crop((0, i * height, width, (i + 1) * height)) for i in range(FRAMES)]
    durations = [MILLISECONDS] * (FRAMES - 1) + [LAST_MILLISECONDS]
    # What does not move shows the end of the training: the first of the images is no frame.
    parts[-1].save(
        PICTURE, save_all=True, append_images=parts, default_image=True, duration=durations, loop=0
    )


if __name__ == "__main__":
    main()
