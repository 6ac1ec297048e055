"""
A sweep on a dask cluster
=========================

Sixty-four points, trained by the workers of a dask cluster, which may join, leave and
be killed.
"""

# %%
# What is swept
# -------------
#
# The digits and the network of :doc:`gamma_sweep`, as a ``Training`` whose steps are
# epochs.

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import sklearn.datasets
from distributed import Client, LocalCluster

from jax_rmsprop import Training, log, log_one_minus, points, rmsprop, summary, sweep

x, y = sklearn.datasets.load_digits(return_X_y=True)
order = np.random.default_rng(0).permutation(len(x))
x, y = jnp.asarray(x[order] / 16, "float32"), jnp.asarray(y[order], "int32")
TEST = jnp.arange(1500, len(x))


def cross_entropy(p, rows):
    """The mean loss, in nats per example."""
    logits = jax.nn.relu(x[rows] @ p["w1"] + p["b1"]) @ p["w2"] + p["b2"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, y[rows]).mean()


def init(gamma, learning_rate):
    """An untrained network."""
    key = jax.random.key(0)
    first, second = jax.random.split(key)
    w1 = jax.random.normal(first, (64 * 32,)).reshape(64, 32) * (2 / 64) ** 0.5
    w2 = jax.random.normal(second, (32 * 10,)).reshape(32, 10) * (1 / 32) ** 0.5
    p = {"w1": w1, "b1": jnp.zeros(32), "w2": w2, "b2": jnp.zeros(10)}
    return key, p, rmsprop(learning_rate, gamma).init(p)


def epoch(carry, gamma, learning_rate):
    """Fifty batches of 30, and the test loss after them."""
    key, p, state = carry
    key, shuffle = jax.random.split(key)
    optimizer = rmsprop(learning_rate, gamma)

    def step(carry, rows):
        p, state = carry
        updates, state = optimizer.update(jax.grad(cross_entropy)(p, rows), state, p)
        return (optax.apply_updates(p, updates), state), None

    rows = jax.random.permutation(shuffle, 1500).reshape(50, 30)
    (p, state), _ = jax.lax.scan(step, (p, state), rows)
    return (key, p, state), {"loss": cross_entropy(p, TEST)}


# %%
# It is trained at 64 points of a Sobol sequence instead of a grid: ``points`` spreads
# any power of two of them evenly.

SPACE = {"gamma": log_one_minus(0.5, 0.9999), "learning_rate": log(0.001, 0.3)}
search = points(SPACE, 64)

# %%
# The cluster
# -----------
#
# Here it is two workers on this machine. On a cluster, start a scheduler and workers
# (dask-jobqueue, dask-kubernetes and the clouds' packages do that) and give its address
# to ``Client``::
#
#     dask scheduler
#     dask worker tcp://scheduler:8786 --nthreads 1    # on each machine
#
# A worker needs this package and JAX, in the versions that you have. It compiles the
# program once and returns rows of results; the caller alone writes the store, so
# workers need no common file system. If a worker is lost, only the batches that it was
# running are repeated.


def run():
    """Run all points on the workers."""
    # A script that starts processes must not start them when it is imported.
    cluster = LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None)
    with cluster, Client(cluster) as client:
        training = Training(init, epoch)
        return sweep(
            training, search, steps=5, batch_size=8, client=client, progress=False
        )


if __name__ == "__main__":
    curves = run()
    print(f"{curves.computed} trainings on {curves.devices} devices of the cluster")
    print(summary(curves))

# %%
# With ``store="found.zarr"`` the same call resumes after an interruption, and a call
# with 128 points runs only those that are new, since a Sobol sequence continues.
#
# What was found
# --------------
#
# Each dot is one point. Good gammas and rates lie on a band from the upper left to the
# lower right: a longer window makes the first steps larger, so it wants a smaller rate.

if __name__ == "__main__":
    figure, axes = plt.subplots(figsize=(6, 5), layout="constrained")
    loss = np.where(curves.diverged, np.nan, curves.loss[:, -1])
    short = 1 - curves.gamma.values
    dots = axes.scatter(
        short, curves.learning_rate, c=loss, norm="log", cmap="viridis_r", s=60
    )
    best = np.nanargmin(loss)
    rate = curves.learning_rate[best]
    axes.plot(short[best], rate, "o", mfc="none", mec="tab:red", ms=14)
    axes.set(xscale="log", yscale="log", xlabel="gamma", ylabel="learning rate")
    axes.set_title(f"{len(loss)} points, the best one in the circle")
    ticks = [0.5, 0.9, 0.99, 0.999, 0.9999]
    axes.set_xticks([1 - x for x in ticks], [f"{x:g}" for x in ticks])
    axes.set_xticks([], minor=True)
    axes.invert_xaxis()
    _ = figure.colorbar(dots, label="test loss, nats per example")

# %%
# What to do next: :doc:`sweep_many_hosts` for machines that JAX itself connects, or
# :doc:`../how-to/slurm` for a job that is killed at its time limit.
