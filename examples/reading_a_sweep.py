"""
What a sweep says, picture by picture
=====================================

A small sweep, and each way to look at it: the Dataset, the summary, the table, the six
pictures and the page of HTML. The same on the main job's 357 trainings is
:doc:`gamma_sweep`.
"""

import tempfile
from pathlib import Path

import jax
import matplotlib.pyplot as plt
from common import batches, cross_entropy, digits, logits, network, train_step

from jax_rmsprop import log_one_minus, plotting, rmsprop, summary, sweep, to_dataframe

# %%
# What is swept is a function of the hyperparameters, in which the optimizer is built.
# It returns what one wants to know: here the loss of each epoch, and the accuracy.

train_data, test_data = digits()


def train(gamma, learning_rate, seed):
    """A network on handwritten digits."""
    key = jax.random.key(seed)
    optimizer = rmsprop(learning_rate, gamma)
    step = train_step(cross_entropy, optimizer)

    def epoch(carry, number):
        shuffled = batches(jax.random.fold_in(key, number), train_data, 50)
        carry, losses = jax.lax.scan(step, carry, shuffled)
        return carry, losses.mean()

    params = network(key, inputs=64)
    carry = params, optimizer.init(params)
    (params, _), losses = jax.lax.scan(epoch, carry, jax.numpy.arange(8))
    right = logits(params, test_data.x).argmax(-1) == test_data.y
    return {"loss": losses, "accuracy": right.mean()}


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
# What comes back is an xarray Dataset, with an axis for each hyperparameter. In a
# notebook it shows itself:

curves

# %%
# **The summary** judges by the last value, the mean over the seeds. Beside the best
# point stand its neighbours: where they are as good as the seeds scatter, there is no
# need to look closer. If the best lies at the end of an axis, it says so.

print(summary(curves, "loss"))

# %%
# **The table** is one of pandas, with a row for each training.

to_dataframe(curves).sort_values("loss").head()

# %%
# **Against gamma**, at the best learning rate. The axis is even in log(1 - gamma), and
# on top stand the steps that an average looks back over. The band is the seeds' range.

plotting.loss_against_gamma(curves, "loss")
plt.show()

# %%
# **Two axes at once.** The valley runs aslant: a longer average wants a smaller rate.

plotting.heatmap(curves, "loss")
plt.show()

# %%
# **Sensitivity**: flat lines say that gamma matters little at that learning rate.

plotting.sensitivity(curves, "loss")
plt.show()

# %%
# **The best curves**, since two trainings that end alike may have gone other ways.

plotting.best_curves(curves, "loss")
plt.show()

# %%
# **Each point as a line**, from hyperparameters to loss. This one takes any number of
# hyperparameters, and points that are no grid.

plotting.parallel_coordinates(curves, "loss")
plt.show()

# %%
# **Which of them matters**: the share of the variance that each explains by itself, and
# together with others. The learning rate decides here, and gamma mostly in company.

plotting.importance(curves, "loss")
plt.show()

# %%
# **A page to send to somebody**: one file, which opens in a browser without a network.
# One hovers over points, selects the axis, and sorts the table.

page = plotting.report(curves, Path(tempfile.mkdtemp()) / "sweep.html", "loss")
print(f"{page.name}: {page.stat().st_size / 1e6:.1f} MB")
