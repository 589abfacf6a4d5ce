"""What the notebooks of this collection share.

Import the modules themselves, for example ``from mnist_utils.data import load_mnist``.
Only ``training`` and ``loss_plot`` need TensorFlow; the comparison does without it.
"""

import logging

# As it is imported where the home folder cannot be written, Matplotlib says where it keeps its
# files instead: a random path, which must not get into a notebook.
logging.getLogger("matplotlib").setLevel(logging.ERROR)
