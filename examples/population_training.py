"""
A population on one stream of batches
=====================================

Eighteen trainings side by side on one stream of batches, which is read only once.

Where the data do not fit into a compiled loop, ``population`` makes one optimizer of
all: parameters, gradients and state have a leading axis of members, and each step of
all members is one compiled call. Half-way, the worst half takes over the parameters of
the best and continues with learning rates that are halved: numbers in the state, so
nothing is compiled again.
"""

import itertools

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from common import COLOURS, arguments, batches, cross_entropy, digits, network, save
from tqdm import tqdm

from jax_rmsprop import log_one_minus, population, rmsprop

GRID = {
    "gamma": log_one_minus(0.9, 0.999, 3),
    "learning_rate": [0.0003, 0.001, 0.003, 0.01, 0.03, 0.1],
}
MEMBERS = 18
EPOCHS, BATCH = 12, 30


def stream(data):
    """Batches one after another, as from a disk or a network."""
    for epoch in range(EPOCHS):
        shuffled = batches(jax.random.key(epoch), data, BATCH)
        for i in range(len(shuffled.x)):
            yield jax.tree.map(lambda x, i=i: x[i], shuffled)


def takeover(params, state, recent):
    """The worst half goes on from the best half, at half its learning rates."""
    order = np.argsort(np.where(np.isfinite(recent), recent, np.inf))
    best, worst = order[: MEMBERS // 2], order[MEMBERS // 2 :]

    def copy(x):
        return x.at[worst].set(x[best])

    rates = copy(state.hyperparams["learning_rate"]).at[worst].multiply(0.5)
    state = jax.tree.map(copy, state)
    return jax.tree.map(copy, params), optax.tree.set(state, learning_rate=rates), worst


def main():
    """Train the population, and draw what became of its members."""
    options = arguments(__doc__, "population_training.png").parse_args()
    train, test = digits()
    optimizer = population(rmsprop, GRID)
    params = jax.vmap(lambda _: network(jax.random.key(0), train.x.shape[1]))(
        jnp.arange(MEMBERS)
    )
    state = optimizer.init(params)

    @jax.jit
    def step(params, state, batch):
        losses, gradients = jax.vmap(
            jax.value_and_grad(cross_entropy), in_axes=(0, None)
        )(params, batch)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, losses

    steps = EPOCHS * (len(train.x) // BATCH)
    curves = []
    for i, batch in enumerate(tqdm(stream(train), total=steps, unit="step")):
        params, state, losses = step(params, state, batch)
        curves.append(losses)
        if i + 1 == steps // 2:
            recent = np.mean(curves[-50:], axis=0)
            params, state, replaced = takeover(params, state, recent)
    curves = np.stack(curves)  # [steps, members]
    test_losses = jax.vmap(cross_entropy, (0, None))(params, test)

    points = list(itertools.product(*GRID.values()))
    now = state.hyperparams
    print("\n     gamma, learning rate at first     half-way        now      test loss")
    for m, (gamma, rate) in enumerate(points):
        new = f"{now['gamma'][m]:.4f} {now['learning_rate'][m]:.5f}"
        print(
            f"{gamma:25.4f} {rate:.5f}  {recent[m]:13.4f}  "
            f"{new if m in replaced else 'the same':>14}  {test_losses[m]:10.4f}"
        )
    best = int(np.nanargmin(test_losses))
    print(
        f"best: member {best}, test loss {test_losses[best]:.4f}; "
        f"{step._cache_size()} program compiled for {steps} steps of {MEMBERS} members"
    )
    save(draw(curves, points, replaced, steps // 2), options.output)


def draw(curves, points, replaced, half):
    """The members' training losses; those that were replaced are dashed before it."""
    figure, axes = plt.subplots(1, 3, figsize=(12, 4.2), sharey=True)
    window = 25
    kernel = np.ones(window) / window
    rates = GRID["learning_rate"]
    for m, (gamma, rate) in enumerate(points):
        i, j = divmod(m, len(rates))
        smooth = np.convolve(curves[:, m], kernel, "valid")
        steps = np.arange(window, len(curves) + 1)
        before, colour = steps <= half, COLOURS[j]
        style = "--" if m in replaced else "-"
        axes[i].plot(steps[before], smooth[before], style, color=colour)
        # A mean over steps on both sides of the takeover says nothing.
        after = steps > half + window
        axes[i].plot(steps[after], smooth[after], color=colour, label=f"{rate:g}")
        axes[i].set(yscale="log", xlabel="step", title=f"gamma at first: {gamma:.4g}")
    for ax in axes:
        ax.axvline(half, color="black", linewidth=1, linestyle=":")
    axes[0].set_ylabel(f"training loss, mean of {window} steps")
    axes[2].legend(
        title="learning rate\nat first", loc="center left", bbox_to_anchor=(1, 0.5)
    )
    figure.suptitle("Half-way, the worst half (dashed) goes on from the best half")
    return figure


if __name__ == "__main__":
    main()
