r"""
What goes wrong elsewhere, and what is done here
================================================

Four pictures of what the usual way of writing RMSProp does, beside ``rmsprop``: the
variance as a difference of moments, an average in two bytes, one huge gradient, and an
eps inside or outside of the root.
"""

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from common import COLOURS

from jax_rmsprop import rmsprop, scale_by_rmsprop
from jax_rmsprop.quantization import bfloat16, dequantize_state, quantize_state

# %%
# The variance, kept by itself
# ----------------------------
#
# Centered RMSProp divides by the root of :math:`\overline{g^2} - \overline{g}^2`. Where
# the gradient hardly changes, both terms are nearly equal and their float32 difference
# is rounding: now and then a negative number, whose root is NaN. Here the variance is
# an average of its own,
#
# .. math::
#     d &= g - \mu \\
#     \mu &\leftarrow \mu + (1-\gamma)\, d \\
#     \nu &\leftarrow \nu + (1-\gamma) (\gamma\, d^2 - \nu)
#
# which is the same number, and a sum of squares. Constant gradients, gamma 0.9, eps
# 1e-8: at which step does the update become NaN?


def updates_of(optimizer, gradients):
    """The update of each step, compiled as a training is."""

    def step(state, g):
        u, state = optimizer.update(g, state)
        return state, u

    init = optimizer.init(gradients[0])
    return np.asarray(jax.jit(lambda: jax.lax.scan(step, init, gradients)[1])())


constant = jnp.broadcast_to(jnp.linspace(0.5, 2, 1001, dtype="float32"), (300, 1001))
difference = updates_of(optax.rmsprop(1.0, 0.9, eps=1e-8, centered=True), constant)
variance = updates_of(rmsprop(1.0, 0.9, eps=1e-8, centered=True), constant)
for name, u in (("difference of moments", difference), ("variance", variance)):
    bad = np.isnan(u)
    first = f", the first at step {bad.any(1).argmax() + 1}" if bad.any() else ""
    print(f"{name}: {bad.any(0).sum()} of {u.shape[1]} gradients become NaN{first}")

figure, axes = plt.subplots(figsize=(6, 4))
steps = np.arange(1, 301)
shown = np.isnan(difference).any(0).argmax()  # one of those that become NaN
for u, colour, label in (
    (difference, COLOURS[1], "difference of moments (optax.rmsprop)"),
    (variance, COLOURS[0], "variance (rmsprop)"),
):
    # From the first NaN on the parameter is NaN, whatever the steps after it.
    before = np.cumsum(np.isnan(u[:, shown])) == 0
    axes.plot(steps[before], -u[before, shown], color=colour, label=label)
    if not before.all():
        last = steps[before][-1], -u[before, shown][-1]
        axes.plot(*last, "x", color="black", markersize=9)
        text = f"NaN at step {last[0] + 1}"
        axes.annotate(text, last, (8, 0), textcoords="offset points", va="center")
axes.set(
    yscale="symlog",
    xlabel="step",
    ylabel="step taken, in learning rates",
    title=f"centered, constant gradient {constant[0, shown]:.4g}",
)
axes.legend(loc="lower right")
plt.show()

# %%
# A gradient that never changes has no variance, and the steps of the centered form grow
# until eps bounds them: choose an eps that fits (:doc:`eps_and_the_loss`).
#
# An average that moves
# ---------------------
#
# With gamma 0.999 a step moves the average by a thousandth. Rounded to bfloat16, whose
# numbers are a hundredth apart, it does not move at all. Rounded at random, up or down
# by chances that make the mean right, it moves as it should. The average begins at 100,
# from the first gradients of a training, and the gradients are of size 1 from then on.

STEPS, START = 5000, 100.0
noise = jax.random.normal(jax.random.key(0), (STEPS,))


def merely_rounded(dtype):
    """The average after each step, kept in a dtype."""

    def step(nu, g):
        nu = (0.999 * nu.astype("float32") + 0.001 * g**2).astype(dtype)
        return nu, nu

    return jax.lax.scan(step, jnp.asarray(START, dtype), noise)[1]


def rounded_at_random():
    """The same with `quantize_state`."""
    codecs = {"nu": bfloat16()}
    inner = scale_by_rmsprop(0.999, initial_scale=START)
    optimizer = quantize_state(inner, codecs)

    def step(state, g):
        _, state = optimizer.update(g, state)
        return state, dequantize_state(state, codecs).nu

    return jax.lax.scan(step, optimizer.init(jnp.float32(0)), noise)[1]


curves = {
    "four bytes": merely_rounded("float32"),
    "two bytes, to the nearest": merely_rounded("bfloat16"),
    "two bytes, at random (quantize_state)": rounded_at_random(),
}
figure, axes = plt.subplots(figsize=(6, 4))
for (name, nu), colour in zip(curves.items(), COLOURS, strict=False):
    share = float(nu[-1] / curves["four bytes"][-1])
    print(f"{name}: {nu[-1]:.3g} after {STEPS} steps, {share:.2g} of what it should be")
    axes.plot(nu, color=colour, label=name)
axes.set(
    yscale="log",
    xlabel="step",
    ylabel="nu, which should go to 1",
    title="gamma 0.999, an average in two bytes",
)
axes.legend()
plt.show()

# %%
# One huge gradient
# -----------------
#
# A square overflows float32 from 2e19 on. An average that is infinite never comes back:
# the coordinate is dead, or NaN. Here a gradient beyond 2^62 counts as 2^62, in the
# numerator and in the square alike: its step is as long as any, then the coordinate
# rests until the average has forgotten, and moves again.

gradients = jnp.ones(1200).at[50].set(1e30)
huge = {
    "optax.rmsprop": (updates_of(optax.rmsprop(1.0, 0.9), gradients), "--"),
    "rmsprop": (updates_of(rmsprop(1.0, 0.9), gradients), "-"),
}
figure, axes = plt.subplots(figsize=(6, 4))
for i, (name, (u, style)) in enumerate(huge.items()):
    print(f"{name}: the steps at 50 and 1199 are {-u[50]:.3g} and {-u[-1]:.3g}")
    axes.plot(-u, style, color=COLOURS[1 - i], label=name)
axes.set(
    xlabel="step",
    ylabel="step taken, in learning rates",
    title="a gradient of 1 and, at step 50, of 1e30",
)
axes.legend()
plt.show()

# %%
# eps, inside and outside
# -----------------------
#
# Where the gradient is steady, nu is its square and a step is
# :math:`g/\sqrt{g^2+\epsilon}` or :math:`g/(|g|+\epsilon)`. Both leave 1 for small
# gradients, the first where :math:`|g| < \sqrt\epsilon`, the second where
# :math:`|g| < \epsilon`: an eps of 1e-3 inside acts like one of 0.03 outside.

sizes = jnp.logspace(-6, 0, 121)
steady = jnp.broadcast_to(sizes, (200, 121))
figure, axes = plt.subplots(figsize=(6, 4))
for eps, inside, colour, style in (
    (1e-3, True, COLOURS[0], "-"),
    (1e-3, False, COLOURS[1], "-"),
    (0.0316, False, COLOURS[2], "--"),
):
    u = -updates_of(rmsprop(1.0, 0.9, eps, eps_in_sqrt=inside), steady)[-1]
    where = "inside" if inside else "outside"
    half = float(sizes[np.abs(u - 0.5).argmin()])
    print(f"eps {eps:g} {where}: a step of one half at a gradient of {half:.2g}")
    axes.plot(sizes, u, style, color=colour, label=f"eps {eps:g} {where} of the root")
axes.set(
    xscale="log",
    xlabel="size of the gradient",
    ylabel="step taken, in learning rates",
    title="eps decides the steps of small gradients",
)
axes.legend()
plt.show()
