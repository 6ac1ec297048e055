r"""
Common numerical failures of RMSProp
====================================

Four ways in which a usual implementation of RMSProp fails, beside ``rmsprop``: the
variance as a difference of moments, an average in bfloat16, one huge gradient, and an
eps that moves out of the root.
"""

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

from jax_rmsprop import rmsprop, scale_by_rmsprop
from jax_rmsprop.quantization import bfloat16, dequantize_state, quantize_state

# %%
# A variance that becomes negative
# --------------------------------
#
# Centered RMSProp divides by the root of :math:`\overline{g^2} - \overline{g}^2`. If
# the gradient hardly changes, both terms are nearly equal, and their difference in
# float32 is rounding: now and then a negative number, whose root is NaN. ``rmsprop``
# updates the variance itself,
#
# .. math::
#     d &= g - \mu \\
#     \mu &\leftarrow \mu + (1-\gamma)\, d \\
#     \nu &\leftarrow \nu + (1-\gamma) (\gamma\, d^2 - \nu)
#
# which is the same quantity as an average of squares. With constant gradients, gamma
# 0.9 and eps 1e-8, at which step does the update become NaN?


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
    (difference, "C1", "difference of moments (optax.rmsprop)"),
    (variance, "C0", "variance (rmsprop)"),
):
    # From the first NaN on the parameter is NaN, whatever the steps after it.
    before = np.cumsum(np.isnan(u[:, shown])) == 0
    axes.plot(steps[before], -u[before, shown], color=colour, label=label)
    if not before.all():
        last = steps[before][-1], -u[before, shown][-1]
        axes.plot(*last, "x", color="black", markersize=9)
        text = f"NaN at step {last[0] + 1}"
        place = {"textcoords": "offset points", "va": "center", "ha": "right"}
        axes.annotate(text, last, (-8, 0), **place)  # left of the other curve
axes.set(
    yscale="symlog",
    xlabel="step",
    ylabel="step taken, in learning rates",
    title=f"centered, constant gradient {constant[0, shown]:.4g}",
)
axes.legend(loc="lower right")
plt.show()

# %%
# One gradient in six fails with ``optax.rmsprop``, none with ``rmsprop``. A gradient
# that never changes has no variance, so the steps of the centered form grow until eps
# bounds them: choose an eps that fits (:doc:`eps_and_the_loss`).
#
# An average that stalls
# ----------------------
#
# With gamma 0.999 a step moves the average by a thousandth of its distance.
# Neighbouring bfloat16 numbers differ by up to 0.8%, so rounded to the nearest it does
# not move at all. Rounded up or down at random, with the right probabilities, it does.
# Here the average starts at 100, as after large first gradients, and the gradients are
# of size 1 from then on.

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
    "float32": merely_rounded("float32"),
    "bfloat16, to the nearest": merely_rounded("bfloat16"),
    "bfloat16, stochastic (quantize_state)": rounded_at_random(),
}
figure, axes = plt.subplots(figsize=(6, 4))
for (name, nu), colour in zip(curves.items(), ["C0", "C1", "C2"], strict=True):
    share = float(nu[-1] / curves["float32"][-1])
    print(f"{name}: {nu[-1]:.3g} after {STEPS} steps, {share:.2g} of what it should be")
    axes.plot(nu, color=colour, label=name)
axes.set(
    yscale="log",
    xlabel="step",
    ylabel="nu, which should go to 1",
    title="gamma 0.999, an average in bfloat16",
)
axes.legend()
plt.show()

# %%
# One huge gradient
# -----------------
#
# The square of a gradient above 2e19 overflows float32. An infinite average never comes
# back: the coordinate is dead, or NaN. ``rmsprop`` counts a gradient beyond 2^62 as
# 2^62, in the numerator and in the square alike: the coordinate takes one step of
# maximal length, then barely moves until the average has decayed.

gradients = jnp.ones(1200).at[50].set(1e30)
huge = {
    "optax.rmsprop": (updates_of(optax.rmsprop(1.0, 0.9), gradients), "--"),
    "rmsprop": (updates_of(rmsprop(1.0, 0.9), gradients), "-"),
}
figure, axes = plt.subplots(figsize=(6, 4))
for i, (name, (u, style)) in enumerate(huge.items()):
    print(f"{name}: the steps at 50 and 1199 are {-u[50]:.3g} and {-u[-1]:.3g}")
    axes.plot(-u, style, color=f"C{1 - i}", label=name)
axes.set(
    xlabel="step",
    ylabel="step taken, in learning rates",
    title="a gradient of 1 and, at step 50, of 1e30",
)
axes.legend()
plt.show()

# %%
# eps inside and outside the root
# --------------------------------
#
# If the gradient is steady, nu is its square and a step is
# :math:`g/\sqrt{g^2+\epsilon}` or :math:`g/(|g|+\epsilon)`. Both drop below 1 for small
# gradients, the first where :math:`|g| < \sqrt\epsilon`, the second where
# :math:`|g| < \epsilon`: an eps of 1e-3 inside acts like one of 0.03 outside.

sizes = jnp.logspace(-6, 0, 121)
steady = jnp.broadcast_to(sizes, (200, 121))
figure, axes = plt.subplots(figsize=(6, 4))
for eps, inside, colour, style in (
    (1e-3, True, "C0", "-"),
    (1e-3, False, "C1", "-"),
    (0.0316, False, "C2", "--"),
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
