"""
Train a network with Equinox
============================

The network of the Flax tutorial as an Equinox module, which is a tree of arrays and
functions. ``equinox.filter`` selects the arrays for ``rmsprop``.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import sklearn.datasets

from jax_rmsprop import rmsprop

EPOCHS, BATCH = 10, 50
x, y = sklearn.datasets.load_digits(return_X_y=True)
random = np.random.default_rng(0)
order = random.permutation(len(x))
x, y = jnp.asarray(x[order] / 16, "float32"), jnp.asarray(y[order], "int32")

# %%
# The model takes one image; ``jax.vmap`` applies it to a batch.


class Network(eqx.Module):
    """Two convolutions and a linear layer."""

    first: eqx.nn.Conv2d
    second: eqx.nn.Conv2d
    last: eqx.nn.Linear

    def __init__(self, key):
        first, second, last = jax.random.split(key, 3)
        self.first = eqx.nn.Conv2d(1, 8, 3, padding=1, key=first)
        self.second = eqx.nn.Conv2d(8, 16, 3, stride=2, padding=1, key=second)
        self.last = eqx.nn.Linear(16 * 4 * 4, 10, key=last)

    def __call__(self, x):
        """Logits of an image of 64 pixels."""
        x = jax.nn.relu(self.first(x.reshape(1, 8, 8)))
        return self.last(jax.nn.relu(self.second(x)).ravel())


model = Network(jax.random.key(0))
optimizer = rmsprop(1e-3, gamma=0.99)
state = optimizer.init(eqx.filter(model, eqx.is_inexact_array))

# %%
# A step returns the new model and the new state.


@eqx.filter_jit
def step(model, state, x, y):
    """Train on a batch; the new model and state, and the loss."""

    @eqx.filter_value_and_grad
    def loss(model):
        return optax.softmax_cross_entropy_with_integer_labels(
            jax.vmap(model)(x), y
        ).mean()

    value, gradient = loss(model)
    updates, state = optimizer.update(
        gradient, state, eqx.filter(model, eqx.is_inexact_array)
    )
    return eqx.apply_updates(model, updates), state, value


losses = []
for _ in range(EPOCHS):
    for rows in random.permutation(1500).reshape(-1, BATCH):
        model, state, loss = step(model, state, x[rows], y[rows])
        losses.append(loss.item())
right = (jax.vmap(model)(x[1500:]).argmax(-1) == y[1500:]).mean()
print(f"after {EPOCHS} epochs: loss {np.mean(losses[-30:]):.4f}, {right:.1%} right")

# %%
# ``equinox.tree_serialise_leaves`` saves the model and the state in a file.
#
# Next: :doc:`sweep this model </how-to/your_model>` over gamma, rate and seeds.

figure, axes = plt.subplots(figsize=(6, 4))
axes.plot(losses)
axes.set(
    yscale="log", xlabel="step", ylabel="loss of the batch", title="digits, Equinox"
)
plt.show()
