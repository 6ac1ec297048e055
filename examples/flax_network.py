"""
Train a network with Flax NNX
=============================

``rmsprop`` is an ordinary Optax transformation, so ``nnx.Optimizer`` takes it as it
takes ``optax.adam``. Convolutions on handwritten digits, 8 x 8 pixels.
"""

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import sklearn.datasets
from flax import nnx

from jax_rmsprop import rmsprop

EPOCHS, BATCH = 10, 50
x, y = sklearn.datasets.load_digits(return_X_y=True)
random = np.random.default_rng(0)
order = random.permutation(len(x))
x, y = jnp.asarray(x[order] / 16, "float32"), jnp.asarray(y[order], "int32")

# %%
# The model, and what trains it. ``wrt=nnx.Param`` leaves out everything else.


class Network(nnx.Module):
    """Two convolutions and a linear layer."""

    def __init__(self, rngs):
        self.first = nnx.Conv(1, 8, (3, 3), rngs=rngs)
        self.second = nnx.Conv(8, 16, (3, 3), strides=2, rngs=rngs)
        self.last = nnx.Linear(4 * 4 * 16, 10, rngs=rngs)

    def __call__(self, x):
        """Logits of images in rows of 64 pixels."""
        x = nnx.relu(self.first(x.reshape(-1, 8, 8, 1)))
        return self.last(nnx.relu(self.second(x)).reshape(len(x), -1))


model = Network(nnx.Rngs(0))
optimizer = nnx.Optimizer(model, rmsprop(1e-3, gamma=0.99), wrt=nnx.Param)

# %%
# A compiled step. The model and the optimizer's state are updated in place.


@nnx.jit
def step(model, optimizer, x, y):
    """Train on a batch; the loss."""

    def loss(model):
        return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()

    value, gradient = nnx.value_and_grad(loss)(model)
    optimizer.update(model, gradient)
    return value


losses = []
for _ in range(EPOCHS):
    for rows in random.permutation(1500).reshape(-1, BATCH):
        losses.append(step(model, optimizer, x[rows], y[rows]).item())
right = (model(x[1500:]).argmax(-1) == y[1500:]).mean()
print(f"after {EPOCHS} epochs: loss {np.mean(losses[-30:]):.4f}, {right:.1%} right")

# %%
# The optimizer's state is a tree of arrays in ``nnx.state(optimizer)``, which Orbax and
# ``flax.serialization`` save like the parameters: :doc:`/how-to/checkpoints`.
#
# Next: :doc:`sweep this model </how-to/your_model>` over gamma, rate and seeds. The
# same page has Linen with a ``TrainState``.

figure, axes = plt.subplots(figsize=(6, 4))
axes.plot(losses)
axes.set(
    yscale="log", xlabel="step", ylabel="loss of the batch", title="digits, Flax NNX"
)
plt.show()
