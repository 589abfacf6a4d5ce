"""What the notebooks of this collection share.

Import the modules themselves, for example ``from mnist_utils.data import load_mnist``.
Only ``training`` and ``loss_plot`` need TensorFlow; the comparison does without it.
"""
