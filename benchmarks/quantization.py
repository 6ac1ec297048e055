"""State in fewer bits: the time of a step and the bytes it moves."""

import warnings
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import accelerator, block
from benchmarks.timing import medians, on_cpu, table
from benchmarks.update import carried, update_step
from jax_rmsprop import rmsprop
from jax_rmsprop.quantization import (
    dither,
    dither_starts,
    uint8,
)

try:
    import bitsandbytes
    import torch
except ImportError:
    bitsandbytes = None

# Read gradient, parameter and state, write parameter and state.
BYTES = {"full": 20, "bfloat16": 16, "uint8": 14}
# Each compared to Optax's of the same kind.
MAKES = {
    name: block.MAKES[name] for name in ("optax.rmsprop", "full", "bfloat16", "uint8")
}
MOMENTA = {
    "optax.rmsprop": lambda: optax.rmsprop(1e-3, momentum=0.9),
    "full": lambda: rmsprop(1e-3, momentum=0.9),
    "uint8 and int8": block.MAKES["momentum, uint8 and int8"],
}


@partial(jax.jit, donate_argnums=(0, 1))
def _by_hand(params, kept, count, gradient):
    """`quantize_state(rmsprop(1e-3), {"nu": uint8()})` written as one function."""
    codec, g, (codes, base) = uint8(), gradient, kept
    noise = dither(g.shape, dither_starts(1, count, 0)[0], count)
    nu = codec.decode(codes, base)
    nu = nu + jnp.float32(0.1) * (g * g - nu)
    params = params - jnp.float32(1e-3) * g / jnp.sqrt(nu + jnp.float32(1e-6))
    base = codec.next_base(codes.max().astype(jnp.int32), base)
    return params, (codec.encode(nu, noise, base), base), count + 1


def leaves(rounds=15, steps=5):
    """The same over the 36 arrays of six transformer blocks."""
    rng = np.random.default_rng(0)
    gradients = [
        {k: jnp.asarray(rng.standard_normal(s, "float32")) for k, s in shapes.items()}
        for shapes in 6 * [block.shapes(1024)]
    ]
    calls = {}
    for kind, makes in (("", MAKES), (" momentum", MOMENTA)):
        for name, make in makes.items():
            step, carry = update_step(make(), gradients)

            def several(carry, step=step):
                for _ in range(steps):
                    carry = step(*carry, gradients)
                return carry

            calls[name + kind] = carried(several, carry)
    seconds = medians(calls, rounds)

    def row(name, kind=""):
        ratio = seconds[name + kind] / seconds["optax.rmsprop" + kind]
        return f"time of{kind} {name} / `optax.rmsprop`'s", f"{ratio:.3f}", ""

    size = sum(x.size for x in jax.tree.leaves(gradients))
    rows = [row(name) for name in ("full", "bfloat16", "uint8")]
    rows += [row(name, " momentum") for name in ("full", "uint8 and int8")]
    milliseconds = 1e3 * seconds["optax.rmsprop"] / steps
    rows.append(("milliseconds of `optax.rmsprop`", f"{milliseconds:.2f}", ""))
    return table(f"36 arrays, {size:,} float32 parameters", rows)


def quantization(rounds=40):
    """Update and apply, jitted with donation, one array of float32 numbers."""
    size = 2**24 if on_cpu() else 2**28
    fresh = partial(jax.random.normal, jax.random.key(0), (size,))
    gradient = fresh()
    calls, moved = {}, {}
    for name, make in MAKES.items():
        step, carry = update_step(make(), gradient)
        cost = step.cost_analysis()
        moved[name] = cost.get("bytes accessed", float("nan")) / size
        calls[name] = carried(lambda c, step=step: step(*c, gradient), carry)
    nothing = jnp.zeros(size, jnp.uint8), jnp.int32(uint8().first_base)
    calls["by hand"] = carried(
        lambda c: _by_hand(*c, gradient), (fresh(), nothing, jnp.int32(0))
    )
    # Eight bytes per number: one read, one write.
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
        (
            "time of uint8 / `optax.rmsprop`'s",
            ratio("uint8", "optax.rmsprop"),
            "<= 1 on a GPU",
        ),
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


def half_precision(rounds=15, steps=3):
    """Stochastically rounded bfloat16 parameters and gradients compared to float32.

    One array, and ResNet-50's 161.
    """
    names = [
        "`optax.rmsprop`",
        "bfloat16 at random",
        "bfloat16 at random, uint8",
        "`optax.rmsprop`, momentum",
        "bfloat16 at random, momentum, one byte",
    ]
    one = [(2**20 if on_cpu() else 2**28,)]
    rows = []
    for title, shapes in (("one array", one), ("ResNet-50", accelerator.resnet50())):
        calls = {}
        for name in names:
            dtype, _, make = accelerator.OPTIMIZERS[name]
            gradients = accelerator.fresh(shapes, dtype)
            step, carry = update_step(make(), gradients)
            calls[name] = accelerator.ready(step, carry, gradients, steps)
        seconds = medians(calls, rounds)
        for name in names:
            beside = names[3] if "momentum" in name else names[0]
            if name != beside:
                ratio = f"{seconds[name] / seconds[beside]:.3f}"
                rows.append((f"{title}: time of {name} / {beside}'s", ratio, ""))
    size = f"{one[0][0]:,} parameters in one array, 25,557,032 in 161"
    return table(f"bfloat16 parameters, {size}", rows)
