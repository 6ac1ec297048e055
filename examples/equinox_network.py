"""
A network with Equinox
======================

The same network as with Flax, as an Equinox module: a tree of arrays and functions.
``rmsprop`` sees the arrays alone, which ``equinox.filter`` picks.
"""

import equinox as eqx
import jax
import matplotlib.pyplot as plt
import numpy as np
import optax
from common import batches, digits

from jax_rmsprop import rmsprop

EPOCHS, BATCH = 10, 50

# %%
# The model, for one image; ``jax.vmap`` makes it one for a batch.


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
def step(model, state, batch):
    """Train on a batch; the new model and state, and the loss."""

    @eqx.filter_value_and_grad
    def loss(model):
        return optax.softmax_cross_entropy_with_integer_labels(
            jax.vmap(model)(batch.x), batch.y
        ).mean()

    value, gradient = loss(model)
    updates, state = optimizer.update(
        gradient, state, eqx.filter(model, eqx.is_inexact_array)
    )
    return eqx.apply_updates(model, updates), state, value


train, test = digits()
losses = []
for epoch in range(EPOCHS):
    shuffled = batches(jax.random.key(epoch), train, BATCH)
    for i in range(len(shuffled.x)):
        batch = jax.tree.map(lambda x: x[i], shuffled)  # noqa: B023
        model, state, loss = step(model, state, batch)
        losses.append(loss.item())
right = (jax.vmap(model)(test.x).argmax(-1) == test.y).mean()
print(f"after {EPOCHS} epochs: loss {np.mean(losses[-30:]):.4f}, {right:.1%} right")

# %%
# ``equinox.tree_serialise_leaves`` keeps the model and the state in a file.

figure, axes = plt.subplots(figsize=(6, 4))
axes.plot(losses)
axes.set(
    yscale="log", xlabel="step", ylabel="loss of the batch", title="digits, Equinox"
)
plt.show()
