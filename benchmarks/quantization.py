"""State in fewer bits: the time of a step, and the bytes that it moves."""

import warnings
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.timing import medians, table
from benchmarks.update import carried
from jax_rmsprop import rmsprop
from jax_rmsprop.quantization import (
    bfloat16,
    dither,
    dither_starts,
    quantize_state,
    uint8,
)

try:
    import bitsandbytes
    import torch
except ImportError:
    bitsandbytes = None

# Read gradient, parameter and state, write parameter and state.
BYTES = {"full": 20, "bfloat16": 16, "uint8": 14}


@partial(jax.jit, donate_argnums=(0, 1))
def _by_hand(params, kept, count, gradient):
    """What `quantize_state(rmsprop(1e-3), {"nu": uint8()})` does, as one function."""
    codec, g, (codes, base) = uint8(), gradient, kept
    noise = dither(g.shape, dither_starts(1, count, 0)[0], count)
    nu = codec.decode(codes, base)
    nu = nu + jnp.float32(0.1) * (g * g - nu)
    params = params - jnp.float32(1e-3) * g / jnp.sqrt(nu + jnp.float32(1e-6))
    base = codec.next_base(codes.max().astype(jnp.int32), base)
    return params, (codec.encode(nu, noise, base), base), count + 1


def quantization(size=2**24, rounds=40):
    """Update and apply, jitted with donation, one array of 16M float32 numbers."""
    rng = np.random.default_rng(0)
    fresh = lambda: jnp.asarray(rng.standard_normal(size, "float32"))  # noqa: E731
    gradient = fresh()
    makes = {
        "full": rmsprop(1e-3),
        "bfloat16": quantize_state(rmsprop(1e-3), {"nu": bfloat16()}),
        "uint8": quantize_state(rmsprop(1e-3), {"nu": uint8()}),
        "optax": optax.rmsprop(1e-3),
    }
    calls, moved = {}, {}
    for name, optimizer in makes.items():

        @partial(jax.jit, donate_argnums=(0, 1))
        def step(params, state, gradient, optimizer=optimizer):
            updates, state = optimizer.update(gradient, state, params)
            return optax.apply_updates(params, updates), state

        carry = fresh(), optimizer.init(gradient)
        cost = step.lower(*carry, gradient).compile().cost_analysis()
        moved[name] = cost.get("bytes accessed", float("nan")) / size
        calls[name] = carried(lambda c, step=step: step(*c, gradient), carry)
    nothing = jnp.zeros(size, jnp.uint8), jnp.int32(uint8().first_base)
    calls["by hand"] = carried(
        lambda c: _by_hand(*c, gradient), (fresh(), nothing, jnp.int32(0))
    )
    # Eight bytes a number: read it, write it.
    calls["copy"] = carried(
        jax.jit(lambda x: x * jnp.float32(0.999), donate_argnums=0), fresh()
    )
    if bitsandbytes is not None and jax.default_backend() == "cpu":
        weights = torch.randn(size)
        weights.grad = torch.randn(size)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            calls["bnb"] = bitsandbytes.optim.RMSprop8bit([weights], lr=1e-3).step
    seconds = medians(calls, rounds)

    def ratio(name, other):
        if other not in seconds:
            return "bitsandbytes is not measured"
        return f"{seconds[name] / seconds[other]:.3f}"

    rows = [
        ("time of bfloat16 / full precision's", ratio("bfloat16", "full"), "<= 2"),
        ("time of uint8 / full precision's", ratio("uint8", "full"), "<= 2.5"),
        ("time of uint8 / `optax.rmsprop`'s", ratio("uint8", "optax"), "<= 1 on a GPU"),
        (
            "time of uint8 / that of the same written by hand as one function",
            ratio("uint8", "by hand"),
            "1: nothing is lost by wrapping",
        ),
        (
            "time of uint8 / `bitsandbytes.optim.RMSprop8bit`'s on the CPU",
            ratio("uint8", "bnb"),
            "",
        ),
    ]
    bandwidth = 8 * size / seconds["copy"]
    for name, must in BYTES.items():
        share = must * size / seconds[name] / bandwidth
        rows.append(
            (
                f"{name}: bandwidth for the {must} bytes a parameter that it must move "
                "/ that of scaling in place",
                f"{share:.2f}",
                "",
            )
        )
        rows.append(
            (
                f"{name}: bytes a parameter that the program moves, as compiled",
                f"{moved[name]:.0f}",
                f"<= {1.3 * must:.0f} on a GPU",
            )
        )
    return table(f"The average in fewer bits, {size:,} float32 parameters", rows)
