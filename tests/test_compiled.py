"""The step as accelerators' compilers make it: bytes, kernels, memory, collectives.

No accelerator is needed, but libtpu and CUDA's plugin: `make accelerators`. The figures
are read off the compiled program and are no times. Bytes are those of the operands and
results of each kernel that lie in main memory, by parameter; what is moved into fast
memory beforehand counts once, where it is read.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_rmsprop import rmsprop
from jax_rmsprop.quantization import bfloat16, int8, quantize_state, uint8

pytest.importorskip("libtpu", reason="make accelerators has the compilers")
from jax.experimental import topologies  # noqa: E402

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
        rmsprop(1e-3, momentum=0.9), {"nu": uint8(), "trace": int8()}
    ),
    "centered, one byte": lambda: quantize_state(
        rmsprop(1e-3, centered=True), {"nu": uint8(), "mu": int8()}
    ),
}
# Parameter, gradient and state read, parameter and state written, and where there are
# one-byte codes once more for the largest of them: bytes a parameter, and kernels.
WANTED = {
    "optax.rmsprop": (20, 1),
    "full": (20, 1),
    "centered": (28, 1),
    "momentum": (28, 1),
    "bfloat16": (16, 1),
    "uint8": (15, 2),
    "momentum, one byte": (18, 3),
    "centered, one byte": (18, 3),
}
# What the compiler makes of two of them where it could do better.
SPLIT = {("tpu7x:2x2x1", "momentum, one byte"): (26, 4)}
SPLIT_ON_FOUR = {("v5e:2x2", "momentum, one byte"): (22, 4)}
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


def compiled(make, shape, mesh, spec):
    """A step whose parameters and state are donated, and the bytes of these."""
    optimizer = make()

    def step(params, state, gradient):
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    def place(x):
        where = NamedSharding(mesh, spec if x.shape == shape else P())
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

    params = jax.ShapeDtypeStruct(shape, jnp.float32)
    state = jax.eval_shape(optimizer.init, params)
    params, state = jax.tree.map(place, (params, state))
    with jax.set_mesh(mesh):
        jitted = jax.jit(step, donate_argnums=(0, 1))
        program = jitted.lower(params, state, params).compile()
    # Scalars apart, which a program may hold elsewhere.
    arrays = [x for x in jax.tree.leaves((params, state)) if x.shape == shape]
    return program, sum(x.size * x.dtype.itemsize for x in arrays)


def in_main_memory(types, least):
    """Bytes of the arrays of so many elements or more, by their types in a program."""
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


def traffic(program, least):
    """Bytes that the kernels move, and how many move some."""
    types, moved, kernels = {}, 0, 0
    text = program.as_text()
    for name, result, kind, operands in INSTRUCTION.findall(
        text[text.index("ENTRY") :]
    ):
        types[name] = result
        if kind in FREE or kind.endswith("-done"):
            continue
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
    program, kept = compiled(MAKES[name], shape, mesh, P())
    wanted, kernels = SPLIT.get((kind, name), WANTED[name])
    assert traffic(program, 2**20) == (wanted * SIZE, kernels)
    memory = program.memory_analysis()
    assert memory.alias_size_in_bytes >= kept
    if (kind, name) not in SPLIT:
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
@pytest.mark.parametrize("name", ["full", "bfloat16", "uint8", "momentum, one byte"])
@pytest.mark.parametrize("kind", ["v5e:2x2", "v5e:8x8", "H100"])
def test_many_devices(kind, name, shape, spec, axis):
    many = np.array(devices(kind))
    program, _ = compiled(MAKES[name], shape, Mesh(many, "d", axis_types=(axis,)), spec)
    part = SIZE // len(many)
    moved, kernels = traffic(program, part // 2**10)
    # Where a shard fits into fast memory it may be read less often.
    wanted, most = SPLIT_ON_FOUR.get((kind, name), WANTED[name])
    assert moved <= wanted * part
    assert kernels <= most
    # The dither is made where its codes are, none of the global shape.
    assert program.memory_analysis().temp_size_in_bytes < part
    collectives = re.findall(
        r" (all-\w+|collective-\w+|reduce-scatter)(?:-start)?\(", program.as_text()
    )
    codes = {"full": 0, "bfloat16": 0, "uint8": 1, "momentum, one byte": 2}
    assert collectives == ["all-reduce"] * codes[name]  # of the largest code
