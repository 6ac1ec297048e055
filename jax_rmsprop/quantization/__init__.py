"""Optimizer state in two bytes a number, or in one, and parameters in two.

    optimizer = quantize_state(rmsprop(0.01), {"nu": uint8()})

stores the named fields of any Optax transformation's state in fewer bits between steps.
A step computes in full precision: it decodes the fields, runs the transformation, and
encodes the result.

    optimizer = stochastic_rounding(quantize_state(rmsprop(0.01), {"nu": uint8()}))

also trains parameters in bfloat16 or float16, without a float32 copy.

Rounding is stochastic: up with the probability that makes the mean exact. Rounding to
nearest would freeze a slow average: at gamma = 0.999 it moves by a thousandth of itself
a step, but the spacing of bfloat16 is a 256th to a 128th. It would freeze a parameter
at a small learning rate, too. The random numbers, the dither, are

    dither = hash(element, seed, step // 32) * m^field + step * (golden ratio)    mod 1

with one hash for a parameter's element and all its fields, whose multiples by powers of
m are independent of each other. They need no state, and are the same in every run and
on any number of devices. Over time an element's dither is spread evenly (a Weyl
sequence), so successive rounding errors cancel: in uint8, averages of noisy squares at
gamma 0.9, 0.99 and 0.999 have mean relative errors of 0.055, 0.116 and 0.156; with
independent random numbers they have 0.070, 0.145 and 0.160. A sequence that is never
reseeded is better for gradients of constant size (0.054, 0.112, 0.133), but if they
shrink it biases the averages low, by 4% if they halve every 1,400 steps.
"""

from jax_rmsprop.quantization._codecs import (
    Codec,
    StateCodecs,
    bfloat16,
    int8,
    uint8,
)
from jax_rmsprop.quantization._dither import dither, dither_starts
from jax_rmsprop.quantization._memory import MemoryReport, memory_report
from jax_rmsprop.quantization._quantize import (
    QuantizedState,
    dequantize_state,
    quantize_state,
    stochastic_rounding,
)

__all__ = [
    "Codec",
    "MemoryReport",
    "QuantizedState",
    "StateCodecs",
    "bfloat16",
    "dequantize_state",
    "dither",
    "dither_starts",
    "int8",
    "memory_report",
    "quantize_state",
    "stochastic_rounding",
    "uint8",
]
