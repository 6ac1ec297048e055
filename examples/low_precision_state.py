"""
8-bit and bfloat16 optimizer state
==================================

The average of squared gradients takes as much memory as the parameters. Here the same
network is trained with that average in float32, in bfloat16 and in 8 bits, and once the
wrong way: rounded to the nearest.
"""

# %%
# ``quantize_state`` wraps any optimizer and says for each field of its state how it is
# stored. A codec can also be written by hand; the last one below merely casts, which is
# what storing a state in bfloat16 usually means.

import functools

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import sklearn.datasets

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
CAST = Codec(
    lambda x, dither, base: x.astype(jnp.bfloat16),
    lambda codes, base: codes.astype(jnp.float32),
)
KEPT = {
    "float32": ({}, "-"),
    "bfloat16()": ({"nu": bfloat16()}, "--"),
    "uint8()": ({"nu": uint8()}, "-."),
    "cast to bfloat16": ({"nu": CAST}, ":"),
}

# %%
# A network on handwritten digits, with a slow average (gamma 0.999), for 200 epochs and
# four seeds. The seed is passed on to the rounding, which is random.

x, y = sklearn.datasets.load_digits(return_X_y=True)
order = np.random.default_rng(0).permutation(len(x))[:1500]
x, y = jnp.asarray(x[order] / 16, "float32"), jnp.asarray(y[order], "int32")


def network(key):
    """The parameters: 64 inputs, 128 hidden units, 10 outputs."""
    first, second = jax.random.split(key)
    w1 = jax.random.normal(first, (64, 128)) * (2 / 64) ** 0.5
    w2 = jax.random.normal(second, (128, 10)) * (1 / 128) ** 0.5
    return {"w1": w1, "b1": jnp.zeros(128), "w2": w2, "b2": jnp.zeros(10)}


def loss(p, rows):
    """The mean loss, in nats per example."""
    logits = jax.nn.relu(x[rows] @ p["w1"] + p["b1"]) @ p["w2"] + p["b2"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, y[rows]).mean()


def train(codecs, seed):
    """Each epoch's mean loss, and the mean of nu over the first layer's weights."""
    key = jax.random.key(seed)
    optimizer = quantize_state(rmsprop(1e-3, GAMMA), codecs, seed=seed)

    def step(carry, rows):
        p, state = carry
        value, gradient = jax.value_and_grad(loss)(p, rows)
        updates, state = optimizer.update(gradient, state, p)
        return (optax.apply_updates(p, updates), state), value

    def epoch(carry, number):
        rows = jax.random.permutation(jax.random.fold_in(key, number), 1500)
        carry, losses = jax.lax.scan(step, carry, rows.reshape(15, 100))
        nu = dequantize_state(carry[1], codecs).nu["w1"]
        return carry, (losses.mean(), nu.mean())

    p = network(key)
    return jax.lax.scan(epoch, (p, optimizer.init(p)), jnp.arange(EPOCHS))[1]


losses, averages = {}, {}
for name, (codecs, _) in KEPT.items():
    many = jax.jit(jax.vmap(functools.partial(train, codecs)))(jnp.arange(SEEDS))
    losses[name], averages[name] = (np.asarray(found) for found in many)

# %%
# Bytes and losses
# ----------------

params = jax.eval_shape(lambda: network(jax.random.key(0)))
print("                  bytes of nu   final loss (nats), over the seeds")
for name, (codecs, _) in KEPT.items():
    size = memory_report(quantize_state(rmsprop(1e-3), codecs), params).total["nu"]
    final = losses[name][:, -1]
    print(f"{name:16}  {size:11,}   {final.mean():.5f} +- {final.std():.5f}")
print(f"{'parameters':16}  {sum(p.size * 4 for p in jax.tree.leaves(params)):11,}")

# %%
# bfloat16 halves the bytes, 8 bits quarter them, and both train as float32 does, within
# what another seed changes. The cast has the bytes of bfloat16 and another loss.

figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
epochs = np.arange(1, EPOCHS + 1)
for name, (_, style) in KEPT.items():
    left.plot(epochs, losses[name].mean(0), style, linewidth=2, label=name)
    ratio = averages[name].mean(0) / averages["float32"].mean(0)
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
    ylabel="mean of nu, relative to float32",
    ylim=(0, None),
    title="What is stored of the average",
)
plt.show()

# %%
# The right picture shows why. With gamma 0.999 a step moves the average by a thousandth
# of its distance, less than half the gap to the next bfloat16 number, so the cast moves
# it nowhere. Rounding up or down at random keeps the mean right, and the average moves:
# :doc:`/explanation/rounding`.
#
# Which codec for which field, and how fast it is on a GPU: :doc:`/how-to/fewer_bits`.
