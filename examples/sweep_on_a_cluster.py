"""
A sweep on a dask cluster
=========================

Sixty-four points, trained by the workers of a dask cluster.

Without arguments the script starts two workers on this machine. On a cluster, start a
scheduler and workers (dask-jobqueue, dask-kubernetes and the clouds' packages do that)
and pass the scheduler's address::

    dask scheduler
    dask worker tcp://scheduler:8786 --nthreads 1    # on each machine
    python examples/sweep_on_a_cluster.py --scheduler tcp://scheduler:8786

Workers may join, leave and be killed. With ``--store`` the search resumes from what is
in the folder, and continues with more points.
"""

import matplotlib.pyplot as plt
import numpy as np
from common import arguments, save, training
from distributed import Client, LocalCluster

from jax_rmsprop import log, log_one_minus, points, summary, sweep

SPACE = {"gamma": log_one_minus(0.5, 0.9999), "learning_rate": log(0.001, 0.3)}


def draw(curves, path):
    """The loss at each point; crosses where it diverged."""
    figure, ax = plt.subplots(figsize=(6, 5))
    loss = curves.loss.values
    good = ~curves.diverged.values
    short, rate = 1 - curves.gamma.values, curves.learning_rate.values
    dots = ax.scatter(
        short[good], rate[good], c=loss[good], norm="log", cmap="viridis_r", s=60
    )
    if not good.all():
        ax.plot(short[~good], rate[~good], "kx", label="diverged")
        ax.legend()
    best = np.where(good, loss, np.inf).argmin()
    ax.plot(short[best], rate[best], "o", mfc="none", mec="tab:red", ms=14)
    ax.set(xscale="log", yscale="log", ylabel="learning rate")
    ax.set(title=f"{len(loss)} points, the best one in the circle")
    ax.set_xlabel("gamma")
    ticks = [0.5, 0.9, 0.99, 0.999, 0.9999]
    ax.set_xticks([1 - x for x in ticks], [f"{x:g}" for x in ticks])
    ax.set_xticks([], minor=True)
    ax.invert_xaxis()
    figure.colorbar(dots, label="test loss (nats per example)")
    save(figure, path)


def main():
    """Search on the workers, and draw what they found."""
    parser = arguments(__doc__, "sweep_on_a_cluster.png")
    parser.add_argument("--scheduler", help="its address; else two workers here")
    parser.add_argument("--points", type=int, default=64, help="a power of two is even")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--store", help="a folder to go on from, and to keep it in")
    options = parser.parse_args()
    search = points(SPACE, options.points) | {"seed": [0] * options.points}
    cluster = options.scheduler or LocalCluster(
        n_workers=2, threads_per_worker=1, dashboard_address=None
    )
    with Client(cluster) as client:
        curves = sweep(
            training(options.epochs),
            search,
            zipped=True,
            batch_size=8,
            store=options.store,
            client=client,
        )
    if not options.scheduler:
        cluster.close()
    print(f"{curves.computed} trainings on {curves.devices} devices of the cluster")
    print(summary(curves))
    draw(curves, options.output)


if __name__ == "__main__":
    main()
