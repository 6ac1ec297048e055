r"""
Does it converge? A threshold in gamma
======================================

RMSProp with a gamma that is too small moves away from the minimum of a convex function,
however small its learning rate becomes (`Reddi, Kale and Kumar, 2018
<https://openreview.net/forum?id=ryQu7f-RZ>`__). With a gamma that is large enough it
converges (`Shi, Li, Hong and Sun, 2021
<https://openreview.net/forum?id=3UDSdyIcBDA>`__). Here one sweep finds the threshold,
five lines of NumPy predict it, and both say how to choose gamma.
"""

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from jax_rmsprop import log_one_minus, rmsprop, sweep

# %%
# The function
# ------------
#
# A sum of n parts, of which a training sees one at each step, in turn:
#
# .. math::
#     f_0(x) = n\,h(x), \qquad f_1 = \dots = f_{n-1} = -h(x), \qquad
#     h(x) = \begin{cases} x & x \ge -1 \\ (x+2)^2/2 - 3/2 & x < -1 \end{cases}
#
# The sum is h itself: it falls to the left, down to its minimum at -2. But only one
# step in n says so, with a gradient of n; all others have a gradient of -1 and pull to
# the right. Gradient descent adds them up and goes left. RMSProp divides each by a root
# that still remembers the one large gradient, or has forgotten it.


def gradient(x, step, n):
    """The gradient of the part that this step sees."""
    slope = jnp.where(x < -1, x + 2, 1.0)
    return jnp.where(step % n == 0, n, -1) * slope


# %%
# Four gammas
# -----------
#
# For n = 5, from x = 1, with a learning rate of 0.1 that falls as the root of the step.
# That is as careful as theory asks for.

STEPS, RECORD = 200_000, 1000


def train(gamma, n, start):
    """Where x is after every 1,000 steps."""
    optimizer = rmsprop(lambda step: 0.1 / jnp.sqrt(step + 1.0), gamma, eps=1e-8)

    def one(carry, step):
        x, state = carry
        updates, state = optimizer.update(gradient(x, step, n), state)
        return (x + updates, state), None

    def many(carry, begin):
        carry, _ = jax.lax.scan(one, carry, begin + jnp.arange(RECORD))
        return carry, carry[0]

    begins = jnp.arange(0, STEPS, RECORD)
    return {"x": jax.lax.scan(many, (start, optimizer.init(start)), begins)[1]}


few = sweep(
    train, {"gamma": [0.75, 0.8, 0.9, 0.99], "n": [5], "start": [1.0]}, progress=False
)
figure, axes = plt.subplots(figsize=(6, 4))
for gamma in few.gamma.values:
    x = few.x.sel(gamma=gamma, n=5, start=1)
    axes.plot(np.arange(1, len(x) + 1), x, label=f"gamma {gamma:g}")
    print(f"gamma {gamma:g}: x goes from 1 to {x[-1].item():.1f}")
axes.axhline(-2, color="0.5", linewidth=1)
axes.annotate("minimum", (200, -2), (0, 4), textcoords="offset points", ha="right")
axes.set(xlabel="steps, thousands", ylabel="x", title="n = 5, learning rate 0.1/√step")
axes.legend()
plt.show()

# %%
# 0.9 and 0.99 reach the minimum. 0.75 and 0.8 move away from it, and patience does not
# help: the learning rates have an infinite sum, so x goes on for ever.
#
# Where is the threshold?
# -----------------------
#
# Two hundred gammas and five values of n are a thousand trainings of 200,000 steps, and
# one program. A training diverges if it still moves to the right in its second half.

curves = sweep(
    train,
    {
        "gamma": log_one_minus(0.3, 0.9995, 200),
        "n": [3, 5, 10, 20, 40],
        "start": [10.0],
    },
    progress=False,
)
half, end = (curves.x[..., 0, i] for i in (STEPS // RECORD // 2, -1))
diverges = (end > half) & (end > -1)
print(f"{curves.finished.size} trainings in {curves.run_seconds:.1f} s")

# %%
# The threshold can be computed. Where x > -1 the gradients repeat, so the average
# repeats as well, and the n steps of a round add up to a drift:
#
# .. math::
#     \frac{n}{\sqrt{\nu_0}} - \sum_{j=1}^{n-1} \frac{1}{\sqrt{\nu_j}}, \qquad
#     \nu_j = \frac{1-\gamma}{1-\gamma^n} \sum_{k=0}^{n-1} \gamma^{(j-k) \bmod n} g_k^2
#
# It converges where the drift is positive.


def drift(gamma, n):
    """How far a round moves x to the left, in learning rates."""
    gradients = np.array([n] + [-1] * (n - 1), float)
    ago = np.subtract.outer(np.arange(n), np.arange(n)) % n
    nu = (1 - gamma) / (1 - gamma**n) * gamma**ago @ gradients**2
    return (gradients / np.sqrt(nu)).sum()


def threshold(n):
    """The gamma at which the drift is 0, by bisection in 1 - gamma."""
    low, high = 1e-5, 0.9  # it converges with the first, and not with the second
    while high / low > 1 + 1e-9:
        middle = np.sqrt(low * high)
        low, high = (middle, high) if drift(1 - middle, n) > 0 else (low, middle)
    return 1 - low


print("  n   diverges up to   converges from   computed   1/(1-gamma)   n²/4")
for n in curves.n.values:
    bad = diverges.sel(n=n).values
    up_to, above = curves.gamma.values[bad].max(), curves.gamma.values[~bad].min()
    exact = threshold(n)
    print(
        f"{n:3}   {up_to:14.5f}   {above:14.5f}   {exact:8.5f}   "
        f"{1 / (1 - exact):11.1f}   {n**2 / 4:4.0f}"
    )

# %%
# The sweep and the formula agree to the spacing of the gammas. The last two columns are
# the lesson: the window 1/(1-gamma) has to be a quarter of n² steps long, not n.

figure, axes = plt.subplots(figsize=(6, 4))
ns = np.arange(3, 51)
short = 1 - curves.gamma.values
for n in curves.n.values:
    bad = diverges.sel(n=n).values
    axes.plot(np.full(bad.sum(), n), 1 / short[bad], ".", color="C1", markersize=4)
    axes.plot(np.full((~bad).sum(), n), 1 / short[~bad], ".", color="C0", markersize=4)
axes.plot([], [], ".", color="C0", label="converges")
axes.plot([], [], ".", color="C1", label="diverges")
exact = [1 / (1 - threshold(n)) for n in ns]
axes.plot(ns, exact, color="black", linewidth=1.5, label="computed threshold")
ticks = [2, 10, 100, 1000]
axes.set(
    xscale="log",
    yscale="log",
    xlabel="one step in n says where to go",
    ylabel="1/(1-gamma), in steps (gamma)",
    title="Does RMSProp converge?",
)
axes.set_xticks([3, 5, 10, 20, 40], ["3", "5", "10", "20", "40"])
axes.set_xticks([], minor=True)
axes.set_yticks(ticks, [f"{x}\n({1 - 1 / x:g})" for x in ticks])
figure.legend(loc="outside lower center", ncols=3)
plt.show()

# %%
# What it says about choosing gamma
# ---------------------------------
#
# - The default of 0.9 looks back over 10 steps. It is safe while what matters is said
#   at least every sixth step (6² / 4 = 9).
# - Rare and large against frequent and small is no invention: a class that is one in
#   forty, a reward at the end of an episode, an embedding that few batches touch. One
#   in forty wants a gamma of 0.9974.
# - A smaller learning rate does not help, and neither does patience. A larger gamma
#   does, and so does a larger batch, which makes n smaller.
#
# Next: :doc:`a sweep of gamma on a real network <gamma_sweep>`, where the same question
# is asked of a training that you cannot compute by hand.
