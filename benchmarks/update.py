"""The update itself: outside a jit, on large arrays, and its compilation."""

import gc
from functools import partial

import jax
import jax.numpy as jnp
import optax

from benchmarks.timing import medians, on_cpu, table
from jax_rmsprop import rmsprop
from jax_rmsprop.quantization import quantize_state, uint8

try:
    import torch
except ImportError:
    torch = None

MAKES = {
    "ours": partial(rmsprop, eps=1e-6),
    "optax": partial(optax.rmsprop, eps=1e-6),
}


def eager():
    """`update` outside any jit, 100 leaves of 64 numbers.

    As a training does, one after another; and in turn with the other optimizer, which
    leaves nothing of ours in the processor's caches.
    """
    params = [jnp.full(64, float(i)) for i in range(100)]

    def calls(count, makes=MAKES):
        def updates(optimizer, state):
            for _ in range(count):
                jax.block_until_ready(optimizer.update(params, state))

        optimizers = {name: make(1e-3) for name, make in makes.items()}
        return {n: partial(updates, o, o.init(params)) for n, o in optimizers.items()}

    def in_one_byte(rate):
        return quantize_state(rmsprop(rate), {"nu": uint8(0)})

    ten = medians(calls(10, MAKES | {"uint8": in_one_byte}), rounds=10)
    one = medians(calls(1), rounds=50)

    heard = []  # by a listener that stays: JAX 0.8 has no public way to take it away
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **_: heard.append(event)
    )
    for i in range(100):
        optimizer = rmsprop(1e-3 / (i + 1), i / 100)
        optimizer.update(params[:7], optimizer.init(params[:7]))
    compiled = heard.count("/jax/core/compile/backend_compile_duration")
    return table(
        "Outside any jit, 100 leaves of 64 numbers",
        [
            (
                "times faster than `optax.rmsprop`, ten updates in a row",
                f"{ten['optax'] / ten['ours']:.1f}",
                ">= 12",
            ),
            ("milliseconds an update", f"{1e3 * ten['ours'] / 10:.2f}", ""),
            (
                "times faster, one update in turn with one of Optax's",
                f"{one['optax'] / one['ours']:.1f}",
                ">= 10",
            ),
            (
                "times faster, ten updates in a row, with uint8",
                f"{ten['optax'] / ten['uint8']:.1f}",
                "",
            ),
            (
                "programs compiled for 100 gammas and learning rates (init and update)",
                f"{compiled}",
                "2",
            ),
        ],
    )


def large(rounds=60):
    """Update and apply, jitted with donation, one array of float32 numbers."""
    size = 2**24 if on_cpu() else 2**28
    gradient = jax.random.normal(jax.random.key(0), (size,))
    calls = {}
    for name, make in MAKES.items():
        step, carry = update_step(make(1e-3), gradient)
        calls[name] = carried(lambda c, step=step: step(*c, gradient), carry)
    # Five arrays' worth of traffic, 20 bytes a parameter: read three, write two.
    scale = jax.jit(lambda xs: [x * 0.999 for x in xs], donate_argnums=0)
    part = size * 5 // 4  # two arrays of it are read and written: 20 bytes a parameter
    calls["scale"] = carried(scale, [jnp.ones(part), jnp.ones(part)])
    if torch is not None and on_cpu():
        weights = torch.randn(size)
        weights.grad = torch.randn(size)
        calls["torch"] = torch.optim.RMSprop([weights], lr=1e-3, foreach=True).step
    seconds = medians(calls, rounds)
    ratio = {name: seconds["ours"] / s for name, s in seconds.items()}
    return table(
        f"Jitted with donation, update and apply, {size:,} float32 parameters",
        [
            ("time / `optax.rmsprop`'s", f"{ratio['optax']:.3f}", "<= 1.05"),
            (
                "time / `torch.optim.RMSprop`'s (foreach)",
                f"{ratio['torch']:.3f}" if "torch" in ratio else "not measured",
                "<= 0.333",
            ),
            (
                "time / scaling the same 20 bytes a parameter in place",
                f"{ratio['scale']:.2f}",
                "1 is the memory's limit; two passes, 28 bytes, are 1.4",
            ),
            ("milliseconds", f"{1e3 * seconds['ours']:.1f}", ""),
        ],
    )


def update_step(optimizer, gradients):
    """Update and apply, compiled with donation, and what it begins with."""

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, gradients):
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    params = jax.tree.map(jnp.copy, gradients)
    carry = params, optimizer.init(params)
    return step.lower(*carry, gradients).compile(), carry


def carried(step, carry):
    """A call that feeds the last result in again, as donation needs."""
    box = [carry]

    def call():
        box[0] = step(box[0])
        return box[0]

    return call


def compiling(leaves=1000, rounds=15):
    """Tracing and compiling a step over 1,000 leaves of 64 numbers."""
    params = [jnp.full(64, float(i)) for i in range(leaves)]
    calls = {}
    for name, make in MAKES.items():
        optimizer = make(1e-3)
        state = optimizer.init(params)

        def compile_step(optimizer=optimizer, state=state):
            def step(params, state, gradient):
                updates, state = optimizer.update(gradient, state, params)
                return optax.apply_updates(params, updates), state

            jax.jit(step).lower(params, state, params).compile()

        calls[name] = compile_step

    def forget():
        jax.clear_caches()
        gc.collect()

    seconds = medians(calls, rounds, before=forget)
    return table(
        f"{leaves:,} leaves",
        [
            (
                "tracing and compiling / `optax.rmsprop`'s",
                f"{seconds['ours'] / seconds['optax']:.3f}",
                "<= 1.1",
            ),
            ("seconds", f"{seconds['ours']:.2f}", ""),
        ],
    )
