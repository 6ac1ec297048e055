"""The textbook's training compared to the textbook's own PyTorch loop."""

import sys
from pathlib import Path

import jax
import numpy as np

from benchmarks.timing import medians, table
from jax_rmsprop import rmsprop

# The examples are scripts, not a package.
sys.path.append(str(Path(__file__).parents[1] / "examples"))
from common import BATCH, EPOCHS, RECORD, airfoil, regression  # noqa: E402

try:
    import torch
except ImportError:
    torch = None


def torch_loop(data, epochs=EPOCHS):
    """Linear regression as the textbook writes it: DataLoader, batch 10, RMSprop."""
    x, y = torch.tensor(np.asarray(data.x)), torch.tensor(np.asarray(data.y))[:, None]
    net = torch.nn.Sequential(torch.nn.Linear(x.shape[1], 1))
    loss = torch.nn.MSELoss()
    optimizer = torch.optim.RMSprop(net.parameters(), lr=0.01, alpha=0.9)
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(x, y), BATCH, shuffle=True
    )

    def evaluate():
        return loss(net(x), y).item() / 2

    losses = [evaluate()]
    for _ in range(epochs):
        for i, (features, labels) in enumerate(loader):
            value = loss(net(features), labels) / 2
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            if (i + 1) % RECORD == 0:
                losses.append(evaluate())
    return losses


def training(members=512):
    """Seconds per epoch, of one training and of 512 gammas side by side."""
    data = airfoil()
    alone = jax.jit(lambda seed: regression(seed, data, rmsprop(0.01, 0.9)))
    gammas = np.linspace(0.5, 0.999, members, dtype="float32")
    together = jax.jit(
        jax.vmap(lambda gamma: regression(0, data, rmsprop(0.01, gamma)))
    )
    ours = {"alone": lambda: alone(0), "together": lambda: together(gammas)}
    if torch is None:
        seconds = medians(ours, rounds=20)
        ratios = ["PyTorch is not installed"] * 2
        last = None
    else:
        seconds = medians(ours | {"torch": lambda: torch_loop(data)}, rounds=10)
        ratios = [
            f"{seconds['torch'] / seconds['alone']:.0f}",
            f"{seconds['torch'] * members / seconds['together']:.0f}",
        ]
        last = torch_loop(data)[-1]
    rows = [
        ("times faster than the textbook's loop in PyTorch", ratios[0], ">= 50"),
        (f"the same per member, {members} gammas at once", ratios[1], ">= 1,500"),
        ("seconds per epoch", f"{seconds['alone'] / EPOCHS:.6f}", ""),
        (
            "last loss",
            f"{float(alone(0)[-1]):.4f}",
            "PyTorch: " + (f"{last:.4f}" if last else "not installed"),
        ),
    ]
    return table("The textbook's training on airfoil noise, seconds per epoch", rows)
