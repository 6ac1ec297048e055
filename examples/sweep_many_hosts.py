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
# Open MPI, TPU pods), ``jax.distributed.initialize()`` needs no arguments. It comes
# before anything else that uses JAX, which fixes its devices at the first use.

import argparse

import jax

parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
parser.add_argument("--address", default="127.0.0.1:9876", help="of process 0")
parser.add_argument("--processes", type=int, default=1, help="number of processes")
parser.add_argument("--process", type=int, default=0, help="index of this one")
parser.add_argument("--cpu-devices", type=int, default=2, help="of each process")
parser.add_argument("--store", default="many_hosts.zarr", help="a folder for all")
parser.add_argument("--output", default="sweep_many_hosts.png", help="the picture")
options = parser.parse_args()
jax.config.update("jax_num_cpu_devices", options.cpu_devices)
if options.processes > 1:
    jax.distributed.initialize(options.address, options.processes, options.process)

# %%
# The sweep
# ---------
#
# Every process makes the same call and gets the same Dataset. The devices of all
# processes run one batch together; each needs to see the folder of the store. If a
# process is killed, start all of them again: what is finished is in the folder.

import matplotlib.pyplot as plt  # noqa: E402
from common import training  # noqa: E402

from jax_rmsprop import log_one_minus, plotting, summary, sweep  # noqa: E402

GRID = {
    "gamma": log_one_minus(0, 0.9999, 9),
    "learning_rate": [0.001, 0.003, 0.01, 0.03, 0.1],
    "seed": range(2),
}
curves = sweep(training(epochs=5), GRID, store=options.store)

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
    figure, axes = plt.subplots(figsize=(7, 5))
    curves.loss.attrs.update(long_name="test loss", units="nats per example")
    plotting.heatmap(curves, ax=axes)
    figure.savefig(options.output)

# %%
# What to do next: :doc:`../how-to/slurm` has the job script of such a sweep.
