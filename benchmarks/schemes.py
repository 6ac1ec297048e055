"""Which code for an average of squares: the errors of four, on the same gradients.

Each is a `Codec` with the same dither, so they differ in the code alone.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.timing import table
from jax_rmsprop.quantization import Codec, Quantized, bfloat16, dither, uint8

ELEMENTS, BLOCK = 65_536, 256


def _uniform(noise):
    return (noise >> 8).astype(jnp.float32) * jnp.float32(2**-24)


def _in_blocks(scaled, unscaled):
    """A code of what is left of x when its block's largest is divided out."""

    def encode(x, noise, previous):
        del previous
        blocks = x.reshape(-1, BLOCK)
        largest = jnp.maximum(blocks.max(1, keepdims=True), 1e-38)
        codes = scaled(blocks / largest, _uniform(noise).reshape(-1, BLOCK))
        return Quantized(codes.astype(jnp.uint8).reshape(x.shape), largest)

    def decode(x):
        codes = x.codes
        blocks = unscaled(codes.reshape(-1, BLOCK)) * x.base
        return blocks.reshape(codes.shape)

    return Codec(encode, decode)


def square_root():
    """255 equal steps of the root."""
    return _in_blocks(
        lambda y, u: jnp.clip(jnp.floor(255 * jnp.sqrt(y) + u), 1, 255),
        lambda codes: (codes.astype(jnp.float32) / 255) ** 2,
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

    def encode(x, noise, previous):
        del previous
        largest = jnp.maximum(x.max(), 1e-38)
        y = jnp.maximum(x, 1e-38)
        k = jnp.floor(jnp.log(y / largest) / step + 255)
        low, high = value(k, largest), value(k + 1, largest)
        k += x - low > _uniform(noise) * (high - low)
        return Quantized(jnp.clip(k, 0, 255).astype(jnp.uint8), largest)

    return Codec(encode, lambda x: value(x.codes.astype(jnp.float32), x.base))


SCHEMES = {
    "`bfloat16`": bfloat16,
    "`uint8`: 5 bits of exponent, 3 of mantissa, a window that moves": uint8,
    "255 steps of the logarithm over 9.6 decades": logarithm,
    "bitsandbytes' dynamic map, unsigned, in blocks of 256": dynamic_map,
    "255 steps of the root, in blocks of 256": square_root,
}


@partial(jax.jit, static_argnames=("codec", "steps"))
def _error(codec, gamma, steps=3000):
    """The mean error and the mean bias of nu, relative to itself."""
    rms = 10 ** jax.random.uniform(jax.random.key(0), (ELEMENTS,), minval=-3, maxval=0)

    def encoded(nu, t, codes):
        return codec.encode(nu, dither(nu.shape, 0, t, 0), codes)

    def step(carry, t):
        codes, exact = carry
        key = jax.random.fold_in(jax.random.key(1), t)
        square = (rms * jax.random.normal(key, (ELEMENTS,))) ** 2
        nu = codec.decode(codes)
        codes = encoded(nu + (1 - gamma) * (square - nu), t + 1, codes)
        return (codes, exact + (1 - gamma) * (square - exact)), None

    zero = jnp.zeros(ELEMENTS)
    carry = step((encoded(zero, 0, None), zero), 0)[0]
    (codes, exact), _ = jax.lax.scan(step, carry, jnp.arange(1, steps))
    relative = codec.decode(codes) / exact - 1
    return jnp.abs(relative).mean(), relative.mean()


def schemes():
    """Noisy gradients, rms over three decades in the leaf, 3,000 steps."""
    rows = []
    for name, make in SCHEMES.items():
        codec = make()
        cells = []
        for gamma in (0.9, 0.99, 0.999):
            error, bias = _error(codec, gamma)
            cells.append(f"{error:.4f} ({bias:+.4f})")
        rows.append((name, ", ".join(cells), ""))
    title = "Error (and bias) of nu, relative to itself, at gamma 0.9, 0.99, 0.999"
    return table(title, rows)
