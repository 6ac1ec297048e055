"""
State in two bytes and in one
=============================

The same training with the average of squares kept in four bytes, in two, and in one.

Beside them what happens to an average that is merely rounded to bfloat16: with gamma
0.999 a step moves it by less than half the distance to the next number, and it stops.
"""

import functools

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from common import (
    arguments,
    batches,
    cross_entropy,
    digits,
    network,
    save,
    train_step,
)
from tqdm import tqdm

from jax_rmsprop import rmsprop
from jax_rmsprop.quantization import (
    Codec,
    bfloat16,
    dequantize_state,
    memory_report,
    quantize_state,
    uint8,
)

GAMMA, EPOCHS, SEEDS = 0.999, 200, 4
NAIVE = Codec(
    lambda x, dither, base: x.astype(jnp.bfloat16),
    lambda codes, base: codes.astype(jnp.float32),
)
KEPT = {
    "full, float32": ({}, "-"),
    "bfloat16()": ({"nu": bfloat16()}, "--"),
    "uint8()": ({"nu": uint8()}, "-."),
    "rounded to bfloat16": ({"nu": NAIVE}, ":"),
}


def train(codecs, seed):
    """Each epoch's mean loss, and the mean of nu over the first layer's weights."""
    data, _ = digits()
    key = jax.random.key(seed)
    params = network(key, 64, hidden=128)
    optimizer = quantize_state(rmsprop(1e-3, GAMMA), codecs, seed=seed)
    step = train_step(cross_entropy, optimizer)

    def epoch(carry, i):
        shuffled = batches(jax.random.fold_in(key, i), data, 100)
        carry, losses = jax.lax.scan(step, carry, shuffled)
        state = dequantize_state(carry[1], codecs)
        nu = optax.tree_utils.tree_get(state, "nu")["w1"]
        return carry, (losses.mean(), nu.mean())

    carry = params, optimizer.init(params)
    return jax.lax.scan(epoch, carry, jnp.arange(EPOCHS))[1]


def main():
    """Train with each, print bytes and losses, draw the curves."""
    options = arguments(__doc__, "low_precision_state.png").parse_args()
    params = jax.eval_shape(lambda: network(jax.random.key(0), 64, hidden=128))
    losses, averages = {}, {}
    for name, (codecs, _) in tqdm(KEPT.items(), unit="training"):
        many = jax.jit(jax.vmap(functools.partial(train, codecs)))(jnp.arange(SEEDS))
        losses[name], averages[name] = (np.asarray(x) for x in many)

    print("                      bytes of nu     final loss (nats), mean of 4 seeds")
    for name, (codecs, _) in KEPT.items():
        optimizer = quantize_state(rmsprop(1e-3), codecs)
        size = memory_report(optimizer, params).total["nu"]
        final = losses[name][:, -1]
        print(f"{name:<20}  {size:11,}     {final.mean():.5f} +- {final.std():.5f}")
    print(
        f"weights and biases    {sum(p.size * 4 for p in jax.tree.leaves(params)):11,}"
    )

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
    epochs = np.arange(1, EPOCHS + 1)
    for name, (_, style) in KEPT.items():
        left.plot(epochs, losses[name].mean(0), style, linewidth=2, label=name)
        ratio = averages[name].mean(0) / averages["full, float32"].mean(0)
        right.plot(epochs, ratio, style, linewidth=2, label=name)
    left.set(
        xlabel="epoch",
        ylabel="loss (nats per example)",
        yscale="log",
        title=f"A network on digits, gamma {GAMMA}",
    )
    left.legend()
    right.set(
        xlabel="epoch",
        ylabel="mean of nu, relative to full precision",
        ylim=(0, None),
        title="What is kept of the average",
    )
    save(figure, options.output)


if __name__ == "__main__":
    main()
