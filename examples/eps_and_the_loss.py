"""
Does eps fit the loss? Sum or mean
==================================

DQN's eps of 0.01 belongs to the gradient of a *sum* over 32 examples. Take the mean, as
most code does, and the same recipe fails. Here it is trained both ways, and
``diagnose`` shows why.
"""

# %%
# The gradient of a mean of 32 losses is 32 times smaller than that of their sum, and
# its square 1,024 times. RMSProp divides that away, but eps is compared with the
# square. So it has to be 1,024 times smaller as well: ``dqn_zoo`` is ``nature_dqn``
# with such an eps.

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import sklearn.datasets

from jax_rmsprop import conventions, diagnose, plotting

x, y = sklearn.datasets.load_digits(return_X_y=True)
order = np.random.default_rng(0).permutation(len(x))
x, y = jnp.asarray(x[order] / 16, "float32"), jnp.asarray(y[order], "int32")
TEST = jnp.arange(1500, len(x))


def network(key):
    """The parameters: 64 inputs, 32 hidden units, 10 outputs."""
    first, second = jax.random.split(key)
    w1 = jax.random.normal(first, (64, 32)) * (2 / 64) ** 0.5
    w2 = jax.random.normal(second, (32, 10)) * (1 / 32) ** 0.5
    return {"w1": w1, "b1": jnp.zeros(32), "w2": w2, "b2": jnp.zeros(10)}


def logits(p, rows):
    """The network's outputs for these rows of the data."""
    return jax.nn.relu(x[rows] @ p["w1"] + p["b1"]) @ p["w2"] + p["b2"]


def cross_entropy(p, rows):
    """The loss of each example, in nats."""
    return optax.softmax_cross_entropy_with_integer_labels(logits(p, rows), y[rows])


# %%
# A training with a loss that is a sum or a mean. Beside the loss it returns what
# ``diagnose`` finds at each step: for which share of the parameters eps outweighs the
# average, and how long the longest step is.


def train(optimizer, reduce):
    """The mean loss and the diagnosis of each step; the accuracy at the end."""

    def step(carry, rows):
        p, state = carry
        g = jax.grad(lambda p: reduce(cross_entropy(p, rows)))(p)
        updates, state = optimizer.update(g, state, p)
        found = cross_entropy(p, rows).mean(), diagnose(optimizer, state, g)
        return (optax.apply_updates(p, updates), state), found

    keys = jax.random.split(jax.random.key(1), 10)
    rows = [jax.random.permutation(key, 1500)[:1472] for key in keys]
    p = network(jax.random.key(0))
    rows = jnp.concatenate(rows).reshape(-1, 32)
    (p, _), found = jax.lax.scan(step, (p, optimizer.init(p)), rows)
    return *found, (logits(p, TEST).argmax(-1) == y[TEST]).mean()


cases = {
    "sum, eps 0.01": (conventions.nature_dqn(1e-3), jnp.sum),
    "mean, eps 0.01": (conventions.nature_dqn(1e-3), jnp.mean),
    "mean, eps 0.01/32²": (conventions.dqn_zoo(1e-3), jnp.mean),
}
results = {}
print("loss of a batch, eps   loss at the end   accuracy   eps decides")
for name, (optimizer, reduce) in cases.items():
    losses, found, right = jax.jit(train, static_argnums=(0, 1))(optimizer, reduce)
    share, end = found.eps_share[-100:].mean(), losses[-100:].mean()
    print(f"{name:21}  {end:15.4f}  {right:9.1%}  {share:10.0%}")
    results[name] = found, right

# %%
# On the mean with the sum's eps, eps decides every step of every parameter: the
# optimizer is gradient descent with a small learning rate. The first and the last row
# are the same steps to the digit.

figure, axes = plt.subplots(
    3, 3, figsize=(11, 6.4), sharex=True, sharey="row", layout="constrained"
)
for i, (name, (found, right)) in enumerate(results.items()):
    plotting.diagnosis(found, axes[:, i])
    axes[0, i].set_title(f"{name}: {right:.1%} right", fontsize=11)
    for ax in axes[:, i] if i else ():
        ax.set_ylabel("")
        if ax.get_legend():
            ax.get_legend().remove()
plt.show()

# %%
# What to do with your own training
# ---------------------------------
#
# - Call ``diagnose`` every hundred steps or so. If eps decides for nearly all
#   parameters, it is too large for your loss.
# - Copying a recipe, look whether its loss is a sum or a mean: :doc:`/how-to/dqn` has
#   both.
# - :doc:`An agent <dqn>` that balances a pole fails for the same reason.
