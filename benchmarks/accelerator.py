"""Fewer bits on an accelerator, measured in one run of at most eight minutes.

    python -m benchmarks.accelerator              on a GPU or a TPU
    python -m benchmarks.accelerator --tiny       the same on tiny arrays, as a trial

It prints each row as soon as it is measured, and skips rows after its time is up. Next
to each time are the bytes that a step must move and the resulting bandwidth: a slow
step that moves few bytes is bound by something else.
"""

import argparse
import gc
import importlib
import statistics
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.block import shapes as block_shapes
from jax_rmsprop import rmsprop
from jax_rmsprop.quantization import int8, quantize_state, stochastic_rounding, uint8

SECONDS = 450
BOTH = {"nu": uint8(), "momentum": int8()}
ADAM = {"mu": int8(), "nu": uint8()}


def _half(make):
    return lambda: stochastic_rounding(make())


def _one_byte(make, codecs):
    return lambda: quantize_state(make(), codecs)


RMSPROP = partial(rmsprop, 1e-3)
MOMENTUM = partial(rmsprop, 1e-3, momentum=0.9)
ADAMW = partial(optax.adamw, 1e-3)
# The dtype of parameters and gradients, the bytes per parameter that a step reads and
# writes if it reads everything once, and the optimizer.
OPTIMIZERS = {
    "`optax.rmsprop`": ("float32", 20, partial(optax.rmsprop, 1e-3)),
    "full": ("float32", 20, RMSPROP),
    "uint8": ("float32", 14, _one_byte(RMSPROP, {"nu": uint8()})),
    "bfloat16 at random": ("bfloat16", 14, _half(RMSPROP)),
    "bfloat16 at random, uint8": (
        "bfloat16",
        8,
        _half(_one_byte(RMSPROP, {"nu": uint8()})),
    ),
    "`optax.rmsprop`, momentum": (
        "float32",
        28,
        partial(optax.rmsprop, 1e-3, momentum=0.9),
    ),
    "momentum, one byte": ("float32", 16, _one_byte(MOMENTUM, BOTH)),
    "bfloat16 at random, momentum, one byte": (
        "bfloat16",
        10,
        _half(_one_byte(MOMENTUM, BOTH)),
    ),
    "`optax.adamw`": ("float32", 28, ADAMW),
    "`optax.adamw`, one byte": ("float32", 16, _one_byte(ADAMW, ADAM)),
    "bfloat16 at random, `optax.adamw`, one byte": (
        "bfloat16",
        10,
        _half(_one_byte(ADAMW, ADAM)),
    ),
}
LEAVES = [name for name in OPTIMIZERS if "momentum" not in name]


def resnet50():
    """The shapes of ResNet-50's 161 arrays."""
    found, width = [(7, 7, 3, 64), (64,), (64,)], 64
    for blocks, inner in ((3, 64), (4, 128), (6, 256), (3, 512)):
        for i in range(blocks):
            kernels = [
                (1, 1, width, inner),
                (3, 3, inner, inner),
                (1, 1, inner, 4 * inner),
            ]
            kernels += [(1, 1, width, 4 * inner)] * (i == 0)
            for kernel in kernels:
                found += [kernel, kernel[-1:], kernel[-1:]]
            width = 4 * inner
    return [*found, (2048, 1000), (1000,)]


def gpt2_medium(width=1024):
    """The shapes of GPT-2 medium's 292 arrays."""
    found = [(50257, width), (1024, width)]
    for _ in range(24):
        for inputs, outputs in ((1, 3), (1, 1), (1, 4), (4, 1)):
            found += [(inputs * width, outputs * width), (outputs * width,)]
        found += [(width,)] * 4
    return [*found, (width,), (width,)]


class Rows:
    """A table that is printed row by row until the time is up."""

    def __init__(self, seconds):
        self.until = time.monotonic() + seconds
        self.seen = []

    def heading(self, title, columns):
        """Begin a table."""
        print(f"\n### {title}\n\n| measured | {' | '.join(columns)} |", flush=True)
        print("|---" * (len(columns) + 1) + "|")

    def measure(self, name, cells):
        """Print a row of what `cells()` returns, or of the error it raises."""
        if time.monotonic() > self.until:
            found = ["not measured: the time is up"]
        else:
            try:
                found = cells()
            except Exception as error:  # continue: the next may work
                found = [f"{type(error).__name__}: {str(error).splitlines()[0][:60]}"]
        gc.collect()
        self.seen.append((name, found))
        print(f"| {name} | {' | '.join(found)} |", flush=True)


def seconds_of(call, rounds=5):
    """The median seconds of a blocking call, after a warm-up call."""
    call()
    taken = []
    for _ in range(rounds):
        began = time.perf_counter()
        call()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def figures(seconds, must, size):
    """Milliseconds, required bytes, and the resulting bandwidth."""
    return [f"{1e3 * seconds:.3f}", f"{must}", f"{must * size / seconds / 1e12:.2f}"]


def ready(step, carry, gradients, steps):
    """A call that runs `steps` steps in a loop."""
    box = [carry]

    def call():
        for _ in range(steps):
            box[0] = step(*box[0], gradients)
        jax.block_until_ready(box[0])

    return call


def update(optimizer):
    """(params, state, gradients) -> (params, state)."""

    def step(params, state, gradients):
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    return step


def in_a_scan(step, steps):
    """`steps` steps in one program, with constant gradients."""

    def several(params, state, gradients):
        def body(carry, _):
            return step(*carry, gradients), None

        return jax.lax.scan(body, (params, state), length=steps)[0]

    return several


def fresh(shapes, dtype):
    """Random arrays of these shapes, which a compiler cannot fold."""
    make = jax.jit(lambda key, s: jax.random.normal(key, s, dtype), static_argnums=1)
    return [make(jax.random.key(i), shape) for i, shape in enumerate(shapes)]


def of_optax(name, shapes, steps, ways=("a call", "in a row", "in a scan")):
    """Milliseconds per step in each way, and the bandwidth of the last."""
    dtype, must, make = OPTIMIZERS[name]
    optimizer = make()
    step, size = update(optimizer), sum(int(np.prod(s)) for s in shapes)
    gradients = fresh(shapes, dtype)
    found = []
    for way in ways:
        params = jax.tree.map(jnp.copy, gradients)
        carry = params, jax.jit(optimizer.init)(params)
        scanned = way == "in a scan"
        jitted = jax.jit(
            in_a_scan(step, steps) if scanned else step, donate_argnums=(0, 1)
        )
        times = steps if way == "in a row" else 1
        call = ready(jitted, carry, gradients, times)
        found.append(seconds_of(call) / (1 if way == "a call" else steps))
        del params, carry, call
    cells = [f"{1e3 * s:.3f}" for s in found[:-1]]
    return [*cells, *figures(found[-1], must, size)]


def of_flashoptim(name, shapes, steps):
    """FlashOptim's port to JAX: one call, and in a loop."""
    make = getattr(importlib.import_module("flashoptim_jax"), name)
    momentum = {"momentum": 0.9} if "sgd" in name else {}
    tx = make(learning_rate=1e-3, **momentum)
    step = jax.jit(tx.step, donate_argnums=(0, 1))
    gradients, size = fresh(shapes, "bfloat16"), sum(int(np.prod(s)) for s in shapes)
    found = []
    for times in (1, steps):
        params = jax.tree.map(jnp.copy, gradients)
        call = ready(step, (params, tx.init(params)), gradients, times)
        found.append(seconds_of(call) / times)
    must = 6 + 2 * (2 if "adam" in name else 1) + 2  # its correction byte, in and out
    return [f"{1e3 * found[0]:.3f}", *figures(found[1], must, size)]


def of_torch(make, dtype, must, shapes, steps):
    """An optimizer with PyTorch's interface on a GPU: one call, and in a loop."""
    torch = importlib.import_module("torch")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    weights = [
        torch.randn(s, device=device, dtype=getattr(torch, dtype)) for s in shapes
    ]
    for w in weights:
        w.grad = torch.randn_like(w)
    optimizer = make(torch, weights)

    def call(times):
        for _ in range(times):
            optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()

    size = sum(int(np.prod(s)) for s in shapes)
    found = [seconds_of(partial(call, times)) / times for times in (1, steps)]
    return [f"{1e3 * found[0]:.3f}", *figures(found[1], must, size)]


def _bitsandbytes(name):
    def make(torch, weights):
        optimizers = importlib.import_module("bitsandbytes").optim
        return getattr(optimizers, name)(weights, lr=1e-3)

    return make


# The dtype, the required bytes, and the optimizer.
TORCH = {
    "PyTorch's foreach RMSprop": (
        "float32",
        20,
        lambda torch, w: torch.optim.RMSprop(w, lr=1e-3, foreach=True),
    ),
    "PyTorch's fused AdamW": (
        "float32",
        28,
        lambda torch, w: torch.optim.AdamW(w, lr=1e-3, fused=True),
    ),
    "bitsandbytes' RMSprop8bit": ("bfloat16", 8, _bitsandbytes("RMSprop8bit")),
    "bitsandbytes' AdamW8bit": ("bfloat16", 10, _bitsandbytes("AdamW8bit")),
}


def in_host_memory(name, shapes, steps):
    """The state in pinned host memory, moved within the step."""
    dtype, _, make = OPTIMIZERS[name]
    optimizer = make()
    gradients = fresh(shapes, dtype)
    params = jax.tree.map(jnp.copy, gradients)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    state = jax.device_put(
        jax.jit(optimizer.init)(params), device.with_memory_kind("pinned_host")
    )
    places = jax.tree.map(lambda a: a.sharding, (params, state))

    def step(params, state, gradients):
        state = jax.device_put(state, jax.memory.Space.Device)
        return update(optimizer)(params, state, gradients)

    jitted = jax.jit(step, donate_argnums=(0, 1), out_shardings=places)
    kept = sum(a.nbytes for a in jax.tree.leaves(state))
    seconds = seconds_of(ready(jitted, (params, state), gradients, steps)) / steps
    return [f"{1e3 * seconds:.2f}", f"{2 * kept / seconds / 1e9:.1f}"]


def scanned_layers(within, layers, width, batch):
    """A training step of residual layers in one scan, updated inside or after it."""

    def make(number=0):
        inner = quantize_state(RMSPROP(), {"nu": uint8()}, seed=number)
        return stochastic_rounding(inner, seed=number)

    def layer(p, h):
        return h + jnp.tanh(h @ p["up"]) @ p["down"]

    def loss(h):
        return (h.astype(jnp.float32) ** 2).mean()

    def after(params, state, x):
        def total(params):
            return loss(jax.lax.scan(lambda h, p: (layer(p, h), None), x, params)[0])

        return update(make())(params, state, jax.grad(total)(params))

    def backward(carry, at):
        dh, *kept = carry
        number, h = at
        p, state = jax.tree.map(lambda a: a[number], kept)
        gradients, dh = jax.vjp(layer, p, h)[1](dh)
        new = list(update(make(number))(p, state, gradients))
        return (dh, *jax.tree.map(lambda a, b: a.at[number].set(b), kept, new)), None

    def at_once(params, state, x):
        h, inputs = jax.lax.scan(lambda h, p: (layer(p, h), h), x, params)
        carry = jax.grad(loss)(h), params, state
        numbers = jnp.arange(layers)
        carry, _ = jax.lax.scan(backward, carry, (numbers, inputs), reverse=True)
        return carry[1:]

    shape = (layers, width, width)
    params = dict(zip(("up", "down"), fresh([shape, shape], "bfloat16"), strict=True))
    (x,) = fresh([(batch, width)], "bfloat16")
    init = jax.vmap(make().init) if within else make().init
    carry = params, jax.jit(init)(params)
    jitted = jax.jit(at_once if within else after, donate_argnums=(0, 1))
    memory = jitted.lower(*carry, x).compile().memory_analysis()
    seconds = seconds_of(ready(jitted, carry, x, 1))
    temporary = memory.temp_size_in_bytes / (2 * layers * width * width)
    return [f"{1e3 * seconds:.2f}", f"{temporary:.3f}"]


def main(arguments=None):
    """Print all tables; return their rows."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tiny", action="store_true", help="tiny arrays")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="%(default)s")
    options = parser.parse_args(arguments)
    tiny, rows = options.tiny, Rows(options.seconds)
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}")

    one, steps = [(2**14 if tiny else 2**28,)], 2 if tiny else 20
    columns = ["bytes that must move", "TB/s"]
    rows.heading(
        f"{one[0][0]:,} parameters in one array", ["ms a step in a row", *columns]
    )
    for name in OPTIMIZERS:
        rows.measure(name, partial(of_optax, name, one, steps, ("in a row",)))

    models = {"GPT-2 medium": gpt2_medium(), "ResNet-50": resnet50()}
    if tiny:
        models = {"a block": list(block_shapes(8).values())}
    ways = ["ms a call", "ms a step of ten in a row", "in a scan", *columns]
    others = ["ms a call", "ms a step of ten in a row", *columns]
    for model, shapes in models.items():
        size, steps = sum(int(np.prod(s)) for s in shapes), 2 if tiny else 10
        title = f"{model}: {size:,} parameters in {len(shapes)} arrays"
        rows.heading(title, ways)
        for name in LEAVES:
            rows.measure(name, partial(of_optax, name, shapes, steps))
        rows.heading(f"{title}, others", others)
        for name, (dtype, must, make) in TORCH.items():
            rows.measure(name, partial(of_torch, make, dtype, must, shapes, steps))
        for name in ("flash_sgdw", "flash_adamw"):
            rows.measure(f"`{name}`", partial(of_flashoptim, name, shapes, steps))

    shapes = next(iter(models.values()))
    rows.heading("The state in host memory", ["ms a step", "GB/s, both ways"])
    for name in ("full", "uint8", "bfloat16 at random, uint8"):
        rows.measure(name, partial(in_host_memory, name, shapes, 2))

    sizes = (4, 16, 8) if tiny else (24, 2048, 4096)
    title = "Scanned layers, bfloat16 at random, uint8"
    rows.heading(title, ["ms a step", "bytes a parameter of temporary arrays"])
    for name, within in (("update after all gradients", 0), ("within", 1)):
        rows.measure(name, partial(scanned_layers, within, *sizes))
    return rows.seen


if __name__ == "__main__":
    main()
