"""The textbook's linear regression on airfoil noise, from scratch and concise.

Batches of 10, 2 epochs, learning rate 0.01, gamma 0.9; each training is one compiled
program. The textbook reports losses of 0.243452 and 0.243676.
"""

import time

import jax
import matplotlib.pyplot as plt
import numpy as np
import optax
from common import airfoil, arguments, batches, linear, save, squared_loss, train_step

from jax_rmsprop import rmsprop, scale_by_rmsprop

EPOCHS, BATCH, RECORD = 2, 10, 10  # the loss is recorded every 10 batches


def from_scratch(learning_rate=0.01, gamma=0.9):
    """The scaled gradient, times the learning rate, downhill."""
    return optax.chain(scale_by_rmsprop(gamma, eps=1e-6), optax.scale(-learning_rate))


def concise(learning_rate=0.01, gamma=0.9):
    """The same, ready made."""
    return rmsprop(learning_rate, gamma)


def train(seed, data, optimizer, epochs=EPOCHS):
    """The loss over all data at the start and after every `RECORD` batches."""
    start, *keys = jax.random.split(jax.random.key(seed), 1 + epochs)
    params = linear(start, data.x.shape[1])
    step = train_step(squared_loss, optimizer)

    def record(carry, few):
        carry, _ = jax.lax.scan(step, carry, few)
        return carry, squared_loss(carry[0], data)

    def epoch(carry, key):
        groups = jax.tree.map(
            lambda x: x.reshape(-1, RECORD, *x.shape[1:]), batches(key, data, BATCH)
        )
        return jax.lax.scan(record, carry, groups)

    carry = params, optimizer.init(params)
    _, losses = jax.lax.scan(epoch, carry, jax.numpy.stack(keys))
    first = squared_loss(params, data)
    return jax.numpy.concatenate([first[None], losses.ravel()])


def main():
    """Train both ways, print the losses and times, draw the curves."""
    parser = arguments(__doc__, "airfoil.png")
    parser.add_argument("--seeds", type=int, default=20, help="trainings to average")
    options = parser.parse_args()
    data = airfoil()

    figure, axes = plt.subplots(figsize=(6, 4))
    for name, make, style in (
        ("from scratch", from_scratch, "-"),
        ("concise", concise, "--"),
    ):
        optimizer = make()
        compiled = jax.jit(train, static_argnums=2).lower(0, data, optimizer).compile()
        began = time.perf_counter()
        losses = np.asarray(compiled(0, data))
        seconds = (time.perf_counter() - began) / EPOCHS
        print(f"{name}: loss: {losses[-1]:.6f}, {seconds:.6f} sec per epoch")
        axes.plot(np.linspace(0, EPOCHS, len(losses)), losses, style, label=name)

    many = jax.jit(jax.vmap(lambda seed: train(seed, data, concise())))
    last = np.asarray(many(np.arange(options.seeds)))[:, -1]
    print(
        f"over {options.seeds} seeds: mean {last.mean():.6f}, from {last.min():.6f} "
        f"to {last.max():.6f}; the textbook: 0.243452 and 0.243676"
    )
    axes.axhline(0.2435, color="0.5", linewidth=1)
    axes.annotate(
        "textbook, 0.2435",
        (EPOCHS, 0.2435),
        (0, 4),
        ha="right",
        textcoords="offset points",
        fontsize=9,
        color="0.3",
    )
    axes.set(
        xlabel="epoch",
        ylabel="loss (half the mean squared error)",
        title="Linear regression on airfoil noise",
        ylim=(0.2, None),
    )
    axes.legend()
    save(figure, options.output)


if __name__ == "__main__":
    main()
