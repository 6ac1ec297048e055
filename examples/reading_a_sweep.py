"""
Reading a sweep, picture by picture
===================================

A small sweep, and every way to look at it: the Dataset, the summary, the table, six
pictures and a page of HTML. :doc:`gamma_sweep` reads a larger one.
"""

import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import sklearn.datasets

from jax_rmsprop import log_one_minus, plotting, rmsprop, summary, sweep, to_dataframe

# %%
# A network with one hidden layer on handwritten digits. The function that is swept
# builds the optimizer from its arguments and returns what you want to know: here the
# loss of each epoch, and the accuracy.

x, y = sklearn.datasets.load_digits(return_X_y=True)
order = np.random.default_rng(0).permutation(len(x))
x, y = jnp.asarray(x[order] / 16, "float32"), jnp.asarray(y[order], "int32")


def logits(p, rows):
    """The network's outputs for these rows of the data."""
    return jax.nn.relu(x[rows] @ p["w1"] + p["b1"]) @ p["w2"] + p["b2"]


def cross_entropy(p, rows):
    """The mean loss, in nats per example."""
    losses = optax.softmax_cross_entropy_with_integer_labels(logits(p, rows), y[rows])
    return losses.mean()


def train(gamma, learning_rate, seed):
    """Eight epochs in batches of 50."""
    key = jax.random.key(seed)
    optimizer = rmsprop(learning_rate, gamma)
    first, second = jax.random.split(key)
    w1 = jax.random.normal(first, (64 * 32,)).reshape(64, 32) * (2 / 64) ** 0.5
    w2 = jax.random.normal(second, (32 * 10,)).reshape(32, 10) * (1 / 32) ** 0.5
    p = {"w1": w1, "b1": jnp.zeros(32), "w2": w2, "b2": jnp.zeros(10)}

    def step(carry, rows):
        p, state = carry
        loss, gradient = jax.value_and_grad(cross_entropy)(p, rows)
        updates, state = optimizer.update(gradient, state, p)
        return (optax.apply_updates(p, updates), state), loss

    def epoch(carry, number):
        rows = jax.random.permutation(jax.random.fold_in(key, number), 1500)
        carry, losses = jax.lax.scan(step, carry, rows.reshape(30, 50))
        return carry, losses.mean()

    (p, _), losses = jax.lax.scan(epoch, (p, optimizer.init(p)), jnp.arange(8))
    test = jnp.arange(1500, len(x))
    return {"loss": losses, "accuracy": (logits(p, test).argmax(-1) == y[test]).mean()}


curves = sweep(
    train,
    {
        "gamma": log_one_minus(0, 0.9999, 9),
        "learning_rate": [0.001, 0.003, 0.01, 0.03, 0.1],
        "seed": range(2),
    },
    progress=False,
)
curves.loss.attrs |= {"long_name": "training loss", "units": "nats"}

# %%
# The result is an xarray Dataset with an axis for each hyperparameter:

curves

# %%
# **The summary** judges by the last value, averaged over the seeds. Below the best
# point are its neighbours: if they lie within the range of the seeds, the sweep does
# not tell them apart. If the best lies at the end of an axis, the last line says so.

print(summary(curves, "loss"))

# %%
# A gamma of 0.999 and more is "best" here for a reason that does not carry over: the
# training has 240 steps, so such an average never fills, its steps start long and
# shrink, and that acts like a learning rate schedule
# (:doc:`which gamma do I take? </how-to/which_gamma>`).
#
# For an accuracy say ``maximize=True``:

print(summary(curves, "accuracy", maximize=True))

# %%
# **The table** is a pandas DataFrame with a row for each training.

to_dataframe(curves).sort_values("loss").head()

# %%
# **Loss against gamma**, at the best learning rate. The axis is even in log(1 - gamma);
# the upper one shows how many steps the average looks back over. The band is the range
# of the seeds.

plotting.loss_against_gamma(curves, "loss")
plt.show()

# %%
# **Heat map** of two axes. The valley runs aslant: a longer average needs a smaller
# rate.

plotting.heatmap(curves, "loss")
plt.show()

# %%
# **Sensitivity**: where a line is flat, gamma matters little at that learning rate.

plotting.sensitivity(curves, "loss")
plt.show()

# %%
# **Best curves**: two trainings with the same end may have taken different paths.

plotting.best_curves(curves, "loss")
plt.show()

# %%
# **Parallel coordinates**: each point is a line from its hyperparameters to its loss.
# This works for any number of hyperparameters, and for points that are not a grid.

plotting.parallel_coordinates(curves, "loss")
plt.show()

# %%
# **Importance**: the share of the variance that each hyperparameter explains by itself,
# and together with others. Here the learning rate decides, and gamma matters mostly in
# combination with it.

plotting.importance(curves, "loss")
plt.show()

# %%
# **A report to send to somebody**: one HTML file that opens offline. Hover over points,
# select the axis, sort the table.

page = plotting.report(curves, Path(tempfile.mkdtemp()) / "sweep.html", "loss")
print(f"{page.name}: {page.stat().st_size / 1e6:.1f} MB")
