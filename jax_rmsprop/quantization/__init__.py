"""Optimizer state in two bytes a number, or in one, and parameters in two.

    optimizer = quantize_state(rmsprop(0.01), {"nu": uint8()})

keeps the named fields of any Optax transformation's state in fewer bits between steps.
A step itself is as precise as before: what is kept is decoded, the transformation runs
in full precision, and what comes back is encoded.

    optimizer = stochastic_rounding(quantize_state(rmsprop(0.01), {"nu": uint8()}))

trains parameters in bfloat16 or float16 too, without a copy in float32.

Rounding is at random, up with the probability that makes the mean exact. Otherwise a
slow average would stand still: at gamma = 0.999 it moves by a thousandth of itself a
step, where bfloat16 has steps of one 256th and less. So would a parameter at a small
learning rate. The random numbers, the dither, are

    dither = hash(element, seed, step // 32) * m^field + step * (golden ratio)    mod 1

with one hash for all fields of an element and the parameter itself, whose multiples by
m are independent of each other; nothing that has to be carried along, and the same in
every run and on any number of devices. In time an element's dither is spread evenly
(Weyl's sequence), so that what one rounding takes another soon gives back: in uint8,
averages of noisy squares at gamma 0.9, 0.99 and 0.999 are off by 0.055, 0.116 and 0.156
of themselves on average, with independent random numbers by 0.070, 0.145 and 0.160. A
sequence that never began anew would do better still where the gradients keep their size
(0.054, 0.112, 0.133), but where they shrink it leaves the averages too low, by 4% if
they halve every 1,400 steps.
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
