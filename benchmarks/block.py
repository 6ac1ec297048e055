"""A transformer block: its arrays, its loss, and the time of its training step."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.timing import medians, on_cpu, table
from benchmarks.update import carried
from jax_rmsprop import rmsprop
from jax_rmsprop.quantization import bfloat16, int8, quantize_state, uint8

MAKES = {
    "optax.rmsprop": lambda: optax.rmsprop(1e-3),
    "optax.adamw": lambda: optax.adamw(1e-3),
    "full": lambda: rmsprop(1e-3),
    "bfloat16": lambda: quantize_state(rmsprop(1e-3), {"nu": bfloat16()}),
    "uint8": lambda: quantize_state(rmsprop(1e-3), {"nu": uint8()}),
    "momentum, uint8 and int8": lambda: quantize_state(
        rmsprop(1e-3, momentum=0.9), {"nu": uint8(), "momentum": int8()}
    ),
}


def shapes(width):
    """The shapes of a block's arrays, by name."""
    return {
        "attention": (width, 3 * width),
        "output": (width, width),
        "up": (width, 4 * width),
        "down": (4 * width, width),
        "scale": (width,),
        "bias": (width,),
    }


def loss(params, x, heads):
    """The mean square of a block's output for x, (batch, time, width) in bfloat16.

    It scales instead of normalizing, which would take most of the compile time.
    """
    p = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)

    def split(x):
        return x.reshape(*x.shape[:2], heads, -1)

    y = x * p["scale"] + p["bias"]
    q, k, v = map(split, jnp.split(y @ p["attention"], 3, axis=-1))
    attended = jax.nn.dot_product_attention(q, k, v, is_causal=True)
    x += attended.reshape(x.shape) @ p["output"]
    x += jax.nn.gelu(x @ p["up"]) @ p["down"]
    return (x.astype(jnp.float32) ** 2).mean()


def training_step(optimizer, heads):
    """(params, state, x) -> (params, state)."""

    def step(params, state, x):
        gradients = jax.grad(loss)(params, x, heads)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    return step


def block(rounds=20):
    """A training step of one block: 201 million parameters, or on a CPU 0.8 million."""
    width, heads, x_shape = (256, 4, (2, 128)) if on_cpu() else (4096, 32, (4, 2048))
    rng = np.random.default_rng(0)

    def fresh(shape, dtype=jnp.float32):
        return jnp.asarray(0.02 * rng.standard_normal(shape, "float32"), dtype)

    def params():
        return {name: fresh(shape) for name, shape in shapes(width).items()}

    x = fresh((*x_shape, width), jnp.bfloat16)
    gradients, kept = jax.jit(partial(jax.grad(loss), heads=heads)), params()
    calls = {"gradients alone": lambda: gradients(kept, x)}
    for name, make in MAKES.items():
        optimizer, start = make(), params()
        step = jax.jit(training_step(optimizer, heads), donate_argnums=(0, 1))
        calls[name] = carried(
            lambda c, step=step: step(*c, x), (start, optimizer.init(start))
        )
    seconds = medians(calls, rounds)
    size = sum(p.size for p in kept.values())
    rows = [
        (
            f"time with {name} / with `optax.rmsprop`",
            f"{seconds[name] / seconds['optax.rmsprop']:.3f}",
            "",
        )
        for name in calls
        if name != "optax.rmsprop"
    ]
    rows.append(("milliseconds with it", f"{1e3 * seconds['optax.rmsprop']:.2f}", ""))
    return table(f"A training step of a transformer's block, {size:,} parameters", rows)
