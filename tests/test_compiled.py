"""The step compiled for accelerators: bytes, kernels, memory, collectives.

It needs libtpu and CUDA's plugin, but no accelerator: `make accelerators`. The figures
are read from the compiled program and are not times. Bytes are those of each kernel's
operands and results in main memory, per parameter; data prefetched into fast memory
count once, at the prefetch.
"""

import functools
import itertools
import os
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, reshard
from jax.sharding import PartitionSpec as P

from benchmarks import block
from jax_rmsprop import rmsprop
from jax_rmsprop.quantization import (
    bfloat16,
    int8,
    quantize_state,
    stochastic_rounding,
    uint8,
)

pytest.importorskip("libtpu", reason="make accelerators has the compilers")
from jax.experimental import topologies  # noqa: E402

# A program compiled for an absent device cannot be loaded.
jax.config.update("jax_enable_compilation_cache", False)

pytestmark = pytest.mark.usefixtures("standard_promotion")

SIZE = 2**28
# NVIDIA's data sheets and whitepapers: multiprocessors, their float32 units and shared
# memory, bandwidth, second-level cache, clock.
GPUS = {
    "A100": (108, 64, 167_936, 2_039_000_000_000, 40 * 2**20, 1.41, 8),
    "H100": (132, 128, 233_472, 3_350_000_000_000, 50 * 2**20, 1.98, 9),
}
TPUS = ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"]
MAKES = {
    "optax.rmsprop": functools.partial(optax.rmsprop, 1e-3),
    "full": lambda: rmsprop(1e-3),
    "centered": lambda: rmsprop(1e-3, centered=True),
    "momentum": lambda: rmsprop(1e-3, momentum=0.9),
    "bfloat16": lambda: quantize_state(rmsprop(1e-3), {"nu": bfloat16()}),
    "uint8": lambda: quantize_state(rmsprop(1e-3), {"nu": uint8()}),
    "momentum, one byte": lambda: quantize_state(
        rmsprop(1e-3, momentum=0.9), {"nu": uint8(), "momentum": int8()}
    ),
    "centered, one byte": lambda: quantize_state(
        rmsprop(1e-3, centered=True), {"nu": uint8(), "mu": int8()}
    ),
    "half, full": lambda: stochastic_rounding(rmsprop(1e-3)),
    "half, uint8": lambda: stochastic_rounding(
        quantize_state(rmsprop(1e-3), {"nu": uint8()})
    ),
    "half, momentum, one byte": lambda: stochastic_rounding(
        quantize_state(rmsprop(1e-3, momentum=0.9), {"nu": uint8(), "momentum": int8()})
    ),
}
# Bytes per parameter, and kernels: parameter, gradient and state read, parameter and
# state written, one-byte codes read again for the largest of them, in one kernel for
# both codes of a parameter.
WANTED = {
    "optax.rmsprop": (20, 1),
    "full": (20, 1),
    "centered": (28, 1),
    "momentum": (28, 1),
    "bfloat16": (16, 1),
    "uint8": (15, 2),
    "momentum, one byte": (18, 2),
    "centered, one byte": (18, 2),
    "half, full": (14, 1),
    "half, uint8": (9, 2),
    "half, momentum, one byte": (12, 2),
}
# The figures where the compiler could do better, by dimensions.
SPLIT = {
    ("tpu7x:2x2x1", "momentum, one byte", 1): (26, 3),
    ("tpu7x:2x2x1", "momentum, one byte", 2): (26, 3),
    ("tpu7x:2x2x1", "half, uint8", 2): (13, 3),
    ("tpu7x:2x2x1", "half, momentum, one byte", 1): (20, 3),
    ("tpu7x:2x2x1", "half, momentum, one byte", 2): (20, 3),
}
SPLIT_ON_FOUR = {("v5e:2x2", "momentum, one byte"): (22, 3)}
BYTES = {"f32": 4, "s32": 4, "u32": 4, "bf16": 2, "u8": 1, "s8": 1, "pred": 1}


@functools.cache
def devices(kind):
    if kind not in GPUS:
        return topologies.get_topology_desc(kind, platform="tpu").devices
    cores, units, shared, bandwidth, cache, clock, capability = GPUS[kind]
    config = f"""
        gpu_device_info {{
          threads_per_block_limit: 1024 threads_per_warp: 32
          threads_per_core_limit: 2048
          core_count: {cores} fpus_per_core: {units}
          shared_memory_per_block: 49152 shared_memory_per_core: {shared}
          shared_memory_per_block_optin: {shared - 1024}
          block_dim_limit_x: 2147483647
          block_dim_limit_y: 65535 block_dim_limit_z: 65535
          registers_per_core_limit: 65536 registers_per_block_limit: 65536
          memory_bandwidth: {bandwidth} l2_cache_size: {cache} clock_rate_ghz: {clock}
          device_memory_size: {80 * 2**30}
          cuda_compute_capability {{ major: {capability} }}
        }}
        platform_name: "CUDA" device_description_str: "{kind}"
        runtime_version {{ major: 12 minor: 8 }}
        dnn_version_info {{ major: 9 minor: 7 }}
    """
    return topologies.get_topology_desc(
        kind, platform="cuda", topology="1x1x4", target_config=config
    ).devices


def compiled(name, shapes, mesh, spec):
    """A step with donated parameters and state, and their bytes.

    `spec` is the partition of every array, or of each array by name.
    """
    optimizer = MAKES[name]()
    dtype = jnp.bfloat16 if name.startswith("half") else jnp.float32

    def step(params, state, gradient):
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    params = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, dtype),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )
    arrays = {x.shape for x in jax.tree.leaves(params)}

    def place(path, x):
        its = P()
        if x.shape in arrays:
            its = spec[path[-1].key] if isinstance(spec, dict) else spec
        where = NamedSharding(mesh, its)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

    state = jax.eval_shape(optimizer.init, params)
    params, state = jax.tree_util.tree_map_with_path(place, (params, state))
    with jax.set_mesh(mesh):
        jitted = jax.jit(step, donate_argnums=(0, 1))
        program = jitted.lower(params, state, params).compile()
    # Without scalars, which a program may hold elsewhere.
    kept = [x for x in jax.tree.leaves((params, state)) if x.shape in arrays]
    return program, sum(x.size * x.dtype.itemsize for x in kept)


def in_main_memory(types, least):
    """The bytes of arrays with at least `least` elements, from a program's types."""
    found = re.findall(r"\b(\w+)\[([\d,]+)\]((?:\{[^}]*\})?)", types)
    sizes = [
        (kind, np.prod([int(n) for n in d.split(",")]), at) for kind, d, at in found
    ]
    return sum(BYTES[k] * n for k, n, at in sizes if n >= least and "S(1)" not in at)


FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast"}
INSTRUCTION = re.compile(
    r"^\s*(?:ROOT )?%?([\w.-]+) = (\((?:[^()]|\([^()]*\))*\)|\S+) ([\w-]+)\(([^)]*)\)",
    re.MULTILINE,
)


def entry(program):
    """The instructions of a program: name, result, kind and operands."""
    text = program.as_text()
    return INSTRUCTION.findall(text[text.index("ENTRY") :])


def launched(instructions):
    """The instructions that launch a kernel."""
    return [x for x in instructions if x[2] not in FREE and not x[2].endswith("-done")]


def traffic(program, least):
    """The bytes that kernels move, and the number of kernels that move any."""
    instructions = entry(program)
    types = {name: result for name, result, _, _ in instructions}
    moved, kernels = 0, 0
    for _, result, kind, operands in launched(instructions):
        read = [types.get(o, "") for o in re.findall(r"%([\w.-]+)", operands)]
        size = sum(in_main_memory(t, least) for t in read)
        if not kind.endswith("-start"):
            size += in_main_memory(result, least)
            kernels += size > 0
        moved += size
    return moved, kernels


@pytest.mark.parametrize("shape", [(SIZE,), (2**14, 2**14)], ids=["1-D", "2-D"])
@pytest.mark.parametrize("name", MAKES)
@pytest.mark.parametrize("kind", [*TPUS, *GPUS])
def test_one_device(kind, name, shape):
    mesh = Mesh(np.array(devices(kind)[:1]), "d")
    program, kept = compiled(name, shape, mesh, P())
    wanted, kernels = SPLIT.get((kind, name, len(shape)), WANTED[name])
    assert traffic(program, 2**20) == (wanted * SIZE, kernels)
    memory = program.memory_analysis()
    assert memory.alias_size_in_bytes >= kept
    if (kind, name, len(shape)) not in SPLIT:
        assert memory.temp_size_in_bytes < SIZE / 100


@pytest.mark.parametrize("axis", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize(
    ("shape", "spec"),
    [
        ((SIZE,), P("d")),
        ((2**14, 2**14), P("d", None)),
        ((2**14, 2**14), P(None, "d")),
    ],
)
@pytest.mark.parametrize(
    "name",
    [
        "full",
        "bfloat16",
        "uint8",
        "momentum, one byte",
        "half, uint8",
        "half, momentum, one byte",
    ],
)
@pytest.mark.parametrize("kind", ["v5e:2x2", "v5e:8x8", "H100"])
def test_many_devices(kind, name, shape, spec, axis):
    many = np.array(devices(kind))
    program, _ = compiled(name, shape, Mesh(many, "d", axis_types=(axis,)), spec)
    part = SIZE // len(many)
    moved, kernels = traffic(program, part // 2**10)
    # A shard that fits into fast memory may be read less often.
    wanted, most = SPLIT_ON_FOUR.get((kind, name), WANTED[name])
    assert moved <= wanted * part
    assert kernels <= most
    # The dither is generated where its codes are, never in the global shape.
    assert program.memory_analysis().temp_size_in_bytes < part
    collectives = re.findall(
        r" (all-\w+|collective-\w+|reduce-scatter)(?:-start)?\(", program.as_text()
    )
    # All the largest codes in one collective.
    assert collectives == ["all-reduce"] * ("uint8" in name or "one byte" in name)


@pytest.mark.parametrize("axis", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("kind", ["v5e:2x2", "H100"])
def test_leaves_of_one_shape_on_other_devices(kind, axis):
    """Their codes stay in place: only the largest codes of rows are sent."""
    shape = (4096, 8192)
    specs = {"a": P("d", None), "b": P(None, "d"), "c": P("d", None)}
    mesh = Mesh(np.array(devices(kind)[:4]), "d", axis_types=(axis,))
    program, _ = compiled(
        "momentum, one byte", dict.fromkeys(specs, shape), mesh, specs
    )
    collectives = re.findall(
        r" = (.*?) (?:all-\w+|collective-\w+|reduce-scatter)(?:-start)?\(",
        program.as_text(),
    )
    assert collectives
    # A 32-bit integer for each row of three arrays, and for two codes a leaf; a start
    # names both its operand and its result.
    rows = 4 * 3 * (shape[0] + 2)
    for sent in collectives:
        assert in_main_memory(sent, 1) <= 2 * rows
    assert program.memory_analysis().temp_size_in_bytes < shape[0] * shape[1] / 8


@pytest.mark.parametrize("axis", [AxisType.Auto, AxisType.Explicit])
def test_what_devices_send_of_a_state_that_is_spread_out(axis):
    """ZeRO-1: each device sums its shard of the gradients and sends its new parameters.

    Both in the parameters' two bytes; no device rounds another's shard.
    """
    mesh = Mesh(np.array(devices("H100")[:4]), "d", axis_types=(axis,))
    everywhere, spread = NamedSharding(mesh, P()), NamedSharding(mesh, P("d"))
    shape, optimizer = (4096, 8192), MAKES["half, uint8"]()
    params = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=everywhere)
    x = jax.ShapeDtypeStruct((4096, 4096), jnp.bfloat16, sharding=spread)
    place = reshard if axis is AxisType.Explicit else jax.lax.with_sharding_constraint

    def step(params, state, x):
        g = jax.grad(lambda w: ((x @ w).astype(jnp.float32) ** 2).mean())(params)
        updates, state = optimizer.update(place(g, spread), state, params)
        return optax.apply_updates(params, updates), state

    def placed(a):
        where = spread if a.shape == shape else everywhere
        return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where)

    state = jax.tree.map(placed, jax.eval_shape(optimizer.init, params))
    shardings = jax.tree.map(lambda a: a.sharding, (params, state))
    with jax.set_mesh(mesh):
        jitted = jax.jit(step, donate_argnums=(0, 1), out_shardings=shardings)
        program = jitted.lower(params, state, x).compile()
    sent = re.findall(
        r"= (.*?) (all-\w+|collective-\w+|reduce-scatter)(?:-start)?\(",
        program.as_text(),
    )
    large = [(types, name) for types, name in sent if "8192" in types]
    assert [name for _, name in large] == ["reduce-scatter", "all-gather"]
    assert not any("f32" in types for types, _ in large)


# The most bytes per parameter of temporary arrays; with updates after all gradients, at
# least those of the gradients.
TEMPORARY = {"v5e:2x2": 0.01, "v6e:2x2": 0.01, "H100": 0.6}


@pytest.mark.parametrize("kind", TEMPORARY)
def test_gradients_that_are_never_all_there(kind):
    """The page's own code updates a layer within the backward pass."""
    page = Path(__file__).parents[1] / "docs" / "how-to" / "barely_fits.md"
    blocks = re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.M | re.S)
    names = {"jax": jax}
    exec(blocks[1].partition("bytes_moments = ")[0], names)
    exec(blocks[-1].partition("shape = ")[0], names)
    where = NamedSharding(Mesh(np.array(devices(kind)[:1]), "d"), P())

    def placed(tree):
        return jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where), tree
        )

    shape = (names["layers"], 2048, 2048)
    array = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    params = {"up": array(shape), "down": array(shape)}
    init = names["make"]().init
    found = {}
    for name, its in (("at_once", init), ("layer_by_layer", jax.vmap(init))):
        state = jax.eval_shape(its, params)
        jitted = jax.jit(names[name], donate_argnums=(0, 1))
        arguments = placed((params, state, array((256, 2048))))
        program = jitted.lower(*arguments).compile()
        temporary = program.memory_analysis().temp_size_in_bytes
        found[name] = temporary / (2 * np.prod(shape))
    assert found["layer_by_layer"] <= TEMPORARY[kind]
    assert found["at_once"] >= 2


# The most kernels per leaf. Leaves of one shape are merged; each of 36 shapes takes a
# step, the largest of its rows, and the largest of these.
LEAVES = {
    "6 blocks": (1.4, [block.shapes(1024)] * 6),
    "36 alike": (1.4, {f"{i}": (1024, 1024) for i in range(36)}),
    "36 shapes": (3.2, {f"{i}": (512 + 32 * i, 1024) for i in range(36)}),
}


@pytest.mark.parametrize("leaves", LEAVES)
@pytest.mark.parametrize(
    "name",
    [
        "full",
        "bfloat16",
        "uint8",
        "momentum, one byte",
        "centered, one byte",
        "half, uint8",
        "half, momentum, one byte",
    ],
)
def test_many_leaves(name, leaves):
    """An H100 launches few kernels per leaf, and moves the bytes of a single leaf."""
    most, shapes = LEAVES[leaves]
    params = jax.tree.leaves(shapes, is_leaf=lambda x: isinstance(x, tuple))
    mesh = Mesh(np.array(devices("H100")[:1]), "d")
    program, _ = compiled(name, shapes, mesh, P())
    assert len(launched(entry(program))) <= most * len(params)
    size = sum(int(np.prod(shape)) for shape in params)
    # In one of these cases the compiler splits the loop of one leaf of 36.
    assert traffic(program, 2**10)[0] <= 1.03 * WANTED[name][0] * size
    assert program.memory_analysis().temp_size_in_bytes < 0.1 * size


# The shardings of a step's arrays and of its batch.
PLACES = {
    "one device": (1, P(), P()),
    "data parallel": (4, P(), P("d")),
    "sharded": (4, P("d"), P("d")),
}
# A step takes about twenty seconds to compile: EVERY_STEP=1 runs all.
STEPS = [("one device", "uint8")]
if os.environ.get("EVERY_STEP"):
    STEPS = list(itertools.product(PLACES, [*WANTED, "optax.adamw"]))


def step_of_training(place, name):
    """A block's training step on v5e, compiled, and its parameters on each device.

    Without a name, the gradients alone.
    """
    count, arrays, batch = PLACES[place]
    mesh = Mesh(np.array(devices("v5e:2x2")[:count]), "d")
    shapes = block.shapes(4096)

    def placed(x):
        spec = arrays if x.shape in shapes.values() else P()
        where = NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

    params = {k: placed(jax.ShapeDtypeStruct(s, "float32")) for k, s in shapes.items()}
    x = jax.ShapeDtypeStruct(
        (4 * count, 2048, 4096), jnp.bfloat16, sharding=NamedSharding(mesh, batch)
    )
    if name is None:
        step, carry = functools.partial(jax.grad(block.loss), heads=32), (params,)
    else:
        optimizer = (MAKES | {"optax.adamw": lambda: optax.adamw(1e-3)})[name]()
        state = jax.tree.map(placed, jax.eval_shape(optimizer.init, params))
        step, carry = block.training_step(optimizer, 32), (params, state)
    jitted = jax.jit(
        step,
        donate_argnums=tuple(range(len(carry))),
        out_shardings=jax.tree.map(
            lambda x: x.sharding, carry if name is not None else params
        ),
    )
    with jax.set_mesh(mesh):
        program = jitted.lower(*carry, x).compile()
    size = sum(p.size for p in params.values())
    return program, size / (1 if arrays == P() else count)


@functools.cache
def gradients_alone(place):
    """The bytes per parameter of a block's gradients."""
    program, size = step_of_training(place, None)
    return traffic(program, size // 2**12)[0] / size


@pytest.mark.parametrize(("place", "name"), STEPS)
def test_a_training_step(place, name):
    """On a TPU an update is fused into the product that computes its gradient.

    Then a training step neither writes nor reads the gradients, and an update adds only
    the bytes that it moves itself, minus these eight.
    """
    program, size = step_of_training(place, name)
    added = traffic(program, size // 2**12)[0] / size - gradients_alone(place)
    memory = program.memory_analysis().temp_size_in_bytes
    print(f"{place}, {name}: {added:.1f} bytes, {memory / 2**20:.0f} MB of memory")
    wanted = (WANTED | {"optax.adamw": (28, 1)})[name][0]
    assert added <= wanted - 8 + (0.7 if place != "data parallel" else 1.7)
