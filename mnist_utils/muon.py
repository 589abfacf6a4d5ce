"""The optimizer of models D and E."""

from mnist_utils.training import keras, tf


def orthogonal(matrix: tf.Tensor) -> tf.Tensor:
    """Return a float32 matrix with its singular values set to about one.

    By three rounds of the Newton-Schulz iteration, with the coefficients of Jordan et al. 2024,
    https://kellerjordan.github.io/posts/muon/.
    """
    tall = matrix.shape[0] > matrix.shape[1]
    x = tf.transpose(matrix) if tall else matrix
    x /= tf.norm(x) + 1e-7
    for _ in range(3):
        square = tf.matmul(x, x, transpose_b=True)
        x = 3.4445 * x + tf.matmul(-4.7750 * square + 2.0315 * square @ square, x)
    return tf.transpose(x) if tall else x


class Muon(keras.optimizers.AdamW):
    """AdamW, but orthogonal steps for the kernels of the convolutions.

    The steps are as long as Liu et al. 2025, arXiv 2502.16982, make them, so that the learning
    rate and the weight decay are AdamW's. Keras's own Muon leaves these kernels to AdamW.
    """

    def build(self, variables: list[keras.Variable]) -> None:
        super().build(variables)
        self.momenta = {
            kernel.value.ref(): self.add_variable_from_reference(kernel, "muon_momentum")
            for kernel in variables
            if len(kernel.shape) == 4
        }

    def update_step(
        self, gradient: tf.Tensor, variable: keras.Variable, learning_rate: tf.Tensor
    ) -> None:
        momentum = self.momenta.get(variable.ref())
        if momentum is None:
            super().update_step(gradient, variable, learning_rate)
            return
        self.assign(momentum, 0.9 * momentum + gradient)
        # A row for each input of the kernel, a column for each of its filters.
        step = orthogonal(tf.reshape(gradient + 0.9 * momentum, (-1, variable.shape[-1])))
        length = 0.2 * max(step.shape) ** 0.5
        self.assign_sub(variable, learning_rate * length * tf.reshape(step, variable.shape))
