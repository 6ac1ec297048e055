"""Faults from public bug reports that must not occur here."""

import gc
import inspect
import weakref
from typing import NamedTuple

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_rmsprop import conventions, migrate, rmsprop, scale_by_rmsprop
from jax_rmsprop.quantization import (
    bfloat16,
    dequantize_state,
    int8,
    quantize_state,
    uint8,
)
from tests.helpers import flag, mesh_of_four
from tests.test_conventions import every_convention

pytestmark = pytest.mark.usefixtures("standard_promotion")


def run(optimizer, g, x=None, n=3):
    state = optimizer.init(g)
    for _ in range(n):
        updates, state = optimizer.update(g, state, x)
    return updates


# Gradients and parameters.


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize(
    "g",
    [np.array([1, -2]), np.array([True, False]), np.zeros(2, jax.dtypes.float0)],
    ids=["int", "bool", "float0"],
)
def test_a_gradient_that_is_no_float_is_refused_by_name(g, jit):
    x = {"w": jnp.zeros(2)}
    quantized = quantize_state(rmsprop(0.1), {"nu": bfloat16()})
    for optimizer in (quantized, rmsprop(0.1), *every_convention().values()):
        state = optimizer.init(x)
        update = jax.jit(optimizer.update) if jit else optimizer.update
        with pytest.raises(TypeError, match=r"\['w'\]") as refused:
            update({"w": g}, state, x)
        assert "\n" not in str(refused.value).split("\n-----")[0]


@pytest.mark.parametrize(
    "params",
    [
        {"w": jnp.ones((3, 1))},
        {"w": jnp.ones((2, 3))},
        {"w": jnp.ones(())},
        {"w": jnp.ones(3), "z": jnp.ones(2)},
        [jnp.ones(3)],
        None,
    ],
    ids=str,
)
def test_parameters_that_do_not_fit_are_refused(params):
    g = {"w": jnp.ones(3)}
    for optimizer in (
        rmsprop(0.1, weight_decay=0.1),
        conventions.dreamer_v3(warmup=0),
        conventions.laprop(weight_decay=0.1),
        conventions.mxnet1(wd=0.1),
    ):
        with pytest.raises(ValueError, match="^`params` must ") as refused:
            optimizer.update(g, optimizer.init(g), params)
        assert "\n" not in str(refused.value)


class Model(eqx.Module):
    """A model with an array that has no gradient."""

    weight: jax.Array
    positions: jax.Array


@pytest.mark.parametrize(
    "optimizer",
    [
        rmsprop(0.1, weight_decay=0.1),
        conventions.pytorch(0.1, weight_decay=0.1),
        conventions.mxnet1(0.1, wd=0.1),
        conventions.laprop(0.1, weight_decay=0.1),
        conventions.dreamer_v3(0.1, warmup=0),
    ],
)
def test_parameters_without_a_gradient_are_left_out(optimizer):
    model = Model(jnp.ones(3), jnp.arange(3))
    floats = eqx.filter(model, eqx.is_inexact_array)
    state = optimizer.init(floats)
    expected, _ = optimizer.update(floats, state, floats)
    found, _ = optimizer.update(floats, state, eqx.filter(model, eqx.is_array))
    np.testing.assert_array_equal(found.weight, expected.weight)
    assert found.positions is None


def test_python_floats_as_leaves():
    optimizer = rmsprop(0.1, weight_decay=0.1, momentum=0.9)
    found = run(optimizer, {"a": 1.5}, {"a": 1.5})["a"]
    expected = run(optimizer, {"a": jnp.float32(1.5)}, {"a": jnp.float32(1.5)})["a"]
    np.testing.assert_array_equal(found, expected)


def test_a_mask_sees_the_parameters_as_they_are():
    params = {"kernel": jnp.ones(3, "bfloat16"), "norm": jnp.ones(3)}

    def narrow(params):
        return jax.tree.map(lambda p: p.dtype == jnp.bfloat16, params)

    optimizer = rmsprop(0.1, weight_decay=0.1, mask=narrow)
    updates = run(optimizer, jax.tree.map(jnp.zeros_like, params), params)
    assert (updates["kernel"] != 0).all()
    assert (updates["norm"] == 0).all()


# Python values.


class Rate:
    """A schedule whose number is changed from outside."""

    def __init__(self, value):
        self.value = value

    def __call__(self, step):
        return self.value * 0.5**step


def test_a_schedule_is_read_at_each_step():
    rate, x = Rate(1.0), jnp.ones(1)
    optimizer = rmsprop(rate, 1.0, 1.0)
    state = optimizer.init(x)
    first, state = optimizer.update(x, state)
    rate.value = 0.2
    second, _ = optimizer.update(x, state)
    np.testing.assert_allclose(second / first, 0.1, rtol=1e-6)
    for n in (2, 3):  # a tracer that it holds is not reused

        @jax.jit
        def step(value, x):
            rate.value = value
            return optimizer.update(x, optimizer.init(x))[0]

        step(0.1, jnp.ones(n))


def test_new_schedules_compile_nothing_and_are_let_go(caplog):
    x = jnp.ones(3)

    def use(rate):
        schedule = Rate(rate)
        optimizer = rmsprop(schedule, schedule, momentum=schedule)
        state = optimizer.init(x)
        for _ in range(2):
            _, state = optimizer.update(x, state)
        return weakref.ref(schedule)

    use(0.1)
    with jax.log_compiles(), caplog.at_level("WARNING"):
        kept = [use(0.1 / (i + 1)) for i in range(100)]
    assert [r for r in caplog.records if "ompil" in r.getMessage()] == []
    gc.collect()
    assert not any(ref() for ref in kept)


# Options that are on.

ZEROS = [0, 0.0, np.float64(0), np.float32(0), np.linspace(0, 1, 2)[0], jnp.float32(0)]


@pytest.mark.parametrize("zero", ZEROS, ids=lambda x: type(x).__name__)
def test_a_zero_of_any_type_switches_off(zero):
    g = {"w": jnp.array([1e-4, -1e-2, 0.0])}
    for make in (
        lambda m: conventions.tf_keras_v2(0.1, momentum=m),
        lambda m: conventions.timm(0.1, momentum=m, caution=True, eps=1e-3),
        lambda m: conventions.bitsandbytes(0.1, momentum=m),
        lambda m: conventions.laprop(0.1, weight_decay=m),
        lambda m: conventions.mxnet1(0.1, wd=m, clip_gradient=m, clip_weights=m),
        lambda m: rmsprop(0.1, weight_decay=m),
    ):
        expected, found = run(make(0.0), g), run(make(zero), g)
        np.testing.assert_array_equal(found["w"], expected["w"])


def rate_of(make):
    return next(iter(inspect.signature(make).parameters))


@pytest.mark.parametrize(
    "params",
    [True, pytest.param(False, marks=pytest.mark.slow)],
    ids=["params", "none"],
)
def test_injected_defaults_are_the_plain_ones(params):
    """Optax injects arrays for all numbers, so zeros are traced."""
    g = {"w": jnp.array([1e-4, 1e-2, 1.0])}
    plain, injected = {}, {}
    for name in sorted({*conventions.CONVENTIONS, *conventions.RECIPES}):
        make = getattr(conventions, name)
        plain[name] = make(0.1)
        injected[name] = optax.inject_hyperparams(make)(**{rate_of(make): 0.1})

    def steps(optimizers, states):
        found = {}
        for name, optimizer in optimizers.items():
            x = g if params or name in ("dreamer_v3", "mobilenet_v3") else None
            state = states[name]
            for _ in range(3):
                updates, state = optimizer.update(g, state, x)
            found[name] = updates["w"]
        return found

    def init(optimizers):
        return {name: optimizer.init(g) for name, optimizer in optimizers.items()}

    expected = jax.jit(lambda: steps(plain, init(plain)))()
    # The state is created with a concrete zero, or with a traced one.
    for states in (init(injected), jax.jit(lambda: init(injected))()):
        for name, found in jax.jit(lambda s: steps(injected, s))(states).items():
            # 1 - gamma is computed in float32: 3e-8 relative to 0.01, or to 0.001.
            np.testing.assert_allclose(found, expected[name], rtol=1e-4, err_msg=name)


def test_a_traced_decay_without_parameters_is_seen():
    x = jnp.ones(2)

    @jax.jit
    def step(decay):
        optimizer = rmsprop(0.1, weight_decay=decay)
        return optimizer.update(x, optimizer.init(x))[0]

    np.testing.assert_allclose(step(0.0), run(rmsprop(0.1), x, n=1), rtol=1e-6)
    assert jnp.isnan(step(0.1)).all()


# Names.


@pytest.mark.parametrize(
    "optimizer",
    [
        rmsprop(0.1),
        scale_by_rmsprop(),
        conventions.pytorch(0.1),
        conventions.keras(0.1, clipnorm=1.0),
        conventions.timm(0.1, momentum=0.9, caution=True),
        quantize_state(optax.adam(0.1), {"nu": bfloat16()}),
    ],
)
def test_extra_arguments_of_any_name(optimizer):
    x = {"w": jnp.ones(3)}
    names = "key seed names options h mask inner codecs change function value self n"
    extra = dict.fromkeys(names.split(), 1)
    found, _ = optimizer.update(x, optimizer.init(x), x, **extra)
    expected, _ = optimizer.update(x, optimizer.init(x), x)
    np.testing.assert_array_equal(found["w"], expected["w"])


class Family(NamedTuple):
    """Parameters with the names of a state's fields."""

    mu: jax.Array
    nu: jax.Array


def test_parameters_with_the_names_of_fields():
    x = Family(jnp.ones((64, 64)), jnp.ones((64, 64)))
    with pytest.raises(ValueError, match="^`codecs` names 'mu', but the state"):
        quantize_state(rmsprop(0.1), {"mu": int8()}).init(x)
    for codecs in ({"mu": bfloat16()}, {"nu": uint8()}):
        optimizer = quantize_state(rmsprop(0.1, centered=True), codecs)
        state = optimizer.init(x)
        for _ in range(2):
            for field in ("mu", "nu"):
                kept = getattr(state.inner_state, field)
                dtypes = {leaf.dtype == jnp.float32 for leaf in kept}
                assert dtypes == {field not in codecs}
            _, state = jax.jit(optimizer.update)(x, state)


def test_nested_parameters_with_the_names_of_fields():
    """The state's field decides the codec of each, also deeper in the tree."""
    x = {n: Family(jnp.ones((64, 64)), {"nu": jnp.ones(64)}) for n in ("a", "b")}
    for codecs in ({"mu": int8(0)}, {"mu": int8(0), "nu": uint8(0)}):
        optimizer = quantize_state(rmsprop(0.1, centered=True), codecs)
        plain = rmsprop(0.1, centered=True)
        state, whole = optimizer.init(x), plain.init(x)
        for step in range(3):
            g = jax.tree.map(lambda p, step=step: (1.0 + step) * p, x)
            _, state = jax.jit(optimizer.update)(g, state)
            _, whole = jax.jit(plain.update)(g, whole)
        for field in ("mu", "nu"):
            kept = jax.tree.leaves(getattr(state.inner_state, field))
            assert {p.dtype == jnp.float32 for p in kept} == {field not in codecs}
        found = dequantize_state(state, codecs)
        chex.assert_trees_all_close(found.nu, whole.nu, rtol=0.2)
        chex.assert_trees_all_close(found.mu, whole.mu, rtol=0.2)


# Places.


def test_parameters_in_the_hosts_memory():
    memory = jax.sharding.SingleDeviceSharding(
        jax.devices()[0], memory_kind="pinned_host"
    )
    x = {"w": jax.device_put(jnp.ones((4, 3)), memory)}
    for optimizer in (
        rmsprop(0.1, momentum=0.9),
        quantize_state(rmsprop(0.1), {"nu": bfloat16()}),
    ):
        state = jax.jit(optimizer.init)(x)
        assert optax.tree.get(state, "nu")["w"].shape == (4, 3)


def test_layers_on_different_devices_are_one_line():
    one, other = jax.devices()[:2]
    x = {"a": jax.device_put(jnp.ones(2), one), "b": jax.device_put(jnp.ones(2), other)}
    with pytest.raises(ValueError, match="^the leaves are on different devices: ") as e:
        rmsprop(0.1).init(x)
    assert "\n" not in str(e.value)


NARROWER = {jnp.float64: jnp.float32, jnp.complex128: jnp.complex64}


@pytest.mark.parametrize("jit", [False, True])
def test_a_state_made_under_x64_is_used_outside(jit):
    for optimizer in (
        rmsprop(0.1, momentum=0.9, weight_decay=0.1, bias_correction=True),
        rmsprop(0.1, centered=True),
    ):
        update = jax.jit(optimizer.update) if jit else optimizer.update
        for dtype in NARROWER:
            with flag("jax_enable_x64", True):
                x = jnp.array([1.0, -2.0], dtype)
                wide = optimizer.init(x)
            assert wide.nu.dtype == jnp.float64
            narrow = jnp.array([1, -2], NARROWER[dtype])
            expected = optimizer.update(narrow, optimizer.init(narrow), narrow)
            for g in (x, narrow):
                found = update(g, wide, g)
                assert jax.tree.map(jnp.result_type, found) == jax.tree.map(
                    jnp.result_type, expected
                )
                chex.assert_trees_all_close(found, expected, rtol=1e-6)


@pytest.mark.parametrize("jit", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize("state_place", [P(), P("d"), P(None, "d")], ids=str)
@pytest.mark.parametrize("place", [P(), P("d"), P(None, "d")], ids=str)
def test_a_state_sharded_otherwise_than_its_parameters(place, state_place, jit, rng):
    """For example, a state sharded over devices that replicate the parameters."""
    mesh = mesh_of_four(AxisType.Explicit)
    x = jnp.asarray(rng.normal(size=(8, 4)), jnp.float32)
    optimizer = rmsprop(0.1, momentum=0.9, weight_decay=0.1)
    expected = optimizer.update(x, optimizer.init(x), x)
    with jax.set_mesh(mesh):
        g = jax.device_put(x, NamedSharding(mesh, place))
        state = optimizer.init(jax.device_put(x, NamedSharding(mesh, state_place)))
        update = jax.jit(optimizer.update) if jit else optimizer.update
        updates, new = update(g, state, g)
    assert updates.sharding.is_equivalent_to(g.sharding, 2)
    assert new.nu.sharding.is_equivalent_to(state.nu.sharding, 2)
    assert new.momentum.sharding.is_equivalent_to(state.nu.sharding, 2)
    chex.assert_trees_all_close((updates, new), expected, rtol=1e-6)


# States of another optimizer.


@pytest.mark.parametrize(
    ("made", "used", "message"),
    [
        (
            rmsprop(0.1, momentum=0.9),
            rmsprop(0.1),
            "`state` has momentum, but the optimizer has no `momentum`: they must be "
            "made with the same options",
        ),
        (
            rmsprop(0.1),
            rmsprop(0.1, momentum=0.9),
            "`state` has no momentum, but the optimizer has `momentum`: they must be "
            "made with the same options",
        ),
        (
            rmsprop(0.1, centered=True),
            rmsprop(0.1),
            "`state` has mu, but the optimizer has no `centered`: they must be made "
            "with the same options",
        ),
        (
            rmsprop(0.1),
            rmsprop(0.1, bias_correction=True),
            "`state` has no weight, but the optimizer has `bias_correction`: they must "
            "be made with the same options",
        ),
        (
            optax.rmsprop(0.1),
            rmsprop(0.1),
            "`state` must be the RMSPropState that `init` returned, got tuple; "
            "`migrate.from_optax` makes one of Optax's",
        ),
        (
            optax.adam(0.1),
            rmsprop(0.1),
            "`state` must be the RMSPropState that `init` returned, got tuple",
        ),
        (
            quantize_state(rmsprop(0.1), {"nu": uint8(0)}),
            rmsprop(0.1),
            "`state` must be the RMSPropState that `init` returned, got "
            "QuantizedState; `dequantize_state` makes one of a state in fewer bits",
        ),
        (
            rmsprop(0.1),
            quantize_state(rmsprop(0.1), {"nu": uint8(0)}),
            "`state` must be the QuantizedState that `init` returned, got RMSPropState",
        ),
        (
            quantize_state(rmsprop(0.1), {"nu": int8(0)}),
            quantize_state(rmsprop(0.1), {"nu": uint8(0)}),
            "`state` has nu in int8, but `codecs` keeps it in uint8",
        ),
        (
            quantize_state(rmsprop(0.1), {"nu": bfloat16()}),
            quantize_state(rmsprop(0.1), {"nu": uint8(0)}),
            "`state` must be in full precision, but its nu is bfloat16; pass "
            "quantization.dequantize_state(state, ...)",
        ),
    ],
)
def test_a_state_of_another_optimizer_is_refused(made, used, message):
    x = jnp.ones(3)
    state = made.init(x)
    for update in (used.update, jax.jit(used.update)):
        with pytest.raises((TypeError, ValueError)) as refused:
            update(x, state, x)
        assert str(refused.value).split("\n-----")[0].strip() == message


def test_the_hyperparameters_of_a_pytorch_checkpoint():
    group = {"lr": 0.02, "alpha": 0.9, "eps": 1e-3, "momentum": 0.5, "centered": True}
    group |= {"weight_decay": 0.1, "maximize": False, "foreach": None, "params": [0]}
    found = migrate.settings({"state": {}, "param_groups": [group, group]})
    assert found == {n: group[n] for n in group if n not in ("foreach", "params")}
    conventions.pytorch(**found)
    other = group | {"lr": 0.1}
    with pytest.raises(ValueError, match=r"groups differ in lr, \[0.02, 0.1\]: make a"):
        migrate.settings({"state": {}, "param_groups": [group, other]})


# Finite in, finite out.


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"eps_in_sqrt": False},
        {"momentum": 0.9},
        {"momentum": 0.9, "lr_in_momentum": False},
        {"momentum": 0.9, "lr_in_momentum": False, "nesterov": True},
    ],
    ids=str,
)
def test_a_huge_learning_rate_overflows_nothing(options):
    for rate in (1e19, 1e30, 3e38):
        updates = run(rmsprop(rate, **options), jnp.array([1.0, -1.0]), n=20)
        assert np.isfinite(updates).all()
        np.testing.assert_array_equal(np.sign(updates), [-1, 1])


def test_a_variance_of_large_gradients_is_that_variance():
    """The bound that rounds a square before the addition is never reached."""
    optimizer = scale_by_rmsprop(0.5, centered=True)
    state = optimizer.init(jnp.zeros(1))
    for g in (1e15, -1e15):
        _, state = optimizer.update(jnp.array([g]), state)
    # The variance of 0, 1e15 and -1e15 with weights 1/4, 1/4 and 1/2.
    np.testing.assert_allclose(state.nu, [0.6875e30], rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "complex64"])
def test_finite_gradients_give_finite_steps(dtype):
    largest = float(jnp.finfo(dtype).max)
    pattern = np.array([1.0, -1.0, 1.0, 1.0, 1.0, -1.0, 0.0])
    gradients = jnp.asarray(np.outer(pattern, [largest, 100.0]), dtype)

    @jax.jit
    def worst():
        found = {}
        for options in (
            {"gamma": 1.0},
            {"gamma": 1.0, "eps_in_sqrt": False},
            {"centered": True},
            {"gamma": 1.0, "momentum": 0.9},
            {"gamma": 1.0, "momentum": 1.0, "nesterov": True},
            {"gamma": 1.0, "momentum": 1.0, "lr_in_momentum": False},
            {"gamma": 1.0, "momentum": 0.9, "weight_decay": 1e3},
            {"weight_decay": 1e3, "decoupled_weight_decay": False},
        ):
            optimizer = rmsprop(1e4, eps=0.0, **options)
            state = optimizer.init(gradients[0])
            for g in gradients:
                u, state = optimizer.update(g, state, gradients[0])
                finite = jax.tree.map(lambda a: jnp.isfinite(a).all(), (u, state))
                found[str(options), len(found)] = jnp.stack(jax.tree.leaves(finite))
        return {str(name): ok.all() for name, ok in found.items()}

    assert all(worst().values()), worst()


def test_a_constant_gradient_in_half_precision_stays_finite():
    g, optimizer = jnp.full(2, 1000.0, "float16"), scale_by_rmsprop(centered=True)

    def step(state, _):
        return optimizer.update(g, state)[::-1]

    _, updates = jax.lax.scan(step, optimizer.init(g), length=300)
    assert jnp.isfinite(updates).all()
