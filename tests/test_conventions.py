"""Each convention takes its framework's steps, each recipe the published ones."""

import contextlib
import inspect
import runpy
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jax_rmsprop import conventions
from tests import reference
from tests.frameworks import FRAMEWORKS, alone, quietly
from tests.helpers import axis, every, few_or_all, flag, train_each

# Keras and TensorFlow cast some numbers to float32: these are exact.
DECAY, BOUND = 2.0**-7, 2.0**-1
# Large enough to show its side of the root.
EPS = 2.0**-10

CENTERED = axis("centered", False, True)
MOMENTUM = axis("momentum", 0.0, 0.9)
WEIGHT_DECAY = axis("weight_decay", 0.0, DECAY)
NORMS = [{}, {"clipnorm": BOUND}, {"global_clipnorm": BOUND}]
OPTIONS = {
    "pytorch": [
        CENTERED,
        MOMENTUM,
        WEIGHT_DECAY,
        axis("maximize", False, True),
        axis("eps", EPS),
    ],
    "keras": [
        CENTERED,
        MOMENTUM,
        axis("weight_decay", None, DECAY),
        [*NORMS, {"clipvalue": BOUND}],
        axis("loss_scale_factor", None, 3.0),
        axis("gradient_accumulation_steps", None, 3),
        axis("epsilon", EPS),
    ],
    "tensorflow1": [CENTERED, MOMENTUM, axis("epsilon", EPS)],
    "tf_keras_v2": [
        CENTERED,
        MOMENTUM,
        NORMS,
        axis("clipvalue", None, BOUND),
        axis("decay", 0.0, DECAY),
        axis("epsilon", EPS),
    ],
    "timm": [
        CENTERED,
        MOMENTUM,
        WEIGHT_DECAY,
        axis("decoupled_decay", False, True),
        axis("corrected_weight_decay", False, True),
        axis("lr_in_momentum", False, True),
        axis("caution", False, True),
        axis("eps", EPS),
    ],
    "stable_baselines3": [CENTERED, MOMENTUM, WEIGHT_DECAY, axis("eps", EPS)],
    "bitsandbytes": [WEIGHT_DECAY, axis("eps", EPS)],
    "sonnet": [CENTERED, MOMENTUM, axis("epsilon", EPS)],
    "mlx": [axis("eps", EPS)],
    # timm's copy of it, with another weight decay.
    "laprop": [axis("betas", (0.9, 0.999), (0.5, 0.9)), axis("eps", EPS)],
}


@contextlib.contextmanager
def precision(dtype):
    """The JAX configuration for such parameters."""
    with flag("jax_enable_x64", dtype == "float64"):
        yield


def problem(dtype, steps=200):
    """Parameters, gradients over six orders of magnitude, a rate for each step.

    The numbers are exact in float32, for any dtype.
    """
    rng = np.random.default_rng(0)

    def cast(x):
        return x.astype("float32").astype(dtype)

    x, gradients = {}, {}
    for name, shape in {"bias": (5,), "kernel": (4, 5)}.items():
        x[name] = cast(rng.normal(size=shape))
        scale = 10 ** rng.uniform(-3, 3, shape)
        noise = rng.normal(size=(steps, *shape))
        gradients[name] = cast(scale * (0.3 + noise))
    return x, gradients, cast(0.01 * (1 + 0.9 * np.sin(np.arange(steps))))


def rates_as_schedule(rates):
    return lambda step: jnp.asarray(rates)[step]


def convention(name, rates, options):
    """Our optimizer, with the rate of each step."""
    if name == "timm" and options.get("corrected_weight_decay"):
        options = options | {"max_lr": 0.01}
    return getattr(conventions, name)(rates_as_schedule(rates), **options)


def ours(cases, x, gradients, rates):
    """The trajectories of many conventions and options, in one program."""
    with precision(str(rates.dtype)):
        optimizers = [convention(name, rates, options) for name, options in cases]
        found = train_each(dict(enumerate(optimizers)), x, gradients)
    return [trajectory for trajectory, _ in found.values()]


def theirs(name, options, x, gradients, rates):
    # timm takes its initial rate as the highest.
    made = {"lr": 0.01} if name == "timm" else {}
    return FRAMEWORKS[name](x, options | made).run(gradients, rates)


def error(actual, expected):
    """The largest error of any parameter at any step, relative to its largest value."""
    chex.assert_trees_all_equal_structs(actual, expected)
    return max(
        (np.abs(actual[n] - expected[n]) / np.abs(expected[n]).max(0)).max()
        for n in expected
    )


def assert_as_exact(chosen, truths, exact, single, its):
    """Exact in float64; in float32 about as near to the truth as the library."""
    wrong = {}
    for options, truth, *runs in zip(chosen, truths, exact, single, its, strict=True):
        in_double, our, its_own = (error(run, truth) for run in runs)
        if not (in_double < 1e-10 and our < 1e-4 and our <= 2 * its_own):
            wrong[str(options)] = in_double, our, its_own
    assert not wrong


@few_or_all
@pytest.mark.parametrize("name", OPTIONS)
def test_the_real_library(name, combinations, standard_promotion):
    chosen = combinations(*OPTIONS[name])
    cases = [(name, options) for options in chosen]
    single, double = problem("float32", 1000), problem("float64", 1000)
    truth = theirs if "float64" in FRAMEWORKS[name].dtypes else by_hand
    assert_as_exact(
        chosen,
        [truth(name, options, *double) for options in chosen],
        ours(cases, *double),
        ours(cases, *single),
        [theirs(name, options, *single) for options in chosen],
    )


# Libraries that do not install everywhere, in float64 NumPy after their published code,
# which the convention's docstring links.


def chainer(alpha=0.99, eps=1e-8, eps_inside_sqrt=False):
    return {"eps_in_sqrt": eps_inside_sqrt}, {"gamma": alpha, "eps": eps}


def paddle(rho=0.95, epsilon=1e-6, momentum=0.0, centered=False, weight_decay=None):
    return (
        {
            "momentum": momentum,
            "centered": centered,
            "decoupled_weight_decay": False,
        },
        {"gamma": rho, "eps": epsilon, "weight_decay": weight_decay or 0.0},
    )


def mxnet1(
    gamma1=0.9,
    gamma2=0.9,
    epsilon=1e-8,
    centered=False,
    clip_weights=None,
    rescale_grad=1.0,
    wd=0.0,
    clip_gradient=None,
):
    def gradient(g, x):
        g = rescale_grad * g + wd * x
        return g if clip_gradient is None else np.clip(g, -clip_gradient, clip_gradient)

    return (
        {"centered": centered, "momentum": gamma2 if centered else None},
        {"gamma": gamma1, "eps": epsilon},
        gradient,
        clip_weights,
    )


def mxnet2(
    rho=0.9,
    momentum=0.9,
    epsilon=1e-8,
    centered=False,
    clip_weights=None,
    rescale_grad=1.0,
    wd=0.0,
    clip_gradient=None,
):
    def gradient(g, x):
        g = rescale_grad * g
        if clip_gradient is not None:
            g = np.clip(g, -clip_gradient, clip_gradient)
        return g + wd * x

    return (
        {
            "eps_in_sqrt": centered,
            "centered": centered,
            "momentum": momentum if centered else None,
        },
        {"gamma": rho, "eps": epsilon},
        gradient,
        clip_weights,
    )


def flax_legacy(beta2=0.9, eps=1e-8, centered=False):
    return {"eps_in_sqrt": False, "centered": centered}, {"gamma": beta2, "eps": eps}


def jax_example_libraries(gamma=0.9, eps=1e-8, momentum=0.0):
    return {"momentum": momentum}, {"gamma": gamma, "eps": eps}


def d2l(gamma=0.9):
    return {}, {"gamma": gamma, "eps": 1e-6}


def bitsandbytes(alpha=0.99, eps=1e-8, weight_decay=0.0):
    return (
        {"eps_in_sqrt": False, "decoupled_weight_decay": False},
        {"gamma": alpha, "eps": eps, "weight_decay": weight_decay},
    )


def nature_dqn():
    """The Lua code's g and g2 with decay 0.95, and 0.01 added before the root."""
    return {"centered": True}, {"gamma": 0.95, "eps": 0.01}


def dopamine_dqn():
    return {"centered": True, "initial_scale": 1.0}, {"gamma": 0.95, "eps": 1e-5}


def dqn_zoo():
    return {"centered": True}, {"gamma": 0.95, "eps": 0.01 / 32**2}


def impala():
    return {"eps_in_sqrt": False}, {"gamma": 0.99, "eps": 0.01}


def efficientnet():
    return {"momentum": 0.9, "initial_scale": 1.0}, {"gamma": 0.9, "eps": 1e-3}


def mobilenet_v3():
    return (
        {
            "eps_in_sqrt": False,
            "momentum": 0.9,
            "lr_in_momentum": False,
            "decoupled_weight_decay": False,
        },
        {"gamma": 0.9, "eps": 0.0316, "weight_decay": 1e-5},
    )


class LaProp:
    """`LaProp.step` of its authors' laprop.py, one array."""

    def __init__(self, betas=(0.9, 0.999), eps=1e-15, weight_decay=0.0):
        self.betas, self.eps, self.weight_decay = betas, eps, weight_decay
        self.nu = self.b = self.of_rate = self.of_one = 0.0

    def step(self, x, g, rate):
        beta1, beta2 = self.betas
        self.nu = self.nu * beta2 + (1 - beta2) * g * g
        self.of_rate = self.of_rate * beta1 + (1 - beta1) * rate
        self.of_one = self.of_one * beta2 + (1 - beta2)
        denominator = np.sqrt(self.nu / self.of_one) + self.eps
        self.b = self.b * beta1 + (1 - beta1) * rate * g / denominator
        x = x - self.b / (self.of_rate / rate if rate else 1.0)
        return x - self.weight_decay * x


class DreamerV3:
    """The chain of dreamerv3/agent.py and embodied/jax/opt.py, one array."""

    def __init__(self, agc=0.3, eps=1e-20, beta1=0.9, beta2=0.999, warmup=1000):
        self.agc, self.eps, self.betas, self.warmup = agc, eps, (beta1, beta2), warmup
        self.nu = self.mu = self.t = 0

    def step(self, x, g, rate):
        beta1, beta2 = self.betas
        upper = self.agc * max(1e-3, np.sqrt((x * x).sum()))
        g = g / max(1.0, np.sqrt((g * g).sum()) / upper) if self.agc else g
        warm = min(1.0, self.t / self.warmup) if self.warmup else 1.0
        self.t += 1
        self.nu = beta2 * self.nu + (1 - beta2) * g * g
        u = g / (np.sqrt(self.nu / (1 - beta2**self.t)) + self.eps)
        self.mu = beta1 * self.mu + (1 - beta1) * u
        return x - rate * warm * self.mu / (1 - beta1**self.t)


STEPPERS = {"laprop": LaProp, "dreamer_v3": DreamerV3}


def by_hand(name, options, x, gradients, rates):
    if name in STEPPERS:
        trajectory = {}
        for leaf in x:
            stepper, now = STEPPERS[name](**options), x[leaf].astype(float)
            trajectory[leaf] = np.empty(gradients[leaf].shape)
            for t, (g, rate) in enumerate(zip(gradients[leaf], rates, strict=True)):
                trajectory[leaf][t] = now = stepper.step(now, g, float(rate))
        return trajectory
    settings, numbers, *rest = globals()[name](**options)
    gradient, bound = rest or (lambda g, x: g, None)
    trajectory = {}
    for leaf in x:
        stepper = reference.RMSProp(x[leaf], **settings)
        trajectory[leaf] = np.empty(gradients[leaf].shape)
        for t, (g, rate) in enumerate(zip(gradients[leaf], rates, strict=True)):
            stepper.step(gradient(g, stepper.x), learning_rate=float(rate), **numbers)
            if bound is not None:
                stepper.x = np.clip(stepper.x, -bound, bound)
            trajectory[leaf][t] = stepper.x
    return trajectory


MXNET = [
    CENTERED,
    axis("clip_weights", None, 1.0),
    axis("rescale_grad", 1.0, 2.0),
    axis("wd", 0.0, DECAY),
    axis("clip_gradient", None, BOUND),
    axis("epsilon", EPS),
]
BY_HAND = {
    "chainer": [axis("eps_inside_sqrt", False, True), axis("eps", EPS)],
    "paddle": [
        CENTERED,
        MOMENTUM,
        axis("weight_decay", None, DECAY),
        axis("epsilon", EPS),
    ],
    "mxnet1": MXNET,
    "mxnet2": MXNET,
    "flax_legacy": [CENTERED, axis("eps", EPS)],
    "jax_example_libraries": [MOMENTUM, axis("eps", EPS)],
    "d2l": [axis("gamma", 0.9, 0.99)],
    "laprop": [axis("betas", (0.9, 0.999), (0.5, 0.9)), WEIGHT_DECAY],
    # The problem's rates start at the first step.
    "dreamer_v3": [axis("agc", 0.0, 0.3), axis("beta1", 0.5, 0.9), axis("warmup", 0)],
}
RECIPES = sorted(conventions.RECIPES)


@few_or_all
@pytest.mark.parametrize("names", [[n] for n in BY_HAND] + [[*RECIPES]], ids="-".join)
def test_the_published_code(names, combinations, standard_promotion):
    cases = [
        (name, options)
        for name in names
        for options in combinations(*BY_HAND.get(name, [[{}]]))
    ]
    double = problem("float64")
    truths = [by_hand(*case, *double) for case in cases]
    for case, truth, found in zip(cases, truths, ours(cases, *double), strict=True):
        assert error(found, truth) < 1e-10, case
    few = slice(None) if combinations is every else slice(-1, None)
    narrow = ours(cases[few], *problem("float32"))
    for case, truth, found in zip(cases[few], truths[few], narrow, strict=True):
        assert error(found, truth) < 1e-4, case


@pytest.mark.parametrize("of_time", [False, True])
def test_the_warm_up_of_dreamer_v3(of_time, standard_promotion):
    """It rises from 0 to the rate's first value; only then a schedule starts."""
    x, gradients, _ = problem("float64", steps=30)

    def later(step):
        return 0.01 / (1 + step) if of_time else 0.01

    with precision("float64"):
        lr = later if of_time else 0.01
        optimizer = conventions.dreamer_v3(lr, warmup=10)
        trajectory, _ = train_each({"": optimizer}, x, gradients)[""]
    rates = np.array([later(max(0, t - 10)) for t in range(30)])
    expected = by_hand("dreamer_v3", {"warmup": 10}, x, gradients, rates)
    assert error(trajectory, expected) < 1e-10
    for leaf in x:
        np.testing.assert_array_equal(trajectory[leaf][0], x[leaf])


def test_laprop_with_a_rate_of_zero(standard_promotion):
    x = jnp.array([1.0, -2.0])
    optimizer = conventions.laprop(0.0)
    updates, _ = optimizer.update(x, optimizer.init(x))
    np.testing.assert_array_equal(updates, 0.0)


def test_an_eps_belongs_to_the_scale_of_the_gradient(standard_promotion):
    """DQN Zoo's mean of a batch of 32 has the steps of DQN's sum."""
    x, gradients, rates = problem("float64")
    mean = {name: g / 32 for name, g in gradients.items()}
    (summed,) = ours([("nature_dqn", {})], x, gradients, rates)
    for name, right in (("dqn_zoo", True), ("nature_dqn", False)):
        (found,) = ours([(name, {})], x, mean, rates)
        assert error(found, summed) < 1e-10 if right else error(found, summed) > 1e-3


@few_or_all
def test_optax_itself(combinations, standard_promotion):
    # Centered and corrected together is an error: see below.
    chosen = combinations(
        axis("initial_scale", 0.0, 1.0),
        axis("eps_in_sqrt", False, True),
        [{}, {"centered": True}, {"bias_correction": True}],
        [
            {},
            {"momentum": 0.0, "nesterov": True},
            {"momentum": 0.9},
            {"momentum": 0.9, "nesterov": True},
        ],
        axis("eps", EPS),
    )
    cases = [("optax", options) for options in chosen]
    its = {}
    for dtype in ("float64", "float32"):
        x, gradients, rates = problem(dtype, 1000)
        with precision(dtype):
            optimizers = [optax.rmsprop(rates_as_schedule(rates), **o) for o in chosen]
            found = train_each(dict(enumerate(optimizers)), x, gradients)
        its[dtype] = [trajectory for trajectory, _ in found.values()]
    assert_as_exact(
        chosen,
        its["float64"],
        ours(cases, *problem("float64", 1000)),
        ours(cases, *problem("float32", 1000)),
        its["float32"],
    )


def test_jax_example_libraries_itself(standard_promotion):
    from jax.example_libraries import optimizers

    x, gradients, rates = problem("float64")
    schedule = rates_as_schedule(rates)
    triples = {
        0.0: optimizers.rmsprop(schedule, eps=EPS),
        0.9: optimizers.rmsprop_momentum(schedule, eps=EPS, momentum=0.9),
    }
    cases = [("jax_example_libraries", {"momentum": m, "eps": EPS}) for m in triples]
    found = ours(cases, x, gradients, rates)
    for our, (init, update, get) in zip(found, triples.values(), strict=True):

        def step(state, t_g, update=update, get=get):
            state = update(*t_g, state)
            return state, get(state)

        with precision("float64"):
            steps = jnp.arange(len(rates)), gradients
            _, truth = jax.lax.scan(step, init(x), steps)
        assert error(our, jax.device_get(truth)) < 1e-10


def test_a_schedule_that_begins_later(standard_promotion):
    x, gradients, rates = problem("float32", steps=20)
    later = conventions.mxnet1(rates_as_schedule(rates), begin_num_update=10)
    at_once = conventions.mxnet1(rates_as_schedule(rates[10:]))
    first = {n: g[:10] for n, g in gradients.items()}
    found = train_each({"later": later, "at once": at_once}, x, first)
    chex.assert_trees_all_equal(found["later"][0], found["at once"][0])


def test_pytorch_with_complex_parameters(standard_promotion):
    """PyTorch averages the squares of the two parts separately."""
    x, gradients, rates = problem("float64")
    x = {"z": x["kernel"] + 1j * x["kernel"][::-1]}
    gradients = {"z": gradients["kernel"] + 1j * gradients["kernel"][:, ::-1] / 7}
    options = {"momentum": 0.9, "centered": True, "eps": EPS}
    truth = theirs("pytorch", options, x, gradients, rates)
    (our,) = ours([("pytorch", options)], x, gradients, rates)
    assert error(our, truth) < 1e-10


# Names, order and defaults.


def signature(function, *without):
    parameters = inspect.signature(function).parameters.values()
    return {
        p.name: p.default
        for p in parameters
        if p.name not in ("self", *without) and p.kind is not p.VAR_KEYWORD
    }


def library(name):
    """The function or class that a convention names, and its extra arguments."""
    if name == "pytorch":
        return quietly("torch").optim.RMSprop, "params"
    if name == "keras":
        return (quietly("keras").optimizers.RMSprop,)
    if name == "tensorflow1":
        return (quietly("tensorflow").compat.v1.train.RMSPropOptimizer,)
    if name == "tf_keras_v2":
        return (quietly("tf_keras").optimizers.legacy.RMSprop,)
    if name == "timm":
        return alone("timm.optim.rmsprop_tf").RMSpropTF, "params"
    if name == "stable_baselines3":
        module = "stable_baselines3.common.sb2_compat.rmsprop_tf_like"
        return alone(module).RMSpropTFLike, "params"
    if name == "bitsandbytes":
        return quietly("bitsandbytes").optim.RMSprop, "params"
    if name == "optax":
        return (optax.rmsprop,)
    return (quietly("mlx.optimizers").RMSprop,)


# Arguments that are ignored here, or accept only their default.
LEFT_OUT = {
    *("use_ema", "ema_momentum", "ema_overwrite_frequency"),
    *("optim_bits", "args", "min_8bit_size", "percentile_clipping", "block_wise"),
}


# LaProp's code is not a package. Sonnet's decorator hides the signature.
@pytest.mark.parametrize("name", sorted({*FRAMEWORKS, "optax"} - {"laprop", "sonnet"}))
def test_the_signature_is_the_librarys(name):
    function, *without = library(name)
    its = signature(function, *without)
    our = signature(getattr(conventions, name))
    wanted = {n: x for n, x in its.items() if n not in LEFT_OUT}
    if name == "bitsandbytes":
        del wanted["centered"]  # which it rejects itself
    assert [argument for argument in our if argument in its] == list(wanted)
    for argument, default in wanted.items():
        assert our[argument] == default, argument
    # Our extra arguments are keyword-only.
    besides = set(our) - set(its)
    parameters = inspect.signature(getattr(conventions, name)).parameters
    assert all(parameters[n].kind is parameters[n].KEYWORD_ONLY for n in besides)


def test_every_convention_is_in_the_table():
    functions = {
        n
        for n in conventions.__all__
        if inspect.isfunction(getattr(conventions, n)) and n != "explain"
    }
    assert functions == set(conventions.CONVENTIONS) | set(conventions.RECIPES)
    assert set(OPTIONS) | {*BY_HAND, *RECIPES, "optax"} == functions


def test_the_table_is_frozen():
    with pytest.raises(TypeError):
        conventions.CONVENTIONS["pytorch"] = None
    with pytest.raises(AttributeError):
        conventions.CONVENTIONS["pytorch"].eps_in_sqrt = True
    with pytest.raises(TypeError):
        conventions.RECIPES["impala"].settings["eps"] = 1.0


# The interface of an Optax transformation.


def every_convention():
    """Each convention with just a learning rate."""
    required = {"learning_rate", "step_size", "lr"}
    optimizers = {}
    for name in sorted({*conventions.CONVENTIONS, *conventions.RECIPES}):
        make = getattr(conventions, name)
        optimizers[name] = make(**{n: 0.1 for n in signature(make) if n in required})
    return optimizers


@pytest.mark.parametrize(
    "dtypes",
    [
        ["float16", "bfloat16", "float32", "complex64"],
        pytest.param(["float64"], marks=pytest.mark.slow),
    ],
    ids=["x32", "x64"],
)
def test_interface(dtypes, request, standard_promotion):
    """Dtypes are kept, extra arguments accepted, and one program serves all steps."""
    if "float64" in dtypes:
        request.getfixturevalue("x64")
    optimizers = every_convention()
    x = {dtype: jnp.ones((2, 3), dtype) for dtype in dtypes} | {"b": [jnp.zeros(3)]}

    @jax.jit
    def step(states):
        return {
            name: optimizer.update(x, states[name], x, value=1.0)
            for name, optimizer in optimizers.items()
        }

    states = jax.jit(lambda: {n: o.init(x) for n, o in optimizers.items()})()
    for _ in range(3):
        for name, (updates, state) in step(states).items():
            chex.assert_trees_all_equal_shapes_and_dtypes(updates, x)
            chex.assert_trees_all_equal_shapes_and_dtypes(state, states[name])
            chex.assert_tree_all_finite(updates)
            states[name] = state
    assert step._cache_size() == 1


def test_the_same_bits_outside_a_jit(standard_promotion):
    x = {"w": jnp.ones((2, 3)), "b": jnp.zeros(3)}
    optimizers = every_convention()
    states = {name: optimizer.init(x) for name, optimizer in optimizers.items()}
    compiled = jax.jit(
        lambda states: {n: o.update(x, states[n], x) for n, o in optimizers.items()}
    )(states)
    for name, optimizer in optimizers.items():
        eager = optimizer.update(x, states[name], x)
        chex.assert_trees_all_equal(eager, compiled[name])


def test_a_tracer_for_a_number(standard_promotion):
    """Conventions can be swept with vmap."""

    def first_step(alpha, momentum):
        optimizer = conventions.pytorch(0.1, alpha, momentum=momentum)
        g = jnp.ones(3)
        return optimizer.update(g, optimizer.init(g))[0]

    alphas = jnp.array([0.5, 0.9, 0.99])
    steps = jax.vmap(first_step, (0, None))(alphas, 0.9)
    np.testing.assert_allclose(steps[:, 0], -0.1 / np.sqrt(1 - alphas), rtol=1e-5)


@pytest.mark.parametrize("name", ["pytorch", "keras", "timm", "mxnet1"])
def test_injected_hyperparameters(name, standard_promotion):
    """A number that Optax injects is an array in the state and can change there."""
    rate = {"pytorch": "lr", "timm": "lr"}.get(name, "learning_rate")
    make = optax.inject_hyperparams(getattr(conventions, name))
    optimizer = make(**{rate: 0.1})
    params = {"w": jnp.ones(3)}
    state = optimizer.init(params)
    _, state = optimizer.update(params, state, params)
    state.hyperparams[rate] = jnp.asarray(0.0)
    updates, _ = optimizer.update(params, state, params)
    np.testing.assert_array_equal(updates["w"], 0.0)


def test_traced_numbers_widen_nothing(standard_promotion):
    def first_step(bound):
        optimizer = conventions.mxnet1(
            0.1, wd=bound, rescale_grad=bound, clip_gradient=bound, clip_weights=bound
        )
        x = {"w": jnp.ones(3, jnp.bfloat16)}
        return optimizer.update(x, optimizer.init(x), x)[0]

    assert jax.vmap(first_step)(jnp.array([0.5, 0.25]))["w"].dtype == jnp.bfloat16


def test_the_highest_rate_may_be_another(standard_promotion):
    """If lr is half of max_lr, the corrected decay is half."""
    x = {"w": jnp.ones(3)}
    zero = {"w": jnp.zeros(3)}

    def decay(**options):
        options = {"weight_decay": 0.25, "decoupled_decay": True} | options
        optimizer = conventions.timm(0.5, **options)
        return optimizer.update(zero, optimizer.init(x), x)[0]["w"][0]

    assert decay() == -0.125
    assert decay(corrected_weight_decay=True) == -0.125
    assert decay(corrected_weight_decay=True, max_lr=1.0) == -0.0625


# Bad input.


A_NUMBER = "a finite number >= 0"
A_SCHEDULE = "or a schedule (a function from step to number)"
BOOL = "must be True or False, got 1"
ONE_OF = (
    "only one of `clipnorm`, `{}global_clipnorm` may be given, got `clipnorm` 1.0 and"
)
BAD = {
    "pytorch(alpha=1.5)": f"`alpha` must be in [0, 1] {A_SCHEDULE}, got 1.5",
    "pytorch(lr=-1.0)": f"`lr` must be {A_NUMBER} {A_SCHEDULE}, got -1.0",
    "pytorch(maximize=1)": f"`maximize` {BOOL}",
    "tensorflow1(0.1, epsilon=np.nan)": f"`epsilon` must be {A_NUMBER}, got nan",
    "mxnet1(gamma2='x', centered=True)": f"`gamma2` must be in [0, 1] {A_SCHEDULE}, "
    "got 'x'",
    "mxnet2(wd=-0.1)": f"`wd` must be {A_NUMBER}, got -0.1",
    "mxnet2(clip_gradient=-1.0)": f"`clip_gradient` must be {A_NUMBER}, got -1.0",
    "mxnet2(centered=1)": f"`centered` {BOOL}",
    "flax_legacy(0.1, beta2=None)": f"`beta2` must be in [0, 1] {A_SCHEDULE}, got None",
    "keras(clipnorm=1.0, clipvalue=0.5)": ONE_OF.format("clipvalue`, `")
    + " `clipvalue` 0.5",
    "keras(gradient_accumulation_steps=1)": "`gradient_accumulation_steps` must be an "
    "integer >= 2, got 1",
    "keras(loss_scale_factor=0)": "`loss_scale_factor` must be a finite number > 0, "
    "got 0",
    "tf_keras_v2(clipnorm=0.0)": "`clipnorm` must be a finite number > 0, got 0.0",
    "tf_keras_v2(clipnorm=1.0, global_clipnorm=2.0)": ONE_OF.format("")
    + " `global_clipnorm` 2.0",
    "timm(lambda t: 1, decoupled_decay=True, corrected_weight_decay=True)": "`max_lr` "
    "must be the highest learning rate if `lr` is a schedule and "
    "`corrected_weight_decay` is True, got None",
    "bitsandbytes(momentum=0.9)": "`momentum` must be 0, got 0.9; bitsandbytes takes a "
    "momentum and ignores it: pass 0 for the same steps, or use conventions.pytorch "
    "for the momentum",
    "chainer(eps_inside_sqrt=1)": f"`eps_inside_sqrt` {BOOL}",
    "optax(0.1, centered=True, bias_correction=True)": "`bias_correction` must be "
    "False if `centered` is True, got True: the variance after the first step is zero "
    "by construction",
    "laprop(betas=0.9)": "`betas` must be a pair of numbers in [0, 1], got 0.9",
    "laprop(betas=(0.9, 1.5))": "`betas` must be in [0, 1], got 1.5",
    "dreamer_v3(agc=-1.0)": f"`agc` must be {A_NUMBER}, got -1.0",
    "dreamer_v3(beta2=2)": f"`beta2` must be in [0, 1] {A_SCHEDULE}, got 2.0",
    "dreamer_v3(warmup=0.5)": "`warmup` must be an integer >= 0, got 0.5",
    "impala('x')": f"`learning_rate` must be {A_NUMBER} {A_SCHEDULE}, got 'x'",
}


@pytest.mark.parametrize("call", BAD)
def test_bad_input(call):
    with pytest.raises((TypeError, ValueError)) as refused:
        eval(f"conventions.{call}")
    assert str(refused.value) == BAD[call]


def test_weights_are_clipped_only_if_they_are_passed():
    optimizer = conventions.mxnet1(clip_weights=1.0)
    with pytest.raises(ValueError, match="`params` must be passed to `update` when"):
        optimizer.update(jnp.ones(2), optimizer.init(jnp.ones(2)))


# The printed table.


def test_explain(capsys):
    conventions.explain()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + len(conventions.CONVENTIONS) + len(conventions.RECIPES)
    assert len({line.count("|") for line in lines}) == 1
    conventions.explain("timm")

    def cells(line):
        return [cell.strip() for cell in line.split("|")]

    assert cells(capsys.readouterr().out.splitlines()[2]) in map(cells, lines)
    with pytest.raises(ValueError, match="`name` must be one of pytorch, keras, .*'x'"):
        conventions.explain("x")


def test_explain_from_the_command_line(capsys, monkeypatch):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["jax_rmsprop.conventions", *arguments])
        runpy.run_module("jax_rmsprop.conventions", run_name="__main__")
        return capsys.readouterr().out

    conventions.explain()
    assert capsys.readouterr().out == run()
    with pytest.raises(SystemExit) as refused:
        run("pytorch2")
    assert str(refused.value).startswith("`name` must be one of pytorch")
    assert "\n" not in str(refused.value)
