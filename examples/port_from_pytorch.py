"""
Migrate a training from PyTorch
===============================

A network is trained in PyTorch for 100 steps and saved. JAX continues from the file,
weights and optimizer state, and takes the steps that PyTorch would have taken.
"""

# %%
# In PyTorch
# ----------
#
# An ordinary training, with the settings that go along to JAX, name for name.

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import sklearn.datasets
import torch

from jax_rmsprop import conventions, migrate

SETTINGS = {"lr": 1e-3, "alpha": 0.9, "momentum": 0.9, "weight_decay": 1e-4}
x, y = sklearn.datasets.load_digits(return_X_y=True)
x = np.asarray(x / 16, "float32")
random = np.random.default_rng(0)
# The rows of 200 batches of 150: PyTorch and JAX must see the same, in one order.
rows = np.concatenate([random.permutation(1500).reshape(10, 150) for _ in range(20)])

torch.manual_seed(0)
model = torch.nn.Sequential(
    torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10)
)
torch_optimizer = torch.optim.RMSprop(model.parameters(), **SETTINGS)


def train_in_pytorch(rows):
    """Train on each batch; the losses, and the weights after each step."""
    losses, weights = [], []
    for batch in rows:
        torch_optimizer.zero_grad()
        outputs = model(torch.tensor(x[batch]))
        loss = torch.nn.functional.cross_entropy(outputs, torch.tensor(y[batch]))
        loss.backward()
        torch_optimizer.step()
        losses.append(loss.item())
        # Copied, since PyTorch changes them in place.
        weights.append({n: w.numpy().copy() for n, w in model.state_dict().items()})
    return losses, weights


before, _ = train_in_pytorch(rows[:100])
torch.save(
    {"model": model.state_dict(), "optimizer": torch_optimizer.state_dict()},
    "checkpoint.pt",
)
in_torch, torch_weights = train_in_pytorch(rows[100:])

# %%
# The move
# --------
#
# ``layout`` says which of PyTorch's arrays is which of ours. A PyTorch weight is
# [out, in], ours are [in, out], hence ``.T``. The same function serves the weights and
# the optimizer's state, and the settings are read from the checkpoint.


def layout(tree):
    """Our arrays under PyTorch's names and in its shapes."""
    return {
        "0.weight": tree["w1"].T,
        "0.bias": tree["b1"],
        "2.weight": tree["w2"].T,
        "2.bias": tree["b2"],
    }


shapes = {
    "w1": jnp.zeros((64, 32)),
    "b1": jnp.zeros(32),
    "w2": jnp.zeros((32, 10)),
    "b2": jnp.zeros(10),
}
checkpoint = torch.load("checkpoint.pt", weights_only=True)
params = migrate.from_named(checkpoint["model"], shapes, layout=layout)
state = migrate.from_torch(checkpoint["optimizer"], params, layout=layout)
optimizer = conventions.pytorch(**migrate.settings(checkpoint["optimizer"]))

# %%
# In JAX
# ------


@jax.jit
def step(params, state, x, y):
    """The new parameters and state, and the loss."""

    def loss(p):
        logits = jax.nn.relu(x @ p["w1"] + p["b1"]) @ p["w2"] + p["b2"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    value, gradient = jax.value_and_grad(loss)(params)
    updates, state = optimizer.update(gradient, state, params)
    return optax.apply_updates(params, updates), state, value


def train_in_jax(params, state, rows):
    """Train on each batch; the losses, and the weights under PyTorch's names."""
    losses, weights = [], []
    for batch in rows:
        params, state, loss = step(params, state, x[batch], y[batch])
        losses.append(float(loss))
        weights.append({n: np.asarray(w) for n, w in layout(params).items()})
    return losses, weights


in_jax, jax_weights = train_in_jax(params, state, rows[100:])
# For comparison: the weights alone, with a new optimizer state.
fresh, fresh_weights = train_in_jax(params, optimizer.init(params), rows[100:])

# %%
# Did it work?
# ------------


def apart(weights):
    """The largest difference of any parameter from PyTorch's, after each step."""
    pairs = zip(weights, torch_weights, strict=True)
    return [max(np.abs(a[n] - b[n]).max() for n in a) for a, b in pairs]


print("mean loss of the last 20 of 200 steps, in nats")
print(f"  PyTorch                        {np.mean(in_torch[-20:]):.6f}")
print(f"  JAX, from PyTorch's state      {np.mean(in_jax[-20:]):.6f}")
print(f"  JAX, with a new state          {np.mean(fresh[-20:]):.6f}")
print("largest difference of any parameter from PyTorch's")
print(f"  JAX, from PyTorch's state      {max(apart(jax_weights)):.1e}")
print(f"  JAX, with a new state          {max(apart(fresh_weights)):.1e}")

# %%
# With the state, JAX follows PyTorch within rounding, which grows slowly. With the
# weights alone it takes huge first steps, because the average starts at 0 again.

figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
steps, saved = np.arange(200), {"color": "black", "linestyle": ":"}
left.plot(steps, before + in_torch, color="0.6", linewidth=4, label="PyTorch")
left.plot(steps[100:], in_jax, label="JAX, from PyTorch's state")
left.axvline(100, label="saved", **saved)
left.set(
    xlabel="step",
    ylabel="loss (nats per example)",
    yscale="log",
    title="The loss continues as it would have",
)
left.legend()
after = steps[100:] + 1
right.plot(after, apart(fresh_weights), "--", color="C1", label="with a new state")
right.plot(after, apart(jax_weights), color="C0", label="from PyTorch's state")
right.set(
    xlabel="step",
    ylabel="largest difference of a parameter",
    yscale="log",
    title="How far JAX is from PyTorch",
)
right.legend()
plt.show()

# %%
# If your numbers differ, go through :doc:`the checklist </how-to/same_numbers>`:
# layouts, clipping, schedules, groups, precision.
