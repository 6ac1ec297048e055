"""A small training to sweep, and a process that sweeps it, to be killed and the like.

`python -m tests.sweeps STORE [name=value ...]` prints one line with the bits of the
results; the names are those of `run`.
"""

import hashlib
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.ad_checkpoint import checkpoint_name

from jax_rmsprop import log_one_minus, rmsprop, sweep

DATA = np.random.default_rng(0).standard_normal((20, 5)).astype("float32")
GRID = {
    "gamma": log_one_minus(0.5, 0.999, 5),
    "learning_rate": [0.01, 0.001, 1e30],
    "seed": range(4),
}


def network(gamma, learning_rate, seed, centered=False, steps=15):
    """A network of one hidden layer; at the last learning rate it diverges."""
    optimizer = rmsprop(learning_rate, gamma, centered=centered)
    first, second = jax.random.split(jax.random.key(seed))
    params = {
        "w": jax.random.normal(first, (5, 8)),
        "v": jax.random.normal(second, (8,)),
    }

    def loss(p):
        return ((jnp.tanh(DATA @ p["w"]) @ p["v"] - DATA[:, 0]) ** 2).mean()

    def step(carry, _):
        params, state = carry
        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradient, state)
        return (optax.apply_updates(params, updates), state), value

    (params, _), losses = jax.lax.scan(
        step, (params, optimizer.init(params)), length=steps
    )
    return {"loss": losses, "end": {"v": params["v"], "seed": jnp.asarray(seed)}}


def long(gamma, seed):
    """The same with many steps, so that a process can be killed while it runs."""
    return network(gamma, 0.01, seed, steps=3000)


LONG = {"gamma": log_one_minus(0.9, 0.999, 20), "seed": range(10)}


def named_residuals(gamma, learning_rate, seed):
    """A jaxpr that prints a set, in the order of the process' hashes."""
    policy = jax.checkpoint_policies.save_only_these_names("a", "bc", "def", "ghij")

    def loss(x):
        return jnp.sin(checkpoint_name(jnp.sin(x), "bc")).sum()

    x = gamma * learning_rate * jnp.ones(3) + seed
    return {"loss": jax.grad(jax.checkpoint(loss, policy=policy))(x)}


def called_back(gamma, learning_rate, seed):
    """A program that calls Python, at an address of its process."""
    jax.debug.print("{x}", x=gamma)
    shape = jax.ShapeDtypeStruct((), jnp.float32)
    return {"loss": jax.pure_callback(lambda x: x, shape, gamma * learning_rate) + seed}


def bits(curves):
    """What tells any two results apart, down to the last bit."""
    digest = hashlib.sha256()
    for name in sorted(curves.variables):
        values = np.ascontiguousarray(curves[name].values)
        digest.update(f"{name} {curves[name].dims} {values.dtype}".encode())
        digest.update(str(values).encode() if values.dtype.kind == "U" else values)
    return digest.hexdigest()


def run(store, devices=1, processes=1, process=0, port=0, batch_size=4, what="long"):
    """Sweep in this process, which may be one of several."""
    jax.config.update("jax_num_cpu_devices", devices)
    if processes > 1:
        jax.distributed.initialize(f"127.0.0.1:{port}", processes, process)
    train, grid = {"long": (long, LONG), "network": (network, GRID)}[what]
    curves = sweep(
        train, grid, store=store or None, batch_size=batch_size, progress=False
    )
    print(
        json.dumps({"bits": bits(curves), "finished": int(curves.finished.sum())}),
        flush=True,
    )


if __name__ == "__main__":
    named = dict(word.split("=") for word in sys.argv[2:])
    run(
        sys.argv[1],
        **{k: int(v) if v.isdigit() else v for k, v in named.items()},
    )
