"""State in fewer bits: its documented precision, and the interface of a state."""

import functools
import importlib
import itertools
import pickle
from pathlib import Path
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jax_rmsprop import conventions, migrate, rmsprop, scale_by_rmsprop
from jax_rmsprop.quantization import (
    Codec,
    _largest,
    bfloat16,
    dequantize_state,
    dither,
    dither_starts,
    int8,
    memory_report,
    quantize_state,
    stochastic_rounding,
    uint8,
)
from tests.helpers import airfoil_or_skip, describe, mesh_of_four, updates_of
from tests.test_conventions import every_convention

ELEMENTS = 16_384
BOTH = {"bfloat16": bfloat16(), "uint8": uint8()}
both = pytest.mark.parametrize("kept", BOTH.values(), ids=BOTH.keys())
# The spacing of the codes, relative to the value.
SPACING = {"bfloat16": 2.0**-7, "uint8": 2.0**-3}


@functools.partial(jax.jit, static_argnums=0)
def settled(kept, x, noise):
    """The codes of x once its exponents (first step) and window (next ones) settle."""
    base = jnp.int32(kept.first_base)
    for _ in range(3):
        codes = kept.encode(x, noise, base)
        before = base
        if kept.next_base is not None:
            base = kept.next_base(jnp.abs(codes.astype("int32")).max(), base)
    return codes, before


def lowbias32(x):
    """Wellons' 32-bit hash, in Python integers."""
    x = ((x ^ x >> 16) * 0x7FEB352D) % 2**32
    x = ((x ^ x >> 15) * 0x846CA68B) % 2**32
    return x ^ x >> 16


@pytest.mark.parametrize(("count", "seed"), [(0, 0), (1, 5), (100, 2**32 - 1)])
def test_the_dither_is_a_hash_of_leaf_step_and_position(count, seed):
    """Then it moves by the golden ratio at each step."""
    starts = dither_starts(2, count, jnp.uint32(seed))
    for leaf in (0, 1):
        start = lowbias32((lowbias32(seed) + leaf) % 2**32)
        start = lowbias32((start + count // 32) % 2**32)
        assert int(starts[leaf]) == start
        expected = [
            (lowbias32((start + i) % 2**32) + count * 0x9E3779B9) % 2**32
            for i in range(2 * 3 * 40)
        ]
        found = dither((2, 3, 40), starts[leaf], count)
        np.testing.assert_array_equal(found.ravel(), expected)
        # Another field of the element, from the same hash.
        move = count * 0x9E3779B9
        expected = [((d - move) * 0x8649A765**2 + move) % 2**32 for d in expected]
        found = dither((2, 3, 40), starts[leaf], count, field=2)
        np.testing.assert_array_equal(found.ravel(), expected)


def shortest(rows):
    """The length of a lattice's shortest vector: pairwise reduction, then all sums."""
    rows = [list(row) for row in rows]
    dot = lambda p, q: sum(a * b for a, b in zip(p, q, strict=True))  # noqa: E731
    again = True
    while again:
        again = False
        for i, j in itertools.permutations(range(len(rows)), 2):
            q = round(dot(rows[i], rows[j]) / dot(rows[j], rows[j]))
            less = [a - q * b for a, b in zip(rows[i], rows[j], strict=True)]
            if dot(less, less) < dot(rows[i], rows[i]):
                rows[i], again = less, True
    sums = (
        [
            sum(n * x for n, x in zip(weights, column, strict=True))
            for column in zip(*rows, strict=True)
        ]
        for weights in itertools.product(range(-2, 3), repeat=len(rows))
        if any(weights)
    )
    return min(dot(row, row) for row in sums) ** 0.5


@pytest.mark.parametrize("fields", [*itertools.combinations(range(4), 2), (0, 1, 2)])
def test_the_fields_of_an_element_are_independent(fields):
    """Over all hashes the fields form a lattice of close lines and planes.

    Their distance is the reciprocal of the dual lattice's shortest vector: 2^-16 of
    the unit square for the best lattice of that many points, 2^-10.8 of the cube.
    """
    m, n = 0x8649A765, 2**32
    other = [pow(m, f - fields[0], n) for f in fields[1:]]
    dual = [[n, *[0] * len(other)]]
    for i, factor in enumerate(other):
        dual.append([-factor % n, *(int(i == j) for j in range(len(other)))])
    assert shortest(dual) > (2**15.9 if len(fields) == 2 else 2**10.5)


def test_fields_round_independently_of_each_other():
    """The fraction of one field rounded up does not depend on the other's rounding.

    For small and large probabilities, every pair of fields, at steps in both periods.
    """
    n, chances = 2**18, (0.01, 0.3, 0.5, 0.97)
    for count, start in ((1, 5), (17, 99), (40, 12345)):
        noises = [
            np.asarray(dither((n,), jnp.uint32(start), count, field=f))
            for f in range(4)
        ]
        for a, b in itertools.combinations(noises, 2):
            for p, q in itertools.product(chances, repeat=2):
                both_up = np.mean((a < p * 2**32) & (b < q * 2**32))
                assert abs(both_up - p * q) < 4.5 * (p * q * (1 - p * q) / n) ** 0.5


def test_the_dither_of_an_array_of_more_elements_than_32_bits_count():
    start = jnp.uint32(0)
    shape = (2, 2**17, 2**16)
    assert jax.eval_shape(lambda: dither(shape, start, 0)).shape == shape


def test_the_dither_begins_anew():
    """It is reseeded every 32 steps, or errors of an average would repeat forever."""
    starts = [np.asarray(dither_starts(3, t, 7)) for t in (0, 31, 32, 63, 64)]
    np.testing.assert_array_equal(starts[0], starts[1])
    np.testing.assert_array_equal(starts[2], starts[3])
    for a, b in itertools.combinations((starts[0], starts[2], starts[4]), 2):
        assert (a != b).all()


# Averages.


@functools.partial(jax.jit, static_argnames=("gammas", "steps", "elements"))
def averages(gammas, steps, elements):
    """For each gamma and codec the stored average and the largest ratio of two steps.

    Also for each gamma the float64 average, all of the same noise.
    """
    kept_by = {
        (gamma, name): quantize_state(scale_by_rmsprop(gamma, 0.0), {"nu": kept})
        for gamma, (name, kept) in itertools.product(gammas, BOTH.items())
    }
    exact = {gamma: scale_by_rmsprop(gamma, 0.0) for gamma in gammas}
    rms = 10 ** jax.random.uniform(
        jax.random.key(0), (elements,), "float32", minval=-3, maxval=0
    )

    def step(carry, t):
        states, full, nu = carry
        key = jax.random.fold_in(jax.random.key(1), t)
        g = rms * jax.random.normal(key, (elements,), "float32")
        moved = {gamma: exact[gamma].update(g, full[gamma]) for gamma in gammas}
        ratios, new = {}, {}
        for at, optimizer in kept_by.items():
            u, new[at] = optimizer.update(g, states[at])
            ratios[at] = jnp.max(jnp.abs(u) / jnp.abs(moved[at[0]][0]))
        full = {gamma: state for gamma, (_, state) in moved.items()}
        square = g.astype("float64") ** 2
        nu = {gamma: n + (1 - gamma) * (square - n) for gamma, n in nu.items()}
        return (new, full, nu), ratios

    carry = (
        {at: optimizer.init(rms) for at, optimizer in kept_by.items()},
        {gamma: optimizer.init(rms) for gamma, optimizer in exact.items()},
        {gamma: jnp.zeros(elements, "float64") for gamma in gammas},
    )
    (states, _, nu), ratios = jax.lax.scan(step, carry, jnp.arange(steps))
    kept = {
        at: dequantize_state(state, {"nu": BOTH[at[1]]}).nu
        for at, state in states.items()
    }
    return kept, jax.tree.map(jnp.max, ratios), nu


# Bounds of the mean error and of its mean, for each gamma and codec.
BOUNDS = {
    (0.9, "bfloat16"): (0.006, 0.003),
    (0.9, "uint8"): (0.07, 0.02),
    (0.99, "bfloat16"): (0.016, 0.003),
    (0.99, "uint8"): (0.15, 0.02),
    (0.999, "bfloat16"): (0.04, 0.003),
    (0.999, "uint8"): (0.17, 0.02),
}


@pytest.mark.parametrize(
    "elements", [ELEMENTS, pytest.param(4 * ELEMENTS, marks=pytest.mark.slow)]
)
def test_noisy_averages(x64, elements):
    """Compared to float64, over six decades of nu in one leaf and 3,000 steps."""
    kept, ratios, nu = averages((0.9, 0.99, 0.999), 3000, elements)
    for at, (error, bias) in BOUNDS.items():
        truth = np.asarray(nu[at[0]])
        assert truth.max() > 1e6 * truth.min()
        relative = np.asarray(kept[at], np.float64) / truth - 1
        assert np.abs(relative).mean() < error
        assert abs(relative.mean()) < bias
        # For any element at any step.
        assert ratios[at] <= 2


def test_constant_gradients_do_not_freeze():
    g = jnp.asarray(10 ** np.linspace(-3, 0, 4096), "float32")

    @functools.partial(jax.jit, static_argnums=0)
    def settled_states(gamma):
        def settle(kept):
            optimizer = quantize_state(scale_by_rmsprop(gamma), {"nu": kept})
            state, _ = jax.lax.scan(
                lambda state, _: (optimizer.update(g, state)[1], None),
                optimizer.init(g),
                length=round(20 / (1 - gamma)),
            )
            return dequantize_state(state, {"nu": kept}).nu

        return {name: settle(kept) for name, kept in BOTH.items()}

    for gamma in (0.9, 0.99, 0.999):
        for name, nu in settled_states(gamma).items():
            # Relative to the value: rounding moves it by at most a spacing.
            assert np.abs(nu / (g * g) - 1).max() <= SPACING[name]


@both
@pytest.mark.parametrize("decades", [0, 6, 7])
def test_relative_precision_over_seven_decades(kept, decades):
    """A single encoding and decoding."""
    x = jnp.asarray(3.0 * 10 ** np.linspace(-decades, 0, ELEMENTS), "float32")
    noise = jax.random.bits(jax.random.key(0), x.shape, "uint32")
    codes, base = settled(kept, x, noise)
    relative = np.asarray(kept.decode(codes, base) / x - 1)
    name = "uint8" if codes.dtype == jnp.uint8 else "bfloat16"
    assert np.abs(relative).max() <= SPACING[name]
    # The mean of that many roundings, each unbiased and within the spacing.
    assert abs(relative.mean()) < SPACING[name] / np.sqrt(ELEMENTS) * 2
    # At first the codes are exponents.
    first = jnp.int32(kept.first_base)
    relative = np.asarray(kept.decode(kept.encode(x, noise, first), first) / x)
    assert 0.5 <= relative.min()
    assert relative.max() <= 2


def test_all_codes_are_used():
    x = jnp.asarray(10 ** np.linspace(-12, 0, ELEMENTS), "float32")
    zero = jnp.zeros(ELEMENTS, "uint32")
    kept = uint8()
    codes, base = settled(kept, x, zero)
    assert int(codes.max()) == 255 - 64
    codes = kept.encode(x * 256, zero, base)
    assert len(np.unique(np.append(codes, 0))) == 256


def test_what_is_too_small_counts_as_the_smallest():
    """It is never 0, which would make a step huge."""
    x = jnp.where(jnp.arange(4096) < 100, 1.0, 1e-20)
    zero = jnp.zeros(4096, "uint32")
    kept = uint8()
    codes, base = settled(kept, x, zero)
    value = kept.decode(codes, base)
    assert 0 < value.min() < 1e-7
    assert (value[100:] >= x[100:]).all()


def test_no_step_is_twice_full_precisions():
    """Also for elements that are 10 decades below the leaf's largest."""
    rng = np.random.default_rng(0)
    scale = 10 ** rng.uniform(-5, 0, 8192)
    stored = quantize_state(scale_by_rmsprop(0.9, 0.0), {"nu": uint8()})
    full = scale_by_rmsprop(0.9, 0.0)
    a, b = stored.init(jnp.ones(8192)), full.init(jnp.ones(8192))
    step = jax.jit(stored.update)
    for _ in range(200):
        g = jnp.asarray(scale * rng.normal(size=8192), "float32")
        u, a = step(g, a)
        v, b = full.update(g, b)
        assert (np.abs(u) <= 2 * np.abs(v)).all()


def test_zero_stays_zero_until_there_is_something():
    g = jnp.zeros((64, 64)).at[:, 0].set(1.0)
    optimizer = quantize_state(scale_by_rmsprop(0.9, 0.0), {"nu": uint8()})
    state = optimizer.init(g)
    for _ in range(20):
        u, state = optimizer.update(g, state)
    np.testing.assert_array_equal(u[:, 1:], 0.0)
    nu = dequantize_state(state, {"nu": uint8()}).nu
    np.testing.assert_array_equal(nu[:, 1:], 0.0)
    # The others' first step does not depend on their neighbours.
    u, _ = optimizer.update(jnp.full((64, 64), 1e-3), state)
    np.testing.assert_allclose(u[:, 1:], 1 / np.sqrt(0.1), rtol=1e-4)


def test_one_huge_gradient_recovers(rng):
    gradients = rng.normal(size=(300, 4096)).astype("float32")
    gradients[50, 7] = 1e30
    optimizers = {
        name: quantize_state(scale_by_rmsprop(0.9, 1e-8), {"nu": kept})
        for name, kept in BOTH.items()
    }
    optimizers["full"] = scale_by_rmsprop(0.9, 1e-8)
    found = updates_of(optimizers, gradients)
    full = np.abs(found["full"][0])
    others = np.arange(4096) != 7
    for name in BOTH:
        u = np.abs(found[name][0])
        assert np.isfinite(u).all()
        # Its neighbours are not affected.
        assert (u[1:, others] <= 2 * full[1:, others]).all()
        assert (u[1:, others] >= full[1:, others] / 2).all()
    assert abs(found["uint8"][0][-1, 7]) > 0.1 * abs(gradients[-1, 7])


# Signed fields.


@pytest.mark.parametrize("kept", [bfloat16(), int8()])
def test_signed_numbers_are_unbiased(kept):
    value = np.concatenate([-(10 ** np.linspace(-6, 0, 200)), [0.0, 1.0, 0.3, 1e-6]])
    x = jnp.asarray(np.repeat(value[:, None], 4096, 1), "float32")
    noise = jax.random.bits(jax.random.key(0), x.shape, "uint32")
    value_kept = kept.decode(*settled(kept, x, noise))
    mean = np.asarray(value_kept, np.float64).mean(1)
    # An eighth of the value, or of the smallest, over the root of the roundings.
    smallest = 2.0**-13
    np.testing.assert_allclose(mean, value, rtol=4 * 0.125 / 64, atol=4 * smallest / 64)
    assert (np.sign(value_kept) * np.sign(x) >= 0).all()


def test_mean_and_momentum(rng):
    """They stay near full precision's, for noise with a drift."""
    gradients = (0.3 + rng.normal(size=(300, 8192))).astype("float32")
    options = {"mu": {"centered": True}, "momentum": {"momentum": 0.9}}
    full = {f: rmsprop(0.01, 0.99, 1e-6, **options[f]) for f in options}
    stored = {
        f"{f} {name}": quantize_state(full[f], {f: kept})
        for f in options
        for name, kept in {"bfloat16": bfloat16(), "int8": int8()}.items()
    }
    moved = {
        name: np.asarray(updates, float).sum(0)
        for name, (updates, _) in updates_of(full | stored, gradients).items()
    }
    for name in stored:
        found, expected = moved[name], moved[name.split()[0]]
        difference = np.abs(found - expected).mean() / np.abs(expected).mean()
        assert difference < (0.02 if "bfloat16" in name else 0.05)
        assert abs(found.mean() / expected.mean() - 1) < 0.01


# A state like any other.


def params():
    return {"w": jnp.ones((64, 128)), "b": jnp.ones(128)}


def make(**options):
    return quantize_state(
        rmsprop(
            0.01,
            momentum=0.9,
            centered=True,
            **options,
        ),
        {
            "nu": uint8(),
            "mu": bfloat16(),
            "momentum": int8(),
        },
    )


def test_state_is_stable():
    optimizer, x = make(), params()
    state = optimizer.init(x)
    step = jax.jit(optimizer.update)
    for _ in range(3):
        updates, new = step(x, state, x, value=1.0)
        chex.assert_trees_all_equal_structs(new, state)
        assert describe(new) == describe(state)
        chex.assert_trees_all_equal_shapes_and_dtypes(updates, x)
        state = new
    assert step._cache_size() == 1
    # The same bits outside a jit, for a constant gradient.
    eager = optimizer.init(x)
    for _ in range(3):
        _, eager = optimizer.update(x, eager, x)
    chex.assert_trees_all_equal(eager, state)
    nu = optax.tree.get(state, "nu")
    assert nu["w"].dtype == jnp.uint8
    assert nu["w"].shape == (64, 128)
    # Small leaves are not encoded.
    assert nu["b"].dtype == jnp.float32


def test_bytes_are_what_is_promised():
    x = {"w": jax.ShapeDtypeStruct((1000, 1000), jnp.float32)}
    for kept, most in [(uint8(), 1.02), (bfloat16(), 2)]:
        optimizer = quantize_state(scale_by_rmsprop(), {"nu": kept})
        report = memory_report(optimizer, x)
        assert report.total["parameters"] == 4_000_000
        assert report.total["nu"] <= most * 1_000_000


def test_members_of_a_sweep_round_by_their_seeds():
    g = jnp.asarray(np.random.default_rng(0).normal(size=8192), "float32")

    def run(gamma, seed):
        optimizer = quantize_state(scale_by_rmsprop(gamma), {"nu": uint8()}, seed=seed)
        state = optimizer.init(g)
        for _ in range(3):
            _, state = optimizer.update(g, state)
        return state.inner_state.nu

    members = jax.jit(jax.vmap(run))
    codes = members(jnp.array([0.9, 0.9, 0.99]), jnp.array([0, 1, 0]))
    assert (codes[0] != codes[1]).any()
    np.testing.assert_array_equal(codes[0], jax.jit(run)(jnp.float32(0.9), 0))


@pytest.mark.parametrize("call", [jax.jit, lambda f: f], ids=["jitted", "eager"])
@pytest.mark.parametrize("spec", [P("d"), P(None, "d")])
def test_the_same_bits_on_every_sharding(spec, call):
    mesh = mesh_of_four()
    where = NamedSharding(mesh, spec)
    g = jnp.asarray(np.random.default_rng(0).normal(size=(64, 128)), "float32")
    optimizer = quantize_state(scale_by_rmsprop(), {"nu": uint8()})
    runs = []
    for x in (g, jax.device_put(g, where)):
        state = call(optimizer.init)(x)
        assert state.inner_state.nu.sharding.is_equivalent_to(x.sharding, 2)
        for _ in range(4):
            _, state = call(optimizer.update)(x, state)
        runs.append(state.inner_state.nu)
        assert runs[-1].sharding.is_equivalent_to(x.sharding, 2)
    np.testing.assert_array_equal(*runs)


def test_outside_a_jit_leaves_are_not_compiled_one_by_one(caplog):
    """The usual `optimizer.init(params)` of 3 shapes would be 75 programs."""
    x = {f"{i}": jnp.ones((2, 3 + i)) for i in range(3)}
    codecs = {"nu": uint8(0), "mu": bfloat16(), "momentum": int8(0)}

    def use(rate):
        inner = rmsprop(rate, momentum=0.9, centered=True)
        optimizer = quantize_state(inner, codecs, seed=int(1000 * rate))
        optimizer.update(x, optimizer.init(x))

    def compiled():
        messages = (r.getMessage() for r in caplog.records)
        return [m for m in messages if m.startswith("Compiling ")]

    with jax.log_compiles(), caplog.at_level("WARNING"):
        use(0.1)
        # For each of the two: rmsprop, decoding, encoding, and its own scalars.
        assert 0 < len(compiled()) <= 12
        caplog.clear()
        use(0.2)
        assert compiled() == []


def test_what_has_no_codec_stays_what_it_is():
    """Also leaves that are not arrays."""

    class Named(NamedTuple):
        nu: jax.Array
        name: str
        rate: float

    inner = optax.GradientTransformation(
        lambda x: Named(x, "a name", 0.5), lambda g, state, params=None: (g, state)
    )
    optimizer, x = quantize_state(inner, {"nu": bfloat16()}), jnp.ones(3)
    _, state = optimizer.update(x, optimizer.init(x))
    assert state.inner_state[1:] == ("a name", 0.5)
    assert type(state.inner_state.rate) is float
    assert dequantize_state(state, {"nu": bfloat16()})[1:] == ("a name", 0.5)


def test_any_transformation(standard_promotion):
    inner = {
        "trace": optax.trace(0.9),
        "nu": optax.scale_by_adam(),
        "mu": optax.rmsprop(0.1, centered=True),
        "masked trace": optax.masked(optax.trace(0.9), {"w": True, "b": False}),
    }
    stored = {
        f"stored {name}": quantize_state(plain, {name.split()[-1]: bfloat16()})
        for name, plain in inner.items()
    }
    gradients = jax.tree.map(lambda p: jnp.stack([p] * 5), params())
    found = updates_of(inner | stored, gradients)
    for name in inner:
        updates, state = found[f"stored {name}"]
        chex.assert_trees_all_close(updates, found[name][0], rtol=0.02)
        codes = optax.tree_utils.tree_get(state, name.split()[-1])["w"]
        assert codes.dtype == jnp.bfloat16


def test_double_precision_and_complex_leaves_stay_as_they_are(x64, standard_promotion):
    x = {"d": jnp.ones(8, "float64"), "z": jnp.ones(8, "complex64")}
    optimizer = quantize_state(
        rmsprop(0.1, centered=True), {f: bfloat16() for f in ("nu", "mu")}
    )
    state = optimizer.init(x)
    _, state = optimizer.update(x, state)
    assert state.inner_state.nu["d"].dtype == jnp.float64
    assert state.inner_state.mu["z"].dtype == jnp.complex64
    assert state.inner_state.nu["z"].dtype == jnp.bfloat16


def test_every_convention_in_fewer_bits(standard_promotion):
    x, plain = params(), every_convention()

    @jax.jit
    def steps():
        def both(optimizer):
            stored = quantize_state(optimizer, {"nu": uint8()})
            return (
                stored.update(x, stored.init(x), x),
                optimizer.update(x, optimizer.init(x), x)[0],
            )

        return {name: both(optimizer) for name, optimizer in plain.items()}

    for (updates, state), expected in steps().values():
        assert optax.tree_utils.tree_get(state, "nu")["w"].dtype == jnp.uint8
        # In the first step the average is exact, if it starts at 0 or a power of two;
        # another program may round once or twice differently.
        chex.assert_trees_all_close(updates, expected, rtol=1e-6)


def test_half_precision_parameters():
    x = {"w": jnp.ones((64, 64), jnp.bfloat16)}
    optimizer = quantize_state(rmsprop(0.1), {"nu": uint8()})
    state = optimizer.init(x)
    updates, state = optimizer.update(x, state)
    assert updates["w"].dtype == jnp.bfloat16
    assert state.inner_state.nu["w"].dtype == jnp.uint8


def test_a_quantized_state_is_not_migrated():
    x = params()
    optimizer = quantize_state(rmsprop(0.1), {"nu": uint8()})
    with pytest.raises(ValueError, match="fewer bits cannot be migrated: pass what"):
        migrate.to_tf1(optimizer.init(x), x, layout=dict)
    with pytest.raises(ValueError, match="fewer bits cannot be migrated: pass what"):
        migrate.from_tf1({}, x, layout=dict, optimizer=optimizer)


@pytest.mark.parametrize("make_one", [bfloat16, uint8, int8])
def test_a_codec_is_a_value(make_one):
    assert make_one() == make_one()
    assert hash(make_one()) == hash(make_one())
    assert pickle.loads(pickle.dumps(make_one())).min_size == make_one().min_size
    assert uint8() != int8()
    assert uint8() != uint8(min_size=1)


def test_no_codec_changes_nothing():
    x = params()
    state = quantize_state(rmsprop(0.1), {}).init(x)
    chex.assert_trees_all_equal(state.inner_state, rmsprop(0.1).init(x))


def test_a_codec_of_ones_own():
    """A codec that stores the root in float16, to halve the exponent's range."""
    mine = Codec(
        lambda x, noise, base: jnp.sqrt(x).astype("float16"),
        lambda codes, base: codes.astype("float32") ** 2,
    )
    optimizer = quantize_state(scale_by_rmsprop(), {"nu": mine})
    g = jnp.ones(8)
    updates, state = optimizer.update(g, optimizer.init(g))
    assert state.inner_state.nu.dtype == jnp.float16
    expected, _ = scale_by_rmsprop().update(g, scale_by_rmsprop().init(g))
    np.testing.assert_array_equal(updates, expected)


def test_a_codec_of_ones_own_with_a_base():
    """A fixed-point codec whose unit, 2^base, follows the largest number."""

    def unit(base):
        return jnp.exp2(base.astype("float32"))

    mine = Codec(
        lambda x, noise, base: jnp.clip(jnp.round(x / unit(base)), 0, 127).astype(
            "int8"
        ),
        lambda codes, base: codes.astype("float32") * unit(base),
        lambda largest, base: base + jnp.where(largest > 100, 1, 0),
        first_base=-7,
    )
    optimizer = quantize_state(scale_by_rmsprop(0.5), {"nu": mine})
    g = jnp.full(8, 10.0)
    state = optimizer.init(g)
    step = jax.jit(optimizer.update)
    for _ in range(20):
        _, state = step(g, state)
    assert list(state.bases) == [0, 0]  # the count's, and nu's
    np.testing.assert_array_equal(state.inner_state.nu, 100)


@pytest.mark.parametrize("platform", ["_as_they_are", "_as_int32", "_by_rows"])
def test_every_platform_finds_the_largest_codes(platform, rng):
    shapes = [(5000,), (64, 128), (64, 128), (3, 3, 32, 64), (100, 2), (1, 40)]
    codes = [rng.integers(0, 256, shape).astype("uint8") for shape in shapes]
    codes += [rng.integers(-127, 128, shape).astype("int8") for shape in shapes]
    codes[2][:] = 0
    codes[8].flat[77], codes[9].flat[5] = -128, 127
    expected = [np.abs(x.astype(int)).max() for x in codes]
    find = getattr(_largest, platform)
    if platform != "_as_they_are":
        find = functools.partial(find, 2 * list(range(len(shapes))))
    found = jax.jit(find)(*map(jnp.asarray, codes))
    np.testing.assert_array_equal(found, expected)


# Bad input.


@pytest.mark.parametrize(
    ("bad", "kind", "message"),
    [
        (
            lambda: quantize_state(rmsprop(0.1), "uint8"),
            TypeError,
            "`codecs` must be a dict of codecs by the names of fields, such as "
            "{\"nu\": uint8()}, got 'uint8'",
        ),
        (
            lambda: quantize_state(rmsprop(0.1), {"nu": "uint8"}),
            TypeError,
            "`codecs` must have a Codec, such as uint8(), for 'nu', got 'uint8'",
        ),
        (
            lambda: quantize_state(rmsprop(0.1), {"nu": jnp.uint8}),
            TypeError,
            f"`codecs` must have a Codec, such as uint8(), for 'nu', got {jnp.uint8!r}",
        ),
        (
            lambda: quantize_state(rmsprop(0.1), {"mu": bfloat16()}).init(jnp.ones(2)),
            ValueError,
            "`codecs` names 'mu', but the state's fields are count, nu",
        ),
        (
            lambda: quantize_state(rmsprop(0.1, momentum=0.9), {"momentum": uint8()}),
            ValueError,
            "`codecs` must have a codec that keeps negative numbers, such as int8(), "
            "for 'momentum', got an unsigned one",
        ),
        (
            lambda: quantize_state(optax.adamw(0.1), {"nu": uint8(), "mu": uint8()}),
            ValueError,
            "`codecs` must have a codec that keeps negative numbers, such as int8(), "
            "for 'mu', got an unsigned one",
        ),
        (
            lambda: (lambda o: o.update(jnp.ones(2), o.init(jnp.ones(2))))(
                stochastic_rounding(rmsprop(0.1))
            ),
            ValueError,
            "`params` must be passed to `update` of `stochastic_rounding`, got None",
        ),
        (
            lambda: uint8(min_size=-1),
            ValueError,
            "`min_size` must be an integer >= 0, got -1",
        ),
        (
            lambda: int8(min_size=0.5),
            TypeError,
            "`min_size` must be an integer >= 0, got 0.5",
        ),
    ],
)
def test_bad_input(bad, kind, message):
    with pytest.raises(kind) as refused:
        bad()
    assert str(refused.value) == message


# The report.


def test_memory_report(capsys):
    x, arrays = params(), 1 + 3 * 2
    report = memory_report(make(), x)
    assert report.total == {
        "parameters": 65 * 128 * 4,
        "gradients": 65 * 128 * 4,
        "count": 8,
        "nu": 64 * 128 + 128 * 4,
        "mu": 65 * 128 * 2,
        "momentum": 64 * 128 + 128 * 4,
        "bases": 4 * arrays,
    }
    state = jax.eval_shape(make().init, x)
    bytes_of_state = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(state))
    assert sum(list(report.total.values())[2:]) == bytes_of_state
    lines = str(report).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[-1].startswith("| all ")
    # A list of parameters, and a bare array.
    assert memory_report(make(), [jnp.ones(3), jnp.ones((2, 2))]).total["nu"] == 28
    assert memory_report(rmsprop(0.1), jnp.ones(5)).total["nu"] == 20


# Whole trainings, never reset to full precision's.


def conv_parameters(key):
    first, second = jax.random.split(key)
    common = importlib.import_module("common")
    return {
        "kernel": common.matrix(first, 3, 3, 1, 8) / 3,
        "w": common.matrix(second, 512, 10) / 512**0.5,
        "b": jnp.zeros(10),
    }


def conv_loss(p, data):
    hidden = jax.lax.conv_general_dilated(
        data.x.reshape(-1, 8, 8, 1),
        p["kernel"],
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    logits = jax.nn.relu(hidden).reshape(len(data.x), -1) @ p["w"] + p["b"]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, data.y)
    return losses.mean()


STEPS, SEEDS = 400, jnp.arange(5)


@functools.cache
def free_training(problem):
    """The loss and, for each seed, the initial parameters and all batches."""
    common = importlib.import_module("common")
    init, loss, data, size = {
        "mlp": lambda: (
            lambda key: common.network(key, 64, hidden=64),
            common.cross_entropy,
            common.digits()[0],
            64,
        ),
        "conv": lambda: (conv_parameters, conv_loss, common.digits()[0], 64),
        "airfoil": lambda: (
            lambda key: common.linear(key, 5),
            common.squared_loss,
            common.airfoil(),
            10,
        ),
    }[problem]()
    epochs = jnp.arange(-(-STEPS // (len(data.x) // size)))

    def begin(seed):
        key = jax.random.key(seed)
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(epochs)
        shuffled = jax.vmap(lambda key: common.batches(key, data, size))(keys)
        batches = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:])[:STEPS], shuffled)
        return init(key), batches

    return loss, *jax.jit(jax.vmap(begin))(SEEDS)


def loss_curves(problem, make):
    """The losses of trainings; the seed sets parameters, batches and rounding."""
    loss, params, batches = free_training(problem)
    common = importlib.import_module("common")

    def train(seed, params, batches):
        optimizer = make(seed)
        step = common.train_step(loss, optimizer)
        return jax.lax.scan(step, (params, optimizer.init(params)), batches)[1]

    return np.asarray(jax.jit(jax.vmap(train))(SEEDS, params, batches))


@pytest.mark.parametrize(
    ("problem", "convention"),
    [
        ("mlp", "textbook"),
        ("mlp", "pytorch"),
        ("conv", "textbook"),
        ("airfoil", "pytorch"),
    ],
)
@pytest.mark.slow
def test_free_trainings(problem, convention, monkeypatch, standard_promotion):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "examples"))
    if problem == "airfoil":
        airfoil_or_skip()
    rate = 0.01 if problem == "airfoil" else 1e-3
    if convention == "textbook":
        inner = conventions.d2l(rate, gamma=0.9)
    else:
        inner = conventions.pytorch(rate)

    def running(curves, window=50):
        ones = np.ones(window) / window
        return np.stack([np.convolve(c, ones, "valid") for c in curves])

    full = running(loss_curves(problem, lambda seed: inner))
    spread = full[:, -1].std()
    # No minimum size, since these networks are small.
    for kept in (bfloat16(), uint8(min_size=0)):
        kept_so = running(
            loss_curves(
                problem,
                lambda seed, kept=kept: quantize_state(inner, {"nu": kept}, seed=seed),
            )
        )
        assert np.abs(kept_so[:, -1] - full[:, -1]).max() < spread
        assert np.abs(kept_so.mean(0) / full.mean(0) - 1).max() < 0.02


# The shift while the magnitude is unknown, the largest code, and the headroom.
FORMATS = {uint8: (23, 255, 64), int8: (24, 127, 24)}


@pytest.mark.parametrize("make_one", FORMATS)
def test_a_byte_is_the_upper_bits_of_a_float(make_one):
    """Decode every code and base by NumPy's view of the bits, and encode it again."""
    wide_shift, largest, _ = FORMATS[make_one]
    codec, noise = make_one(0), jnp.zeros(largest + 1, "uint32")
    for base, shift in ((-1, wide_shift), (0, 20), (800, 20)):
        codes = np.arange(largest + 1)
        bits = (codes + max(base, 0)) << shift
        expected = np.where(codes, bits.astype("uint32").view("float32"), 0)
        # Skip infinite, NaN and (flushed by XLA) subnormal numbers.
        normal = np.isfinite(expected) & ((expected == 0) | (expected > 1.2e-38))
        found = codec.decode(jnp.asarray(codes).astype(make_dtype(make_one)), base)
        np.testing.assert_array_equal(found[normal], expected[normal])
        assert not np.signbit(found[0])
        kept = codec.encode(jnp.asarray(found), noise, jnp.int32(base))
        np.testing.assert_array_equal(kept[normal], codes[normal])
        if make_one is int8:
            minus = codec.encode(-jnp.asarray(found), noise, jnp.int32(base))
            np.testing.assert_array_equal(minus[normal], -codes[normal])


def make_dtype(make_one):
    return jnp.uint8 if make_one is uint8 else jnp.int8


@pytest.mark.parametrize("make_one", FORMATS)
def test_the_window_of_a_byte_follows_the_largest_code(make_one):
    wide_shift, largest, headroom = FORMATS[make_one]
    codec = make_one()

    def after(code, base):
        return int(codec.next_base(jnp.int32(code), jnp.int32(base)))

    assert after(100, 800) == 100 + 800 + headroom - largest
    assert after(100, -1) == (101 << (wide_shift - 20)) + headroom - largest
    assert after(0, 800) == after(0, -1) == -1
    assert after(3, 0) == 0
    assert after(largest, 0) == headroom
    # Elements that exceed the window become the largest value.
    huge = codec.encode(jnp.full(1, 1e30), jnp.zeros(1, "uint32"), jnp.int32(500))
    assert int(huge[0]) == largest


def test_what_a_codec_and_its_seed_are_by_default():
    assert [make().min_size for make in (bfloat16, uint8, int8)] == [0, 4096, 4096]
    codec = Codec(abs, abs)
    assert (codec.first_base, codec.min_size, codec.next_base) == (0, 0, None)
    g = jnp.linspace(0.1, 1, 64)
    optimizers = {
        str(options): quantize_state(scale_by_rmsprop(), {"nu": uint8(0)}, **options)
        for options in ({}, {"seed": 0}, {"seed": 1})
    }
    assert list(optimizers["{}"].init(g).bases) == [0, -1]
    found = updates_of(optimizers, jnp.stack([g] * 4))
    default, zero, one = (state.inner_state.nu for _, state in found.values())
    np.testing.assert_array_equal(default, zero)
    assert (default != one).any()


def test_the_number_that_the_comment_works_through():
    """0.15625 keeps its value, 0.16 is rounded up 24 times out of 100."""
    codec, base = uint8(0), jnp.int32(800)
    assert codec.next_base(jnp.int32(255 - 64), base) == base
    codes = codec.encode(jnp.float32([0.15625]), jnp.zeros(1, "uint32"), base)
    assert int(codes[0]) == 194
    assert float(codec.decode(codes, base)[0]) == 0.15625
    n = 100_000
    noises = jnp.asarray(np.arange(n) * (2**32 // n), "uint32")
    codes = codec.encode(jnp.full(n, 0.16, "float32"), noises, base)
    assert set(np.unique(codes)) == {194, 195}
    np.testing.assert_allclose((codes == 195).mean(), 0.24, atol=2 / n)
