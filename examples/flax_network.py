"""
A network with Flax NNX
=======================

``rmsprop`` is an ordinary Optax transformation, so ``nnx.Optimizer`` takes it as it
takes ``optax.adam``. Convolutions on handwritten digits, 8 x 8 pixels.
"""

import jax
import matplotlib.pyplot as plt
import numpy as np
import optax
from common import batches, digits
from flax import nnx

from jax_rmsprop import rmsprop

EPOCHS, BATCH = 10, 50

# %%
# The model is a class, and so is what trains it.


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
# A step is compiled as any other; the model and the optimizer's state change in place.


@nnx.jit
def step(model, optimizer, batch):
    """Train on a batch; the loss."""

    def loss(model):
        return optax.softmax_cross_entropy_with_integer_labels(
            model(batch.x), batch.y
        ).mean()

    value, gradient = nnx.value_and_grad(loss)(model)
    optimizer.update(model, gradient)
    return value


train, test = digits()
losses = []
for epoch in range(EPOCHS):
    shuffled = batches(jax.random.key(epoch), train, BATCH)
    for i in range(len(shuffled.x)):
        batch = jax.tree.map(lambda x: x[i], shuffled)  # noqa: B023
        losses.append(step(model, optimizer, batch).item())
right = (model(test.x).argmax(-1) == test.y).mean()
print(f"after {EPOCHS} epochs: loss {np.mean(losses[-30:]):.4f}, {right:.1%} right")

# %%
# The state is arrays and nothing else: ``nnx.state(optimizer)`` has the average, which
# Orbax or ``flax.serialization`` keep as they keep parameters.

figure, axes = plt.subplots(figsize=(6, 4))
axes.plot(losses)
axes.set(
    yscale="log", xlabel="step", ylabel="loss of the batch", title="digits, Flax NNX"
)
plt.show()
