"""
What tests and benchmarks take from the examples
================================================

Real data, the network that they train, and how their pictures look. No tutorial needs
this file.
"""

import gzip
import math
import os
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import pooch
import sklearn.datasets

# Okabe and Ito's colours, which the colour-blind tell apart.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
plt.rcParams.update(
    {
        "axes.prop_cycle": plt.cycler(color=COLOURS),
        "axes.grid": True,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "figure.constrained_layout.use": True,
        "font.size": 11,
        "grid.alpha": 0.3,
        "legend.frameon": False,
        "savefig.dpi": 120,
    }
)


class Data(NamedTuple):
    """Examples in rows: float features, and labels (a float each, or a class)."""

    x: jax.Array
    y: jax.Array


def airfoil():
    """NASA's airfoil self-noise: 5 standardised features, 1 standardised sound level.

    As in the textbook: every column is standardised over all 1503 rows, and the first
    1500 are used. Brooks, Pope and Marcolini; UCI dataset 291, CC BY 4.0.
    """
    name, sha1 = "airfoil_self_noise.dat", "76e5be1548fd8222e5074cf0faae75edff8cf93f"
    table = np.genfromtxt(
        _fetch("http://d2l-data.s3-accelerate.amazonaws.com/", name, f"sha1:{sha1}")
    )
    table = ((table - table.mean(0)) / table.std(0))[:1500].astype("float32")
    return Data(jnp.asarray(table[:, :-1]), jnp.asarray(table[:, -1]))


def digits():
    """Handwritten digits, 8 x 8 pixels, bundled with scikit-learn: train and test."""
    x, y = sklearn.datasets.load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))
    x, y = jnp.asarray(x[order] / 16, "float32"), jnp.asarray(y[order], "int32")
    return Data(x[:1500], y[:1500]), Data(x[1500:], y[1500:])


def fashion_mnist():
    """Zalando's Fashion-MNIST, 28 x 28 pixels: 60,000 to train, 10,000 to test."""
    url = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"

    def read(name, md5, header):
        with gzip.open(_fetch(url, name, f"md5:{md5}")) as file:
            return np.frombuffer(file.read(), np.uint8, offset=header)

    def part(name, images, labels):
        x = read(f"{name}-images-idx3-ubyte.gz", images, 16).reshape(-1, 784)
        y = read(f"{name}-labels-idx1-ubyte.gz", labels, 8)
        return Data(jnp.asarray(x / 255, "float32"), jnp.asarray(y, "int32"))

    return (
        part(
            "train",
            "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
            "25c81989df183df01b3e8a0aad5dffbe",
        ),
        part(
            "t10k",
            "bef4ecab320f06d8554ea6380940ec79",
            "bb300cfdad3c16e7a12a480ee83cd310",
        ),
    )


def _fetch(url, name, known_hash):
    """The path of a file in $JAX_RMSPROP_DATA, or downloaded once and checked."""
    folder = os.environ.get("JAX_RMSPROP_DATA")
    if folder:
        path = Path(folder) / name
        if path.exists():
            return path
        reason = f"JAX_RMSPROP_DATA is {folder}, which has no such file"
    else:
        try:
            return pooch.retrieve(
                url + name, known_hash, name, pooch.os_cache("jax_rmsprop")
            )
        except (OSError, ValueError) as error:
            reason = f"the download failed ({type(error).__name__})"
    raise SystemExit(
        f"{name} is missing: {reason}. Either connect to the internet, for "
        f"{url}{name}, or put the file in a folder and set JAX_RMSPROP_DATA to that "
        "folder."
    )


def batches(key, data, size):
    """All examples once, in random order: arrays with a leading axis of batches."""
    n = len(data.x) // size
    order = jax.random.permutation(key, len(data.x))[: n * size].reshape(n, size)
    return Data(data.x[order], data.y[order])


def matrix(key, *shape):
    """Normal random numbers, drawn in a row.

    The same as `jax.random.normal(key, shape)`, but in a sweep's program two of those
    take XLA a second to compile, and two of these a quarter.
    """
    return jax.random.normal(key, (math.prod(shape),)).reshape(shape)


def network(key, inputs, hidden=32, outputs=10):
    """The parameters of a network with one hidden layer."""
    first, second = jax.random.split(key)
    return {
        "w1": matrix(first, inputs, hidden) * (2 / inputs) ** 0.5,
        "b1": jnp.zeros(hidden),
        "w2": matrix(second, hidden, outputs) * (1 / hidden) ** 0.5,
        "b2": jnp.zeros(outputs),
    }


def cross_entropy(p, data):
    """The network's mean loss, in nats per example."""
    return optax.softmax_cross_entropy_with_integer_labels(
        logits(p, data.x), data.y
    ).mean()


def logits(p, x):
    """The network's outputs."""
    return jax.nn.relu(x @ p["w1"] + p["b1"]) @ p["w2"] + p["b2"]


def linear(key, inputs):
    """The parameters of a linear regression, as the textbook starts it."""
    return {"w": 0.01 * jax.random.normal(key, (inputs,)), "b": jnp.zeros(())}


def squared_loss(p, data):
    """The textbook's loss: half the mean squared error."""
    return ((data.x @ p["w"] + p["b"] - data.y) ** 2).mean() / 2


def train_step(loss, optimizer):
    """A step of training, for `jax.lax.scan` over batches; it returns the loss."""

    def step(carry, batch):
        params, state = carry
        value, gradient = jax.value_and_grad(loss)(params, batch)
        updates, state = optimizer.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), value

    return step


# The textbook's training: 2 epochs in batches of 10, the loss recorded after every 10.
EPOCHS, BATCH, RECORD = 2, 10, 10


def regression(seed, data, optimizer, epochs=EPOCHS):
    """A linear regression: its loss at the start and after every `RECORD` batches."""
    start, *keys = jax.random.split(jax.random.key(seed), 1 + epochs)
    params = linear(start, data.x.shape[1])
    step = train_step(squared_loss, optimizer)

    def record(carry, few):
        carry, _ = jax.lax.scan(step, carry, few)
        return carry, squared_loss(carry[0], data)

    def epoch(carry, key):
        groups = jax.tree.map(
            lambda x: x.reshape(-1, RECORD, *x.shape[1:]), batches(key, data, BATCH)
        )
        return jax.lax.scan(record, carry, groups)

    carry = params, optimizer.init(params)
    _, losses = jax.lax.scan(epoch, carry, jnp.stack(keys))
    return jnp.concatenate([squared_loss(params, data)[None], losses.ravel()])
