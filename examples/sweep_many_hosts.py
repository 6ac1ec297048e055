"""
A sweep on many hosts (jax.distributed)
=======================================

Every machine runs this script, and all of them share one sweep.
"""

# %%
# Start
# -----
#
# To try it on one machine, start two processes with two CPU devices each::
#
#     python examples/sweep_many_hosts.py --processes 2 --process 0 &
#     python examples/sweep_many_hosts.py --processes 2 --process 1
#
# On a cluster pass the address of the first machine. If JAX knows the launcher (Slurm,
# Open MPI, TPU pods), ``jax.distributed.initialize()`` needs no arguments. Call it
# before anything else that uses JAX: the first use fixes the devices.

import argparse
import sys

import jax

parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
parser.add_argument("--address", default="127.0.0.1:9876", help="address of process 0")
parser.add_argument("--processes", type=int, default=1, help="number of processes")
parser.add_argument("--process", type=int, default=0, help="index of this one")
parser.add_argument("--cpu-devices", type=int, default=2, help="CPUs per process")
parser.add_argument("--store", default="many_hosts.zarr", help="shared folder")
parser.add_argument("--output", default="sweep_many_hosts.png", help="the picture")
# In a notebook the arguments are Jupyter's own.
options = parser.parse_args([] if "ipykernel" in sys.modules else None)
jax.config.update("jax_num_cpu_devices", options.cpu_devices)
if options.processes > 1:
    jax.distributed.initialize(options.address, options.processes, options.process)

# %%
# The training
# ------------
#
# The digits and the network of :doc:`gamma_sweep`, as a ``Training`` whose steps are
# epochs.

import jax.numpy as jnp  # noqa: E402
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
import sklearn.datasets  # noqa: E402

from jax_rmsprop import (  # noqa: E402
    Training,
    log_one_minus,
    plotting,
    rmsprop,
    summary,
    sweep,
)

x, y = sklearn.datasets.load_digits(return_X_y=True)
order = np.random.default_rng(0).permutation(len(x))
x, y = jnp.asarray(x[order] / 16, "float32"), jnp.asarray(y[order], "int32")
TEST = jnp.arange(1500, len(x))


def cross_entropy(p, rows):
    """The mean loss, in nats per example."""
    logits = jax.nn.relu(x[rows] @ p["w1"] + p["b1"]) @ p["w2"] + p["b2"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, y[rows]).mean()


def init(gamma, learning_rate, seed):
    """An untrained network."""
    key = jax.random.key(seed)
    first, second = jax.random.split(key)
    w1 = jax.random.normal(first, (64 * 32,)).reshape(64, 32) * (2 / 64) ** 0.5
    w2 = jax.random.normal(second, (32 * 10,)).reshape(32, 10) * (1 / 32) ** 0.5
    p = {"w1": w1, "b1": jnp.zeros(32), "w2": w2, "b2": jnp.zeros(10)}
    return key, p, rmsprop(learning_rate, gamma).init(p)


def epoch(carry, gamma, learning_rate, seed):
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
# The sweep
# ---------
#
# Every process makes the same call and gets the same Dataset. The devices of all
# processes run one batch together; each needs to see the folder of the store. If a
# process is killed, start all of them again: they resume from the last save, at most a
# minute back.

GRID = {
    "gamma": log_one_minus(0, 0.9999, 9),
    "learning_rate": [0.001, 0.003, 0.01, 0.03, 0.1],
    "seed": range(2),
}
curves = sweep(Training(init, epoch), GRID, steps=5, store=options.store)

# %%
# One process reports
# -------------------
#
# Two processes with two devices each print ``90 trainings on 4 devices of 2
# process(es)``. The numbers are those of one process, bit for bit, at the same batch
# size.

if jax.process_index() == 0:
    where = f"{curves.devices} devices of {jax.process_count()} process(es)"
    print(f"\n{curves.diverged.size} trainings on {where}, in {options.store}")
    print(summary(curves))
    figure, axes = plt.subplots(figsize=(7, 5), layout="constrained")
    curves.loss.attrs.update(long_name="test loss", units="nats per example")
    plotting.heatmap(curves, ax=axes)
    figure.savefig(options.output)

# %%
# What to do next: :doc:`../how-to/slurm` has the job script of such a sweep.
