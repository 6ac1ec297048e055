"""
Leave PyTorch in the middle of a training
=========================================

Leave a training in PyTorch after 100 steps, and go on in JAX as if nothing happened.

A small network on handwritten digits is trained in PyTorch and saved, parameters and
optimizer. PyTorch goes on for 100 steps, and JAX goes on from the file with the same.
"""

import tempfile
from pathlib import Path

import jax
import matplotlib.pyplot as plt
import numpy as np
from common import arguments, batches, cross_entropy, digits, network, save, train_step

from jax_rmsprop import conventions, migrate

try:
    import torch
except ImportError:
    torch = None

STEPS = 100
# As in PyTorch, name for name.
SETTINGS = {"lr": 1e-3, "alpha": 0.9, "momentum": 0.9, "weight_decay": 1e-4}


def layout(tree):
    """Which of PyTorch's arrays is which of ours; its weights are [out, in]."""
    return {
        "0.weight": tree["w1"].T,
        "0.bias": tree["b1"],
        "2.weight": tree["w2"].T,
        "2.bias": tree["b2"],
    }


def train_in_pytorch(model, optimizer, data):
    """Train on each batch once; the loss before each step, and the weights after it."""
    losses, weights = [], []
    for x, y in zip(*(torch.tensor(np.asarray(a)) for a in data), strict=True):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(x), y.long())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        # Copied, since PyTorch changes them in place.
        weights.append({n: x.numpy().copy() for n, x in model.state_dict().items()})
    return losses, weights


def train_in_jax(params, state, optimizer, data):
    """The same."""
    step = jax.jit(train_step(cross_entropy, optimizer))
    losses, weights = [], []
    for i in range(len(data.x)):
        batch = jax.tree.map(lambda a: a[i], data)  # noqa: B023
        (params, state), loss = step((params, state), batch)
        losses.append(float(loss))
        weights.append({n: np.asarray(x) for n, x in layout(params).items()})
    return losses, weights


def main():
    """Train, save, go on in both, and compare."""
    options = arguments(__doc__, "port_from_pytorch.png").parse_args()
    if torch is None:
        raise SystemExit(
            "This example trains in PyTorch, which is not installed. Its build for "
            "CPUs will do: see https://pytorch.org, or run `pip install torch`."
        )
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10)
    )
    torch_optimizer = torch.optim.RMSprop(model.parameters(), **SETTINGS)
    train, _ = digits()
    epochs = [batches(jax.random.key(i), train, 150) for i in range(20)]
    first, second = (
        jax.tree.map(lambda *a: np.concatenate(a), *half)
        for half in (epochs[:10], epochs[10:])
    )
    before, _ = train_in_pytorch(model, torch_optimizer, first)

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint.pt"
        torch.save(
            {"model": model.state_dict(), "optimizer": torch_optimizer.state_dict()},
            path,
        )
        checkpoint = torch.load(path, weights_only=True)
    in_torch, torch_weights = train_in_pytorch(model, torch_optimizer, second)

    params = network(jax.random.key(0), 64)  # for its shapes
    params = migrate.from_named(checkpoint["model"], params, layout=layout)
    state = migrate.from_torch(checkpoint["optimizer"], params, layout=layout)
    optimizer = conventions.pytorch(**SETTINGS)
    in_jax, jax_weights = train_in_jax(params, state, optimizer, second)

    # The same without the state: what loading the weights alone would have given.
    fresh, fresh_weights = train_in_jax(
        params, optimizer.init(params), optimizer, second
    )

    def apart(weights):
        pairs = zip(weights, torch_weights, strict=True)
        return [max(np.abs(a[n] - b[n]).max() for n in a) for a, b in pairs]

    print("mean loss of the last 20 of 200 steps, in nats")
    print(f"  PyTorch                        {np.mean(in_torch[-20:]):.6f}")
    print(f"  JAX, from PyTorch's state      {np.mean(in_jax[-20:]):.6f}")
    print(f"  JAX, with a new state          {np.mean(fresh[-20:]):.6f}")
    print("largest difference of any parameter from PyTorch's")
    print(f"  JAX, from PyTorch's state      {max(apart(jax_weights)):.1e}")
    print(f"  JAX, with a new state          {max(apart(fresh_weights)):.1e}")

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
    steps, saved = np.arange(2 * STEPS), {"color": "black", "linestyle": ":"}
    left.plot(steps, before + in_torch, color="0.6", linewidth=4, label="PyTorch")
    left.plot(steps[STEPS:], in_jax, label="JAX, from PyTorch's state")
    left.axvline(STEPS, label="saved", **saved)
    left.set(
        xlabel="step",
        ylabel="loss (nats per example)",
        yscale="log",
        title="The loss goes on as it would have",
    )
    left.legend()
    after = steps[STEPS:] + 1
    right.plot(after, apart(fresh_weights), "--", color="C1", label="with a new state")
    right.plot(after, apart(jax_weights), color="C0", label="from PyTorch's state")
    right.set(
        xlabel="step",
        ylabel="largest difference of a parameter",
        yscale="log",
        title="How far JAX is from PyTorch",
    )
    right.legend()
    save(figure, options.output)


if __name__ == "__main__":
    main()
