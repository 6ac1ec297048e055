"""Errors of six codes for an average of squares, on the same gradients.

All but FlashOptim's round by the same dither, so they differ in the code alone.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.timing import table
from jax_rmsprop.quantization import bfloat16, dither, dither_starts, uint8

ELEMENTS, BLOCK = 65_536, 256


class Scheme(NamedTuple):
    """A code: `encode(x, noise, before)` returns what to store, `decode` inverts it."""

    encode: object
    decode: object


def of_codec(codec):
    """A codec as a scheme: it stores the codes and their base."""

    def encode(x, noise, kept):
        base = jnp.int32(codec.first_base)
        if kept is not None and codec.next_base is not None:
            base = codec.next_base(kept[0].max().astype(jnp.int32), kept[1])
        return codec.encode(x, noise, base), base

    return Scheme(encode, lambda kept: codec.decode(*kept))


def _uniform(noise):
    return (noise >> 8).astype(jnp.float32) * jnp.float32(2**-24)


def _in_blocks(scaled, unscaled, size=BLOCK):
    """A code of x divided by the largest element of its block."""

    def encode(x, noise, kept):
        del kept
        blocks = x.reshape(-1, size)
        largest = jnp.maximum(blocks.max(1, keepdims=True), 1e-38)
        codes = scaled(blocks / largest, _uniform(noise).reshape(-1, size))
        return codes.astype(jnp.uint8), largest

    def decode(kept):
        codes, largest = kept
        return (unscaled(codes) * largest).reshape(-1)

    return Scheme(encode, decode)


def square_root():
    """255 equal steps of the root."""
    return _in_blocks(
        lambda y, u: jnp.clip(jnp.floor(255 * jnp.sqrt(y) + u), 1, 255),
        lambda codes: (codes.astype(jnp.float32) / 255) ** 2,
    )


def flash_optim():
    """FlashOptim's: 255 equal steps of the root, in groups of 32, to nearest."""
    return _in_blocks(
        lambda y, u: jnp.round(255 * jnp.sqrt(y)),
        lambda codes: (codes.astype(jnp.float32) / 255) ** 2,
        size=32,
    )


def dynamic_map():
    """The map of bitsandbytes, seven decades, all codes for positive numbers.

    Each decade has twice as many numbers, evenly spaced, as the one below it.
    """
    decades = [
        10.0 ** (i - 6) * (edges[:-1] + edges[1:]) / 2
        for i, edges in enumerate(
            np.linspace(0.1, 1, 2 ** (i + 1) + 1) for i in range(7)
        )
    ]
    numbers = jnp.asarray(np.sort(np.concatenate([*decades, [0.0, 1.0]]))[-256:])
    numbers = numbers.astype(jnp.float32)

    def scaled(y, u):
        below = jnp.clip(jnp.searchsorted(numbers, y, side="right") - 1, 0, 254)
        low, high = numbers[below], numbers[below + 1]
        return jnp.maximum(below + (y - low > u * (high - low)), 1)

    return _in_blocks(scaled, lambda codes: numbers[codes.astype(jnp.int32)])


def logarithm(decades=9.6):
    """255 equal steps of the logarithm, below the leaf's largest, without blocks."""
    step = np.float32(decades * np.log(10) / 255)

    def value(k, largest):
        return largest * jnp.exp((k - 255) * step)

    def encode(x, noise, kept):
        del kept
        largest = jnp.maximum(x.max(), 1e-38)
        y = jnp.maximum(x, 1e-38)
        k = jnp.floor(jnp.log(y / largest) / step + 255)
        low, high = value(k, largest), value(k + 1, largest)
        k += x - low > _uniform(noise) * (high - low)
        return jnp.clip(k, 0, 255).astype(jnp.uint8), largest

    return Scheme(encode, lambda kept: value(kept[0].astype(jnp.float32), kept[1]))


SCHEMES = {
    "`bfloat16`": lambda: of_codec(bfloat16()),
    "`uint8`: 5 bits of exponent, 3 of mantissa, a window that moves": lambda: of_codec(
        uint8()
    ),
    "255 steps of the logarithm over 9.6 decades": logarithm,
    "bitsandbytes' dynamic map, unsigned, in blocks of 256": dynamic_map,
    "255 steps of the root, in blocks of 256": square_root,
    "FlashOptim's: the same in groups of 32, to the nearest": flash_optim,
}


@partial(jax.jit, static_argnames=("scheme", "steps"))
def _error(scheme, gamma, steps=3000):
    """The mean error and the mean bias of nu, relative to itself."""
    rms = 10 ** jax.random.uniform(jax.random.key(0), (ELEMENTS,), minval=-3, maxval=0)

    def encoded(nu, t, kept):
        noise = dither(nu.shape, dither_starts(1, t, 0)[0], t)
        return scheme.encode(nu, noise, kept)

    def step(carry, t):
        kept, exact = carry
        key = jax.random.fold_in(jax.random.key(1), t)
        square = (rms * jax.random.normal(key, (ELEMENTS,))) ** 2
        nu = scheme.decode(kept)
        kept = encoded(nu + (1 - gamma) * (square - nu), t + 1, kept)
        return (kept, exact + (1 - gamma) * (square - exact)), None

    zero = jnp.zeros(ELEMENTS)
    carry = step((encoded(zero, 0, None), zero), 0)[0]
    (kept, exact), _ = jax.lax.scan(step, carry, jnp.arange(1, steps))
    relative = scheme.decode(kept) / exact - 1
    return jnp.abs(relative).mean(), relative.mean()


def schemes():
    """Noisy gradients, rms over three decades in the leaf, 3,000 steps."""
    rows = []
    for name, make in SCHEMES.items():
        scheme = make()
        cells = []
        for gamma in (0.9, 0.99, 0.999):
            error, bias = _error(scheme, gamma)
            cells.append(f"{error:.4f} ({bias:+.4f})")
        rows.append((name, ", ".join(cells), ""))
    title = "Error (and bias) of nu, relative to itself, at gamma 0.9, 0.99, 0.999"
    return table(title, rows)
