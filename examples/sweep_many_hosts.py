"""
A sweep on many hosts
=====================

A sweep over several machines, each of which runs this script.

On one machine, to try it, two processes of two CPU devices each::

    python examples/sweep_many_hosts.py --processes 2 --process 0 &
    python examples/sweep_many_hosts.py --processes 2 --process 1

On a cluster the address is the first machine's, the folder one that all machines
share, and where the launcher is known to JAX (Slurm, Open MPI, TPU pods)
``jax.distributed.initialize()`` needs no arguments. If a process is killed, start all
again: what is finished is in the folder.
"""

import argparse

import jax

# Before any other use of JAX: what it finds then is what it keeps.
parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
parser.add_argument("--address", default="127.0.0.1:9876", help="of process 0")
parser.add_argument("--processes", type=int, default=1, help="how many there are")
parser.add_argument("--process", type=int, default=0, help="which of them this is")
parser.add_argument("--cpu-devices", type=int, default=2, help="of each process")
parser.add_argument("--store", default="many_hosts.zarr", help="a folder for all")
parser.add_argument("--output", default="sweep_many_hosts.png", help="the picture")
options = parser.parse_args()
jax.config.update("jax_num_cpu_devices", options.cpu_devices)
if options.processes > 1:
    jax.distributed.initialize(options.address, options.processes, options.process)

import matplotlib.pyplot as plt  # noqa: E402
from common import save  # noqa: E402
from gamma_sweep import problem, training  # noqa: E402

from jax_rmsprop import log_one_minus, plotting, summary, sweep  # noqa: E402

GRID = {
    "gamma": log_one_minus(0, 0.9999, 9),
    "learning_rate": [0.001, 0.003, 0.01, 0.03, 0.1],
    "seed": range(2),
}


def main():
    """Sweep on the devices of all processes; the first one reports."""
    # Every process makes the same call, and gets the same Dataset.
    chosen = problem("digits")._replace(epochs=5)
    curves = sweep(training(chosen), GRID, store=options.store)
    if jax.process_index() == 0:
        where = f"{curves.devices} devices of {jax.process_count()} process(es)"
        print(f"\n{curves.diverged.size} trainings on {where}, in {options.store}")
        print(summary(curves))
        figure, ax = plt.subplots(figsize=(7, 5))
        curves.loss.attrs.update(long_name="test loss", units="nats per example")
        plotting.heatmap(curves, ax=ax)
        save(figure, options.output)


if __name__ == "__main__":
    main()
