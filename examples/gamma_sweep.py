r"""
Which gamma? A sweep, and what to read from it
==============================================

Seventeen gammas, seven learning rates and three seeds: 357 trainings of a network on
handwritten digits, run as one compiled program, and what their losses say.
"""

# %%
# What is swept
# -------------
#
# A sweep runs a function of the hyperparameters. First the data and the network: 1,500
# digits of 8 x 8 pixels to train, 297 to test, and one hidden layer.

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import sklearn.datasets

from jax_rmsprop import log_one_minus, plotting, rmsprop, summary, sweep

x, y = sklearn.datasets.load_digits(return_X_y=True)
order = np.random.default_rng(0).permutation(len(x))
x, y = jnp.asarray(x[order] / 16, "float32"), jnp.asarray(y[order], "int32")
TEST = jnp.arange(1500, len(x))


def network(key):
    """The parameters: 64 inputs, 32 hidden units, 10 outputs."""
    first, second = jax.random.split(key)
    w1 = jax.random.normal(first, (64 * 32,)).reshape(64, 32) * (2 / 64) ** 0.5
    w2 = jax.random.normal(second, (32 * 10,)).reshape(32, 10) * (1 / 32) ** 0.5
    return {"w1": w1, "b1": jnp.zeros(32), "w2": w2, "b2": jnp.zeros(10)}


def logits(p, rows):
    """The network's outputs for these rows of the data."""
    return jax.nn.relu(x[rows] @ p["w1"] + p["b1"]) @ p["w2"] + p["b2"]


def cross_entropy(p, rows):
    """The mean loss, in nats per example."""
    losses = optax.softmax_cross_entropy_with_integer_labels(logits(p, rows), y[rows])
    return losses.mean()


# %%
# Then the training: 20 epochs in batches of 30. The optimizer is built inside, from the
# arguments, so that one program serves all gammas and rates.


def train(gamma, learning_rate, seed):
    """The training loss of each epoch, and the test loss and accuracy at the end."""
    optimizer = rmsprop(learning_rate, gamma)
    key = jax.random.key(seed)

    def step(carry, rows):
        p, state = carry
        loss, gradient = jax.value_and_grad(cross_entropy)(p, rows)
        updates, state = optimizer.update(gradient, state, p)
        return (optax.apply_updates(p, updates), state), loss

    def epoch(carry, number):
        rows = jax.random.permutation(jax.random.fold_in(key, number), 1500)
        carry, losses = jax.lax.scan(step, carry, rows.reshape(50, 30))
        return carry, losses.mean()

    p = network(key)
    (p, _), losses = jax.lax.scan(epoch, (p, optimizer.init(p)), jnp.arange(20))
    right = logits(p, TEST).argmax(-1) == y[TEST]
    return {
        "train_loss": losses,
        "loss": cross_entropy(p, TEST),
        "accuracy": right.mean(),
    }


# %%
# The grid
# --------
#
# What matters about gamma is how far the average looks back, 1/(1-gamma) steps, on
# a logarithmic scale. ``log_one_minus`` spaces the gammas this way: from 1 step to
# 10,000.

axes = {
    "gamma": log_one_minus(0, 0.9999, 17),
    "learning_rate": [0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3],
    "seed": range(3),
}
windows = ", ".join(f"{1 / (1 - gamma):.0f}" for gamma in axes["gamma"])
print(f"steps looked back over: {windows}")

# %%
# The sweep
# ---------

curves = sweep(train, axes)
print(
    f"{curves.finished.size} trainings in {curves.compile_seconds:.1f} s of compiling "
    f"and {curves.run_seconds:.1f} s of running, {curves.batch_size} at once"
)

# %%
# What came out
# -------------
#
# The summary has the best point, its neighbours, and the range of the seeds.

curves.loss.attrs |= {"long_name": "test loss", "units": "nats per example"}
curves.train_loss.attrs |= {"long_name": "training loss", "units": "nats per example"}
print(summary(curves))
best = summary(curves, "accuracy", maximize=True)
print(f"\nhighest accuracy: {best.value:.1%}")

# %%
# In words: gamma 0.982 at a rate of 0.01 has the lowest loss, but the range of its
# seeds overlaps with those of its neighbours in gamma. So this sweep does not say that
# 0.982 is better than 0.968 or 0.99. In the learning rate it is clear: 0.003 and 0.03
# are worse.
#
# How much does gamma matter?
# ---------------------------

plotting.loss_against_gamma(curves)
plt.show()

# %%
# Little, over a wide range. From 0.82 to 0.99 the bands of the seeds overlap with the
# best one's; even 0, with no memory at all, learns. Beyond 0.998 it goes wrong. The
# upper axis says why: those averages look back over 1,000 steps and more, and the whole
# training has 1,000.
#
# Why the valley runs aslant
# --------------------------

plotting.heatmap(curves)
plt.show()

# %%
# At a long window the best rate is smaller. An average that starts at 0 and has not
# filled yet is too small, so the first steps are up to 1/sqrt(1-gamma) learning rates
# long: 32 of them at 0.999. A smaller rate makes up for it, ``bias_correction=True``
# removes it, and so does a warm-up.
#
# The same for every rate
# -----------------------

plotting.sensitivity(curves)
plt.show()

# %%
# At small rates the lines fall gently: there a window that has not filled makes up for
# steps that are too short. At large rates only short windows work. So tune the rate
# first; a wrong rate is what makes gamma look important.

plotting.best_curves(curves, "train_loss", top_k=5)
plt.xlabel("epoch")
plt.show()

# %%
# The best five go down together, so the end of the training was not a lucky moment.
#
# What to do next
# ---------------
#
# - Take gamma 0.9 to 0.99 and tune the learning rate.
#   :doc:`Which gamma should I use? </how-to/which_gamma>`
# - Run the same on your own model: :doc:`/how-to/your_model`.
# - Train a quarter of the steps for the same answer: :doc:`successive_halving`.
# - Other pictures, and the table as a page of HTML: :doc:`reading_a_sweep`.
#
# All four pictures in one file:

figure, ax = plt.subplots(2, 2, figsize=(12, 9), layout="constrained")
plotting.loss_against_gamma(curves, ax=ax[0, 0])
plotting.heatmap(curves, ax=ax[0, 1])
plotting.sensitivity(curves, ax=ax[1, 0])
plotting.best_curves(curves, "train_loss", top_k=5, ax=ax[1, 1])
ax[1, 1].set_xlabel("epoch")
figure.suptitle("handwritten digits, one hidden layer")
figure.savefig("gamma_sweep.png")
print("picture: gamma_sweep.png")
plt.close(figure)
