r"""
The textbook's chapter
======================

The chapter on RMSProp of *Dive into Deep Learning*
(https://d2l.ai/chapter_optimization/rmsprop.html), from end to end and in its order:
the algorithm, its path on a quadratic, an implementation from scratch, a concise one,
and the four exercises with their answers.
"""

# %%
# The algorithm
# -------------
#
# AdaGrad adds up all squares of a gradient, so its steps go on shrinking. RMSProp keeps
# a leaky average of them, with a decay :math:`\gamma`, and divides by its root:
#
# .. math::
#     \mathbf{s}_t &= \gamma \mathbf{s}_{t-1} + (1 - \gamma) \mathbf{g}_t^2 \\
#     \mathbf{x}_t &= \mathbf{x}_{t-1}
#       - \frac{\eta}{\sqrt{\mathbf{s}_t + \epsilon}} \odot \mathbf{g}_t
#
# Here :math:`\eta` is ``learning_rate`` and :math:`\mathbf{s}` is ``nu``, as Optax
# calls it. Written out for one array:

import functools
import os

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import pooch
import sklearn.datasets

from jax_rmsprop import rmsprop


def by_hand(x, nu, gradient, learning_rate=0.4, gamma=0.9, eps=1e-6):
    """A step of the equations above: the new x and the new average."""
    nu = gamma * nu + (1 - gamma) * gradient**2
    return x - learning_rate / jnp.sqrt(nu + eps) * gradient, nu


# %%
# and as an Optax transformation, whose update is added to x:

x, gradient = jnp.array([-5.0, -2.0]), jnp.array([-1.0, -8.0])
optimizer = rmsprop(learning_rate=0.4, gamma=0.9, eps=1e-6)
updates, state = optimizer.update(gradient, optimizer.init(x), x)
print("by hand:", by_hand(x, jnp.zeros(2), gradient)[0])
print("rmsprop:", optax.apply_updates(x, updates))

# %%
# Written out, the average is
#
# .. math::
#     \mathbf{s}_t = (1 - \gamma) \left(\mathbf{g}_t^2 + \gamma \mathbf{g}_{t-1}^2
#       + \gamma^2 \mathbf{g}_{t-2}^2 + \dots \right)
#
# The weights are plotted below. Their sum after t steps is :math:`1 - \gamma^t`. How
# far back does the average look? Three numbers answer that:
#
# - its mean age is :math:`1/(1-\gamma)` steps (10 at 0.9), counting the newest as 1;
# - after that many steps it has collected about 63% of its weight, 1 - 1/e, and 95%
#   after three times as many;
# - its half-life is :math:`\ln 2 / \ln(1/\gamma)` steps (6.6 at 0.9): the time in
#   which a gradient's weight halves.


def weights(gamma, steps=40):
    """The weight of the gradient t steps ago, for t = 0 ... steps - 1."""
    return (1 - gamma) * gamma ** np.arange(steps)


figure, axes = plt.subplots(figsize=(6, 4))
print("gamma  1/(1-gamma)  half-life  weight of that many steps  of the last 40")
for gamma, style in zip((0.95, 0.9, 0.8, 0.7), ["-", "--", "-.", ":"], strict=True):
    w = weights(gamma)
    age, half_life = 1 / (1 - gamma), np.log(2) / np.log(1 / gamma)
    print(
        f"{gamma:5.2f}  {age:11.1f}  {half_life:9.1f}  {1 - gamma**age:24.2f}  "
        f"{w.sum():11.4f}"
    )
    axes.plot(w, style, linewidth=2, label=f"gamma = {gamma:.2f}")
axes.set(
    xlabel="steps ago",
    ylabel="weight (1 - gamma) gamma^t",
    title="What the average remembers",
)
axes.legend()
plt.show()

# %%
# On a quadratic
# --------------
#
# :math:`f(\mathbf{x}) = 0.1 x_1^2 + 2 x_2^2` from (-5, -2), in 20 steps with a learning
# rate of 0.4. AdaGrad slows down along the flat :math:`x_1`; RMSProp arrives.


def f(x):
    """The textbook's function: flat along x1, steep along x2."""
    return 0.1 * x[0] ** 2 + 2 * x[1] ** 2


def path(optimizer, f=f, steps=20):
    """The points visited from (-5, -2), an array of shape [steps + 1, 2]."""

    def step(carry, _):
        x, state = carry
        updates, state = optimizer.update(jax.grad(f)(x), state, x)
        x = optax.apply_updates(x, updates)
        return (x, state), x

    start = jnp.array([-5.0, -2.0])
    _, points = jax.lax.scan(step, (start, optimizer.init(start)), length=steps)
    return np.vstack([start, points])


def draw(axes, paths, f=f):
    """Contours of f and the paths across them."""
    lowest = min(points[:, 1].min() for points in paths.values()) - 0.5
    x1, x2 = np.meshgrid(np.linspace(-5.5, 1.5, 141), np.linspace(lowest, 1.5, 121))
    levels = np.geomspace(0.02, 16, 12)
    axes.contour(x1, x2, f((x1, x2)), levels=levels, colors="0.75", linewidths=0.8)
    for (label, points), marker in zip(paths.items(), "os^", strict=False):
        axes.plot(*points.T, marker=marker, markersize=4, label=label)
    axes.plot(0, 0, "k*", markersize=11, label="minimum")
    axes.set(xlabel="x1", ylabel="x2", xlim=(-5.5, 1.5), ylim=(lowest, 1.5))
    axes.legend()


paths = {
    "RMSProp": path(rmsprop(learning_rate=0.4, gamma=0.9)),
    "AdaGrad": path(optax.adagrad(0.4, initial_accumulator_value=0.0, eps=1e-6)),
}
x1, x2 = paths["RMSProp"][-1]
print(f"epoch 20, x1 {x1:.6f}, x2 {x2:.6f}")
x1, x2 = paths["AdaGrad"][-1]
print(f"AdaGrad with the same learning rate: x1 {x1:.6f}, x2 {x2:.6f}")
figure, axes = plt.subplots(figsize=(6, 4))
draw(axes, paths)
axes.set_title("20 steps on 0.1 x1² + 2 x2², learning rate 0.4")
plt.show()

# %%
# The textbook prints ``epoch 20, x1 -0.010599, x2 0.000000``.
#
# From scratch
# ------------
#
# Linear regression on NASA's airfoil noise in batches of 10, over 2 epochs, with a
# learning rate of 0.01 and a gamma of 0.9. ``by_hand`` above is the optimizer: it is
# applied to the weights and to the bias, each with an average of its own.
#
# The data are downloaded once (60 kB; Brooks, Pope and Marcolini, UCI dataset 291, CC
# BY 4.0). Without internet, put the file in a folder and set ``JAX_RMSPROP_DATA`` to
# it. As in the textbook, each column is standardized and the first 1,500 rows are used.

file = pooch.retrieve(
    "http://d2l-data.s3-accelerate.amazonaws.com/airfoil_self_noise.dat",
    "sha1:76e5be1548fd8222e5074cf0faae75edff8cf93f",
    "airfoil_self_noise.dat",
    os.environ.get("JAX_RMSPROP_DATA", pooch.os_cache("jax_rmsprop")),
)
table = np.genfromtxt(file)
table = ((table - table.mean(0)) / table.std(0))[:1500].astype("float32")
features, levels = jnp.asarray(table[:, :-1]), jnp.asarray(table[:, -1])


def loss(p, rows):
    """The textbook's loss: half the mean squared error."""
    return ((features[rows] @ p["w"] + p["b"] - levels[rows]) ** 2).mean() / 2


every = jnp.arange(len(features))
key, start, shuffle = jax.random.split(jax.random.key(0), 3)
p = {"w": 0.01 * jax.random.normal(start, (5,)), "b": jnp.zeros(())}
nu = jax.tree.map(jnp.zeros_like, p)
epochs = [jax.random.permutation(k, every) for k in jax.random.split(shuffle, 2)]
rows = jnp.stack(epochs).reshape(-1, 10)


@jax.jit
def step(p, nu, rows):
    """One batch: the new parameters and the new average."""
    gradient = jax.grad(loss)(p, rows)
    pairs = {n: by_hand(p[n], nu[n], gradient[n], 0.01) for n in p}
    return {n: x for n, (x, _) in pairs.items()}, {n: s for n, (_, s) in pairs.items()}


losses = {"from scratch": [loss(p, every)], "concise": [loss(p, every)]}
first = p
for batch in rows:
    p, nu = step(p, nu, batch)
    losses["from scratch"].append(loss(p, every))
print(f"from scratch: loss: {losses['from scratch'][-1]:.6f}")

# %%
# Concise
# -------
#
# The same with the ready-made optimizer, which handles the tree by itself. As in any
# training with Optax, the loop is ``update`` and ``apply_updates``; ``scan`` makes one
# compiled program of it.

optimizer = rmsprop(learning_rate=0.01, gamma=0.9)


def concise(carry, rows):
    """One batch, and the loss over all data after it."""
    p, state = carry
    updates, state = optimizer.update(jax.grad(loss)(p, rows), state, p)
    p = optax.apply_updates(p, updates)
    return (p, state), loss(p, every)


_, after = jax.lax.scan(concise, (first, optimizer.init(first)), rows)
losses["concise"] += list(after)
print(f"concise: loss: {losses['concise'][-1]:.6f}")

figure, axes = plt.subplots(figsize=(6, 4))
for (name, curve), style in zip(losses.items(), ["-", "--"], strict=True):
    axes.plot(np.linspace(0, 2, len(curve)), curve, style, label=name)


def trained(seed):
    """The loss at the end, from another start and in another order."""
    start, *keys = jax.random.split(jax.random.key(seed), 3)
    p = {"w": 0.01 * jax.random.normal(start, (5,)), "b": jnp.zeros(())}
    rows = [jax.random.permutation(key, every).reshape(-1, 10) for key in keys]
    rows = jnp.concatenate(rows)
    return jax.lax.scan(concise, (p, optimizer.init(p)), rows)[1][-1]


last = np.asarray(jax.jit(jax.vmap(trained))(np.arange(20)))
print(
    f"over 20 seeds: mean {last.mean():.6f}, from {last.min():.6f} to "
    f"{last.max():.6f}; the textbook: 0.243452 and 0.243676"
)
axes.axhline(0.2435, color="0.5", linewidth=1)
axes.annotate(
    "textbook, 0.2435",
    (2, 0.2435),
    (0, -4),
    ha="right",
    va="top",
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
plt.show()

# %%
# Exercise 1: what if gamma is 1, and why?
# ----------------------------------------
#
# The average never leaves its initial 0, so every gradient is divided by
# :math:`\sqrt\epsilon = 0.001`. This is gradient descent with a learning rate 1000
# times as large, and it diverges. With the learning rate divided by 1000 it is ordinary
# gradient descent: no coordinate is adapted.

figure, axes = plt.subplots(figsize=(6, 4))
for gamma, rate in ((0.9, 0.4), (1.0, 0.4), (1.0, 4e-4)):
    d = np.linalg.norm(path(rmsprop(rate, gamma)).astype(float), axis=1)
    print(
        f"gamma {gamma:g}, learning rate {rate:g}: distance from the minimum "
        f"after 1 step {d[1]:.4g}, after 20 {d[-1]:.4g}"
    )
    axes.plot(np.where(d < 1e12, d, np.nan), label=f"gamma {gamma:g}, rate {rate:g}")
axes.set(
    yscale="log",
    xlabel="step",
    ylabel="distance from the minimum",
    title="gamma 1 beside 0.9",
    ylim=(1e-3, 1e12),
    xticks=range(0, 21, 5),
)
axes.legend()
plt.show()

# %%
# Exercise 2: what does a rotation of the problem do?
# ---------------------------------------------------
#
# :math:`f(\mathbf{x}) = 0.1 (x_1 + x_2)^2 + 2 (x_1 - x_2)^2` is the same valley, turned
# by 45 degrees. RMSProp rescales the coordinates one by one, and the valley runs along
# neither of them. Both get nearly the same step: the path turns into the valley, but no
# scaling of the axes can stretch it along the diagonal.


def rotated(x):
    """The textbook's function turned by 45 degrees: its valley runs along x1 = x2."""
    return 0.1 * (x[0] + x[1]) ** 2 + 2 * (x[0] - x[1]) ** 2


for name, function in (("straight", f), ("rotated", rotated)):
    values = [float(function(x)) for x in path(rmsprop(0.4), function)]
    print(f"{name}: f after 5 steps {values[5]:.2e}, 20 steps {values[20]:.2e}")
figure, axes = plt.subplots(figsize=(6, 4))
draw(axes, {"RMSProp": path(rmsprop(0.4), rotated)}, rotated)
axes.set_title("rotated: 0.1 (x1 + x2)² + 2 (x1 - x2)²")
plt.show()

# %%
# Exercise 3: a real problem, at several learning rates
# -----------------------------------------------------
#
# A network with one hidden layer on handwritten digits, which come with scikit-learn:
# 1,500 to train and 297 to test. (The textbook's Fashion-MNIST is 31 MB; ``common.py``
# among the examples has a function for it.)
#
# Every parameter moves by about the learning rate in each step, so the rate is a step
# length. With 1e-5 it hardly moves, with 1 the weights become useless, and ten times
# more or less than the best rate still works.

pixels, labels = sklearn.datasets.load_digits(return_X_y=True)
order = np.random.default_rng(0).permutation(len(pixels))
pixels = jnp.asarray(pixels[order] / 16, "float32")
labels = jnp.asarray(labels[order], "int32")
TRAIN, TEST = jnp.arange(1500), jnp.arange(1500, len(labels))


def network(key):
    """The parameters: 64 inputs, 32 hidden units, 10 outputs."""
    first, second = jax.random.split(key)
    w1 = jax.random.normal(first, (64, 32)) * (2 / 64) ** 0.5
    w2 = jax.random.normal(second, (32, 10)) * (1 / 32) ** 0.5
    return {"w1": w1, "b1": jnp.zeros(32), "w2": w2, "b2": jnp.zeros(10)}


def logits(p, rows):
    """The network's outputs for these digits."""
    return jax.nn.relu(pixels[rows] @ p["w1"] + p["b1"]) @ p["w2"] + p["b2"]


def cross_entropy(p, rows):
    """The mean loss, in nats per example."""
    losses = optax.softmax_cross_entropy_with_integer_labels(
        logits(p, rows), labels[rows]
    )
    return losses.mean()


def classify(rate, gamma, epochs, seed=0):
    """Train in batches of 50; each epoch's mean loss, and the accuracy at the end."""
    start, shuffle = jax.random.split(jax.random.key(seed))
    optimizer = rmsprop(rate, gamma)

    def step(carry, rows):
        p, state = carry
        loss, gradient = jax.value_and_grad(cross_entropy)(p, rows)
        updates, state = optimizer.update(gradient, state, p)
        return (optax.apply_updates(p, updates), state), loss

    def epoch(carry, key):
        rows = jax.random.permutation(key, TRAIN).reshape(-1, 50)
        carry, losses = jax.lax.scan(step, carry, rows)
        return carry, losses.mean()

    p = network(start)
    keys = jax.random.split(shuffle, epochs)
    (p, _), losses = jax.lax.scan(epoch, (p, optimizer.init(p)), keys)
    return losses, (logits(p, TEST).argmax(-1) == labels[TEST]).mean()


EPOCHS = 20
rates = 10.0 ** np.arange(-5, 1)
run = jax.jit(jax.vmap(lambda rate: classify(rate, 0.9, EPOCHS)))
losses, right = map(np.asarray, run(jnp.asarray(rates, jnp.float32)))
figure, axes = plt.subplots(figsize=(6, 4))
for rate, curve, share in zip(rates, losses, right, strict=True):
    print(f"rate {rate:7.0e}: training loss {curve[-1]:8.4f}, accuracy {share:.3f}")
    axes.plot(np.arange(1, EPOCHS + 1), curve, label=f"{rate:.0e}")
print(f"the best of them: {rates[right.argmax()]:.0e}")
axes.set(
    yscale="log",
    xlabel="epoch",
    ylabel="training loss",
    title="Digits: training loss at six learning rates",
    xticks=range(0, EPOCHS + 1, 5),
)
axes.legend(title="learning rate", ncols=2, fontsize=9)
plt.show()

# %%
# Exercise 4: should gamma change as the training goes on?
# --------------------------------------------------------
#
# From 0.5 to 0.99 it hardly matters. With 0.999 the average does not fill in time, and
# the first steps are far too long. A gamma that grows avoids that: :math:`1 - 1/t`, the
# plain mean of all squares so far, is AdaGrad with a learning rate that grows as the
# root of the step. Pass a schedule instead of a number.

EPOCHS = 10
steps = EPOCHS * len(TRAIN) // 50
fixed = ["0.5", "0.9", "0.99", "0.999"]
scheduled = {
    "0.5 to 0.999": optax.linear_schedule(0.5, 0.999, steps),
    "1 - 1/step": lambda t: 1 - 1 / (t.astype("float32") + 1),
}


def seeds(gamma):
    """The losses and accuracies of five seeds."""
    train = functools.partial(classify, 0.01, gamma, EPOCHS)
    return jax.vmap(train)(jnp.arange(5))


# The numbers share one program; each schedule has its own.
many = jax.jit(jax.vmap(seeds))(jnp.array([float(gamma) for gamma in fixed]))
results = dict(zip(fixed, zip(*many, strict=True), strict=True))
for name, gamma in scheduled.items():
    results[name] = jax.jit(functools.partial(seeds, gamma))()
figure, axes = plt.subplots(figsize=(6, 4))
for name, (losses, right) in results.items():
    curve = losses.mean(0)
    print(
        f"gamma {name:>12}: training loss {curve[-1]:.4f}, accuracy {right.mean():.3f}"
    )
    style = "-" if name in fixed else "--"
    axes.plot(np.arange(1, EPOCHS + 1), curve, style, label=name)
axes.set(
    yscale="log",
    xlabel="epoch",
    ylabel="training loss",
    title="Digits: gamma fixed and scheduled",
    xticks=range(0, EPOCHS + 1, 2),
)
axes.legend(title="gamma", ncols=2, fontsize=9)
plt.show()

# %%
# Where to go from here
# ---------------------
#
# - :doc:`does_it_converge`: a gamma that is too small can lead away from the minimum.
# - :doc:`gamma_sweep`: gamma and the learning rate together, 357 trainings.
# - :doc:`/explanation/which_optimizer`: RMSProp beside Adam and others.
