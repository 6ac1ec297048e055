"""A training resumes in another framework with the same steps."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jax_rmsprop import conventions, migrate, rmsprop, scale_by_rmsprop
from tests.frameworks import FRAMEWORKS, quietly
from tests.helpers import axis, every, few_or_all, mesh_of_four, pairs, train_each
from tests.test_conventions import (
    CENTERED,
    DECAY,
    EPS,
    MOMENTUM,
    convention,
    error,
    precision,
    problem,
    rates_as_schedule,
)
from tests.test_conventions import OPTIONS as conventions_options

HALF = 100


def layout(tree):
    return {"bias": tree["b"], "kernel": tree["dense"]["w"].T}


def to_ours(named):
    """Their arrays in our tree, with any leading axes."""
    return {
        "b": named["bias"],
        "dense": {"w": np.swapaxes(named["kernel"], -1, -2)},
    }


def to_theirs(tree):
    return {"bias": tree["b"], "kernel": np.swapaxes(tree["dense"]["w"], -1, -2)}


OF_TORCH = {
    "pytorch": (migrate.from_torch, migrate.to_torch),
    "timm": (migrate.from_timm, migrate.to_timm),
    "bitsandbytes": (migrate.from_bitsandbytes, migrate.to_bitsandbytes),
}


class Their:
    """The differences between the frameworks: where the state is."""

    def __init__(self, name, options):
        self.name, self.options = name, options
        self.convention = getattr(conventions, name)
        self.made = {"lr": 0.01} if name == "timm" else {}

    def begin(self, x):
        return FRAMEWORKS[self.name](x, self.options | self.made)

    def save(self, theirs, params, optimizer):
        if self.name in OF_TORCH:
            read, _ = OF_TORCH[self.name]
            checkpoint = theirs.optimizer.state_dict()
            return read(checkpoint, params, layout=layout, optimizer=optimizer)
        if self.name == "keras":
            return migrate.from_keras(
                theirs.optimizer.variables, params, layout=layout, optimizer=optimizer
            )
        return migrate.from_tf1(
            {
                slot: {
                    name: theirs.optimizer.get_slot(v, slot).numpy()
                    for name, v in zip(theirs.names, theirs.x, strict=True)
                }
                for slot in theirs.optimizer.get_slot_names()
            },
            params,
            layout=layout,
            count=HALF,
            optimizer=optimizer,
        )

    def load(self, theirs, state, params):
        if self.name in OF_TORCH:
            _, write = OF_TORCH[self.name]
            theirs.optimizer.load_state_dict(
                write(state, params, theirs.optimizer, layout=layout)
            )
        elif self.name == "keras":
            variables = theirs.optimizer.variables
            values = migrate.to_keras(state, params, variables, layout=layout)
            for variable, value in zip(variables, values, strict=True):
                variable.assign(value)
        else:
            slots = migrate.to_tf1(state, params, layout=layout)
            for slot in theirs.optimizer.get_slot_names():
                for name, v in zip(theirs.names, theirs.x, strict=True):
                    theirs.optimizer.get_slot(v, slot).assign(slots[slot][name])
            if hasattr(theirs.optimizer, "iterations"):
                theirs.optimizer.iterations.assign(HALF)


def train(optimizer, x, gradients, state=None):
    """Every step's parameters, and the last state."""
    given = ({"": x}, gradients, {"": state}) if state is not None else (x, gradients)
    return train_each({"": optimizer}, *given)[""]


def halves(name, chosen, dtype):
    """The second half of a training with each of the options, computed in three ways.

    Entirely in the other framework; resumed here; and started here, resumed there.
    """
    x, gradients, rates = problem(dtype, 2 * HALF)
    first = {n: g[:HALF] for n, g in gradients.items()}
    second = {n: g[HALF:] for n, g in gradients.items()}
    cases = range(len(chosen))
    their = [Their(name, options) for options in chosen]
    begun = [t.begin(x) for t in their]
    middle = [{n: t[-1] for n, t in b.run(first, rates[:HALF]).items()} for b in begun]
    with precision(dtype):
        optimizers = {i: convention(name, rates, chosen[i]) for i in cases}
        params = {i: jax.tree.map(jnp.asarray, to_ours(middle[i])) for i in cases}
        states = {i: their[i].save(begun[i], params[i], optimizers[i]) for i in cases}
        for i in cases:
            expected = jax.eval_shape(optimizers[i].init, params[i])
            chex.assert_trees_all_equal_shapes_and_dtypes(states[i], expected)
        came = train_each(optimizers, params, to_ours(second), states)
        stays = train_each(optimizers, to_ours(x), to_ours(first))
        for i in cases:
            trajectory, state = stays[i]
            params = jax.tree.map(lambda t: t[-1], trajectory)
            resumed = their[i].begin(to_theirs(params))
            their[i].load(resumed, state, params)
            went = resumed.run(second, rates[HALF:])
            stayed = begun[i].run(second, rates[HALF:])
            yield stayed, to_theirs(came[i][0]), went


OPTIONS = {
    name: conventions_options[name]
    for name in ("pytorch", "tensorflow1", "bitsandbytes")
} | {
    "keras": [
        CENTERED,
        MOMENTUM,
        axis("weight_decay", None, DECAY),
        axis("epsilon", EPS),
    ],
    "tf_keras_v2": [
        CENTERED,
        MOMENTUM,
        axis("decay", 0.0, DECAY),
        axis("epsilon", EPS),
    ],
    "timm": [
        CENTERED,
        MOMENTUM,
        axis("decoupled_decay", False, True),
        axis("corrected_weight_decay", False, True),
        axis("caution", False, True),
        axis("weight_decay", DECAY),
        axis("eps", EPS),
    ],
}


@few_or_all
@pytest.mark.parametrize("name", OPTIONS)
def test_a_training_goes_on(name, combinations, standard_promotion):
    chosen = combinations(*OPTIONS[name])
    double = "float64" in FRAMEWORKS[name].dtypes
    truths = list(halves(name, chosen, "float64")) if double else [None] * len(chosen)
    singles = halves(name, chosen, "float32")
    for options, single, truth in zip(chosen, singles, truths, strict=True):
        stayed, *moved = single
        bound = 1e-4
        if truth is not None:
            assert max(error(run, truth[0]) for run in truth[1:]) < 1e-10, options
            bound = min(2 * error(stayed, truth[0]), bound)
            assert max(error(run, truth[0]) for run in moved) <= bound, options
        assert max(error(run, stayed) for run in moved) < 1e-4, options


@pytest.mark.parametrize("name", OPTIONS)
def test_the_settings_are_the_checkpoints(name):
    """Without `optimizer` the state is the convention's."""
    for options in every(*OPTIONS[name]):
        their = Their(name, options)
        x, gradients, rates = problem("float32", steps=2)
        begun = their.begin(x)
        begun.run(gradients, rates)
        params = jax.tree.map(jnp.asarray, to_ours(x))
        if name == "tf_keras_v2":
            optimizer = conventions.tf_keras_v2(**options)
            state = their.save(begun, params, optimizer)
        else:
            # TensorFlow's slots do not show that there is no momentum.
            momentum = {"momentum": 0.9} if name == "tensorflow1" else {}
            rate = {"learning_rate": 0.1} if name == "tensorflow1" else {}
            optimizer = their.convention(**(options | momentum | rate))
            state = their.save(begun, params, None)
        expected = jax.eval_shape(optimizer.init, params)
        chex.assert_trees_all_equal_shapes_and_dtypes(state, expected)
        count = HALF if name.startswith("t") and name != "timm" else 2
        assert optax.tree_utils.tree_get(state, "nu")["b"].shape == (5,)
        assert all(
            c == count
            for _, c in optax.tree_utils.tree_get_all_with_path(state, "count")
        )


def last(*axes):
    """One combination: the last choice of each axis."""
    return [functools.reduce(dict.__or__, (choices[-1] for choices in axes))]


@pytest.mark.parametrize(
    "combinations",
    [
        last,
        pytest.param(pairs, marks=pytest.mark.slow),
        pytest.param(every, marks=pytest.mark.exhaustive),
    ],
)
def test_optax_goes_on(combinations, x64, standard_promotion):
    chosen = combinations(
        axis("initial_scale", 0.0, 1.0),
        axis("eps_in_sqrt", False, True),
        [{}, {"centered": True}, {"bias_correction": True}],
        [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}],
        axis("eps", EPS),
    )
    x, gradients, rates = problem("float64", 2 * HALF)
    first = {n: g[:HALF] for n, g in gradients.items()}
    second = {n: g[HALF:] for n, g in gradients.items()}
    schedule = rates_as_schedule(rates)
    its, our = (
        {i: make(schedule, **options) for i, options in enumerate(chosen)}
        for make in (optax.rmsprop, conventions.optax)
    )

    def gone_on(before, after, move):
        """The second half of each, by `before` itself and migrated to `after`."""
        begun = train_each(before, x, first)
        middle = {
            i: {n: t[-1] for n, t in run.items()} for i, (run, _) in begun.items()
        }
        states = {i: state for i, (_, state) in begun.items()}
        moved = {i: move(i, states[i], middle[i]) for i in states}
        for i, state in moved.items():
            expected = jax.eval_shape(after[i].init, middle[i])
            chex.assert_trees_all_equal_shapes_and_dtypes(state, expected)
        truth = train_each(before, middle, second, states)
        found = train_each(after, middle, second, moved)
        for i, options in enumerate(chosen):
            assert error(found[i][0], truth[i][0]) < 1e-10, options

    gone_on(its, our, lambda i, state, x: migrate.from_optax(state, x, decay=0.9))
    gone_on(our, its, lambda i, state, x: migrate.to_optax(state, x, its[i].init(x)))


@pytest.mark.parametrize("options", [{}, {"bias_correction": True}])
@pytest.mark.parametrize("scale_by", [optax.scale_by_rms, optax.scale_by_stddev])
def test_optax_parts_go_on(scale_by, options, standard_promotion):
    centered = scale_by is optax.scale_by_stddev
    x, gradients, _ = problem("float32", steps=20)
    its = scale_by(**options, eps=EPS)
    _, state = train(its, x, gradients)
    if centered and options:
        with pytest.raises(ValueError, match="centered and bias-corrected, which"):
            migrate.from_optax(state, x, decay=0.9)
        return
    our = scale_by_rmsprop(0.9, EPS, centered=centered, **options)
    moved = migrate.from_optax(state, x, decay=0.9)
    g = {n: g[0] for n, g in gradients.items()}
    expected, _ = its.update(g, state)
    chex.assert_trees_all_close(our.update(g, moved)[0], expected, rtol=1e-5)
    back = migrate.to_optax(moved, x, its.init(x))
    # A centered average is converted through its variance.
    chex.assert_trees_all_close(back, state, rtol=1e-6)


# Other parts of a checkpoint.


def test_groups_are_a_partition(standard_promotion):
    torch = quietly("torch")
    x, gradients, rates = problem("float32", steps=20)
    tensors = {n: torch.nn.Parameter(torch.tensor(v)) for n, v in x.items()}
    groups = [
        {"params": [tensors["kernel"]], "momentum": 0.9, "centered": True},
        {"params": [tensors["bias"]]},
    ]
    theirs = torch.optim.RMSprop(groups, lr=0.01)

    def steps(times):
        for t in times:
            for name, tensor in tensors.items():
                tensor.grad = torch.tensor(gradients[name][t])
            theirs.step()
        return {n: v.detach().numpy().copy() for n, v in tensors.items()}

    def in_their_order(tree):
        return {"kernel": tree["dense"]["w"].T, "bias": tree["b"]}

    params = jax.tree.map(jnp.asarray, to_ours(steps(range(10))))
    checkpoint = theirs.state_dict()
    with pytest.raises(ValueError, match="groups differ in momentum, .* pass `optim"):
        migrate.from_torch(checkpoint, params, layout=in_their_order)
    optimizer = optax.partition(
        {
            "heavy": conventions.pytorch(0.01, momentum=0.9, centered=True),
            "light": conventions.pytorch(0.01),
        },
        {"b": "light", "dense": {"w": "heavy"}},
    )
    state = migrate.from_torch(
        checkpoint, params, layout=in_their_order, optimizer=optimizer
    )
    back = migrate.to_torch(state, params, theirs, layout=in_their_order)
    for number, entries in checkpoint["state"].items():
        assert set(entries) == set(back["state"][number])
        for entry, tensor in entries.items():
            np.testing.assert_allclose(tensor, back["state"][number][entry], rtol=1e-6)
    ours, _ = train(
        optimizer, params, to_ours({n: g[10:] for n, g in gradients.items()}), state
    )
    last = jax.tree.map(lambda t: t[-1:], ours)
    expected = {n: v[None] for n, v in steps(range(10, 20)).items()}
    assert error(to_theirs(last), expected) < 1e-5


def test_names_count_more_than_order():
    torch = quietly("torch")
    weight, bias = torch.ones(4, 5), torch.ones(5)
    theirs = torch.optim.RMSprop([("kernel", weight), ("bias", bias)])
    weight.grad, bias.grad = 2 * weight, 3 * bias
    theirs.step()
    params = to_ours({"bias": np.ones(5), "kernel": np.ones((4, 5))})
    # `layout` has the bias first.
    state = migrate.from_torch(theirs.state_dict(), params, layout=layout)
    nu = optax.tree_utils.tree_get(state, "nu")
    np.testing.assert_allclose(nu["b"], 0.09, rtol=1e-6)
    np.testing.assert_allclose(nu["dense"]["w"], 0.04, rtol=1e-6)


def test_layers_stacked_in_one_array():
    """A scan over layers stacks them; theirs are separate."""

    def unstacked(tree):
        return {f"layers.{i}.weight": tree["blocks"][i].T for i in range(3)}

    params = {"blocks": jnp.arange(24.0).reshape(3, 2, 4)}
    named = {n: np.asarray(v) for n, v in unstacked(params).items()}
    assert named["layers.1.weight"].shape == (4, 2)
    chex.assert_trees_all_equal(
        migrate.from_named(named, params, layout=unstacked), params
    )
    entries = {
        i: {"step": 1.0, "square_avg": v**2} for i, v in enumerate(named.values())
    }
    groups = [{"params": [0, 1, 2], "momentum": 0, "centered": False}]
    state = migrate.from_torch(
        {"state": entries, "param_groups": groups}, params, layout=unstacked
    )
    nu = optax.tree_utils.tree_get(state, "nu")
    chex.assert_trees_all_equal(nu, {"blocks": params["blocks"] ** 2})
    # The error names the missing layer, not the stacked array.
    del entries[1]["square_avg"]
    with pytest.raises(ValueError, match="has no square_avg for 'layers.1.weight'"):
        migrate.from_torch(
            {"state": entries, "param_groups": groups}, params, layout=unstacked
        )
    del named["layers.2.weight"]
    with pytest.raises(ValueError, match="`arrays` has no parameter 'layers.2.weight'"):
        migrate.from_named(named, params, layout=unstacked)


def test_complex_parameters_go_on(x64, standard_promotion):
    x, gradients, rates = problem("float64", steps=40)
    x = {"z": x["kernel"] + 1j * x["kernel"][::-1], "bias": x["bias"]}
    gradients = {
        "z": gradients["kernel"] + 1j * gradients["kernel"][:, ::-1] / 7,
        "bias": gradients["bias"],
    }
    options = {"momentum": 0.9, "centered": True, "eps": EPS}
    begun = FRAMEWORKS["pytorch"](x, options)
    begun.run({n: g[:20] for n, g in gradients.items()}, rates[:20])
    params = {n: v.detach().numpy() for n, v in zip(begun.names, begun.x, strict=True)}
    optimizer = conventions.pytorch(rates_as_schedule(rates), **options)

    def as_it_is(tree):
        return {"z": tree["z"], "bias": tree["bias"]}

    checkpoint = begun.optimizer.state_dict()
    state = migrate.from_torch(checkpoint, params, layout=as_it_is)
    second = {n: g[20:] for n, g in gradients.items()}
    ours, _ = train(optimizer, params, second, state)
    back = migrate.to_torch(state, params, begun.optimizer, layout=as_it_is)
    for number, entries in checkpoint["state"].items():
        for entry, tensor in entries.items():
            np.testing.assert_allclose(tensor, back["state"][number][entry], rtol=1e-12)
    assert error(ours, begun.run(second, rates[20:])) < 1e-10


def test_half_precision(standard_promotion):
    """PyTorch's state is the parameters' bfloat16, ours float32."""
    torch = quietly("torch")
    tensor = torch.ones(3, dtype=torch.bfloat16)
    theirs = torch.optim.RMSprop([tensor], centered=True)
    tensor.grad = torch.tensor([1.0, 2.0, 3.0], dtype=torch.bfloat16)
    theirs.step()
    params = {"w": jnp.ones(3, jnp.bfloat16)}
    state = migrate.from_torch(
        theirs.state_dict(), params, layout=lambda tree: {"w": tree["w"]}
    )
    nu = optax.tree_utils.tree_get(state, "nu")["w"]
    assert nu.dtype == jnp.float32
    its = theirs.state[tensor]
    expected = its["square_avg"].double() - its["grad_avg"].double() ** 2
    np.testing.assert_allclose(nu, expected, rtol=1e-6)
    loaded = migrate.to_torch(state, params, theirs, layout=lambda tree: dict(tree))
    theirs.load_state_dict(loaded)
    assert theirs.state[tensor]["square_avg"].dtype == torch.bfloat16


def test_a_variance_that_rounding_made_negative():
    entries = {"step": 9.0, "square_avg": np.ones(2), "grad_avg": np.full(2, 1.0001)}
    groups = [{"params": [0], "momentum": 0, "centered": True}]
    state = migrate.from_torch(
        {"state": {0: entries}, "param_groups": groups},
        {"w": jnp.ones(2)},
        layout=lambda tree: {"w": tree["w"]},
    )
    nu = optax.tree_utils.tree_get(state, "nu")["w"]
    np.testing.assert_array_equal(nu, 0.0)


def test_the_state_is_where_the_parameters_are():
    mesh = mesh_of_four()
    where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("d"))
    params = {"w": jax.device_put(jnp.ones((8, 2)), where)}
    entries = {"step": 1.0, "square_avg": np.arange(16.0).reshape(2, 8)}
    groups = [{"params": [0], "momentum": 0, "centered": False}]
    state = migrate.from_torch(
        {"state": {0: entries}, "param_groups": groups},
        params,
        layout=lambda tree: {"w": tree["w"].T},
    )
    nu = optax.tree_utils.tree_get(state, "nu")["w"]
    assert nu.sharding.is_equivalent_to(where, nu.ndim)
    np.testing.assert_array_equal(nu, np.arange(16.0).reshape(2, 8).T)


# Bad input.

PARAMS = {"w": np.zeros((2, 3)), "b": np.zeros(3)}


def transposed(tree):
    return {"fc.weight": tree["w"].T, "fc.bias": tree["b"]}


def checkpoint(change=None, momentum=0.0):
    """A PyTorch checkpoint, changed by a function of its entries."""
    entries = {
        0: {"step": 1.0, "square_avg": np.ones((3, 2))},
        1: {"step": 1.0, "square_avg": np.ones(3)},
    }
    if change:
        change(entries)
    groups = [{"params": [0, 1], "momentum": momentum, "centered": False}]
    return {"state": entries, "param_groups": groups}


def two_of_a_shape():
    """A checkpoint of two arrays of one shape; the second has a larger average."""
    entries = {
        i: {"step": 1.0, "square_avg": np.full((2, 2), 1.0 + i)} for i in range(2)
    }
    groups = [{"params": [0, 1], "momentum": 0, "centered": False}]
    return entries, groups


def first_and_second(tree):
    return {"second.weight": tree["second"], "first.weight": tree["first"]}


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize("how", ["keys", "param_names", "names"])
def test_names_decide_over_positions(how, prefix):
    params = {"first": jnp.zeros((2, 2)), "second": jnp.zeros((2, 2))}
    entries, groups = two_of_a_shape()
    named = [f"{prefix}first.weight", f"{prefix}second.weight"]
    options = {}
    if how == "keys":
        entries = dict(zip(named, entries.values(), strict=True))
        groups[0]["params"] = named
    elif how == "param_names":
        groups[0]["param_names"] = named
    else:
        options["names"] = named
    state = migrate.from_torch(
        {"state": entries, "param_groups": groups},
        params,
        layout=first_and_second,
        **options,
    )
    nu = optax.tree.get(state, "nu")
    assert (nu["first"].max(), nu["second"].min()) == (1, 2)


def test_names_that_are_not_the_layouts():
    params = {"first": jnp.zeros((2, 2)), "second": jnp.zeros((2, 2))}
    entries, groups = two_of_a_shape()
    with pytest.raises(
        ValueError, match=r"^`layout` has no 'a', but the optimizer has; "
    ):
        migrate.from_torch(
            {"state": entries, "param_groups": groups},
            params,
            layout=first_and_second,
            names=["a", "b"],
        )


@pytest.mark.parametrize(
    ("read", "initial"), [(migrate.from_torch, 0.0), (migrate.from_timm, 1.0)]
)
@pytest.mark.parametrize("known", [0, 1])
def test_a_parameter_without_an_entry_begins_anew(read, initial, known):
    params = {"first": jnp.zeros((2, 2)), "second": jnp.zeros((2, 2))}
    entries, groups = two_of_a_shape()
    groups[0] |= {"momentum": 0.9, "centered": True}
    for entry in entries.values():
        entry |= {"grad_avg": np.zeros((2, 2)), "momentum_buffer": np.ones((2, 2))}
    entries = dict(list(entries.items())[:known])
    state = read(
        {"state": entries, "param_groups": groups}, params, layout=first_and_second
    )
    nu, trace = optax.tree.get(state, "nu"), optax.tree.get(state, "momentum")
    # In the layout's order, with the second one first.
    assert (nu["first"] == initial).all()
    assert (trace["first"] == 0).all()
    assert (nu["second"] == (1.0 if known else initial)).all()
    assert (trace["second"] == (1.0 if known else 0.0)).all()
    assert int(optax.tree.get_all_with_path(state, "count")[0][1]) == known


@pytest.mark.parametrize(
    ("checkpoint", "got"),
    [
        ({"model": {}, "optimizer": {}}, "got one with 'model', 'optimizer'; "),
        ({"state_dict": {}, "optimizer_states": []}, "'state_dict', 'optimizer_st"),
        ({}, "got one with nothing"),
        ([1], "got list"),
    ],
)
def test_a_checkpoint_of_more_than_the_optimizer(checkpoint, got):
    with pytest.raises(TypeError) as caught:
        migrate.from_torch(checkpoint, {}, layout=dict)
    message = str(caught.value)
    assert message.startswith("`optimizer_state_dict` must have 'state' and 'param_gr")
    assert got in message
    assert "\n" not in message


WRONG = {
    "e[1].pop('square_avg')": "the checkpoint has no square_avg for 'fc.bias'",
    "e[0].update(square_avg=np.ones((2, 3)))": "square_avg of 'fc.weight' has shape "
    "(2, 3) in the checkpoint, but (3, 2) in `layout`; if the optimizer's parameters "
    "come in another order, pass `names`, usually [name for name, _ in "
    "model.named_parameters()]",
    "e[1].update(exp_avg=np.ones(3))": "the checkpoint has an unknown exp_avg for "
    "'fc.bias'",
    "e[1].update(grad_avg=np.ones(3))": "the checkpoint has grad_avg for 'fc.bias', "
    "but the optimizer keeps none",
}


@pytest.mark.parametrize("change", WRONG)
def test_a_checkpoint_that_does_not_fit(change):
    changed = checkpoint(lambda e: eval(change))
    with pytest.raises(ValueError) as refused:  # noqa: PT011
        migrate.from_torch(changed, PARAMS, layout=transposed)
    assert str(refused.value) == WRONG[change]


def test_momentum_that_is_not_there():
    with pytest.raises(
        ValueError, match="the checkpoint has no momentum_buffer for 'fc"
    ):
        migrate.from_torch(checkpoint(momentum=0.9), PARAMS, layout=transposed)


@pytest.mark.parametrize(
    ("wrong", "at"),
    [
        ("{'w': t['w']}", "not those of ['b']"),
        ("{'w': t['w'], 'v': t['w'], 'b': t['b']}", "not those of ['w']"),
        ("{'w': t['w'] * 2, 'b': t['b']}", "not those of ['w']"),
        ("{'w': t['w'], 'b': t['b'], 'c': np.zeros(2)}", "not those of ['b']"),
        ("{**transposed(t), 'c': np.full(2, -1)}", "adds some of its own"),
        ("[t['w']]", None),
    ],
)
def test_a_wrong_layout(wrong, at):
    with pytest.raises((TypeError, ValueError)) as refused:
        migrate.from_torch(checkpoint(), PARAMS, layout=lambda t: eval(wrong))
    message = "`layout` must return a dict of arrays by name, got list"
    if at is not None:
        message = (
            "`layout` must return each element of `params` once and unchanged, but "
        )
        message += at
    assert str(refused.value) == message


def test_another_number_of_parameters():
    groups = [{"params": [0], "momentum": 0.0, "centered": False}]
    with pytest.raises(
        ValueError, match="has 1 parameters, `layout` names 2: fc.weight"
    ):
        migrate.from_torch(
            {"state": {}, "param_groups": groups}, PARAMS, layout=transposed
        )


def test_named_parameters_that_do_not_fit():
    named = {n: np.asarray(x) for n, x in transposed(PARAMS).items()}
    with pytest.raises(ValueError, match="`layout` has no 'x', but `arrays` has; if"):
        migrate.from_named(named | {"x": np.ones(1)}, PARAMS, layout=transposed)
    del named["fc.bias"]
    with pytest.raises(ValueError, match="`arrays` has no parameter 'fc.bias'"):
        migrate.from_named(named, PARAMS, layout=transposed)


def test_an_optimizer_that_does_not_fit_the_state():
    torch = quietly("torch")
    tensors = [torch.ones(3, 2), torch.ones(3)]
    plain = rmsprop(0.1).init(PARAMS)
    heavy = rmsprop(0.1, momentum=0.9).init(PARAMS)
    theirs = torch.optim.RMSprop(tensors, momentum=0.9)
    with pytest.raises(
        ValueError, match="state has no momentum_buffer for 'fc.weight'"
    ):
        migrate.to_torch(plain, PARAMS, theirs, layout=transposed)
    theirs = torch.optim.RMSprop(tensors)
    with pytest.raises(
        ValueError, match="has momentum_buffer for 'fc.weight', but the"
    ):
        migrate.to_torch(heavy, PARAMS, theirs, layout=transposed)
    theirs = torch.optim.RMSprop([torch.ones(2, 3), torch.ones(3)])
    with pytest.raises(ValueError, match=r"'fc.weight' has shape \(3, 2\) in `layout`"):
        migrate.to_torch(plain, PARAMS, theirs, layout=transposed)


def test_eight_bits_are_refused():
    theirs = quietly("bitsandbytes").optim.RMSprop8bit([quietly("torch").ones(5000)])
    tensor = theirs.param_groups[0]["params"][0]
    tensor.grad = 0.1 * tensor
    theirs.step()
    with pytest.raises(ValueError, match="the checkpoint has an unknown qmap1 for 'w'"):
        migrate.from_bitsandbytes(
            theirs.state_dict(), {"w": np.ones(5000)}, layout=lambda tree: dict(tree)
        )


class Variable:
    """A variable like those of Keras."""

    def __init__(self, name, value):
        self.name, self.value = name, value

    def numpy(self):
        return np.asarray(self.value)


def test_keras_variables_that_do_not_fit():
    variables = [Variable("iteration", 3), Variable("w_velocity", np.ones(2))]
    params, same = {"w": np.ones(2)}, dict
    state = migrate.from_keras(variables, params, layout=same)
    assert int(optax.tree_utils.tree_get(state, "count")) == 3
    unknown = Variable("w_gradient_accumulator", np.ones(2))
    with pytest.raises(ValueError, match="unknown variable 'w_gradient_accumulator'"):
        migrate.from_keras([*variables, unknown], params, layout=same)
    with pytest.raises(ValueError, match="the checkpoint has no velocity for 'w'"):
        migrate.from_keras(variables[:1], params, layout=same)
    more = [*variables, Variable("w_momentum", np.ones(2))]
    with pytest.raises(ValueError, match="the state has no momentum for 'w'"):
        migrate.to_keras(state, params, more, layout=same)
    with pytest.raises(ValueError, match="the state has velocity for 'w', but the"):
        migrate.to_keras(state, params, variables[:1], layout=same)


def test_keras_variables_of_one_name_are_told_apart_by_order():
    def layout(tree):
        return {"a_b/w": tree[0], "a/b_w": tree[1], "c/w": tree[2], "c/w#2": tree[3]}

    params = [np.zeros(2) for _ in range(4)]
    names = ["a_b_w", "a_b_w", "c_w", "c_w"]
    variables = [Variable("iteration", 1)] + [
        Variable(f"{name}_velocity", np.full(2, i)) for i, name in enumerate(names)
    ]
    state = migrate.from_keras(variables, params, layout=layout)
    for i, nu in enumerate(optax.tree.get(state, "nu")):
        np.testing.assert_array_equal(nu, i)
    values = migrate.to_keras(state, params, variables, layout=layout)
    for value, variable in zip(values, variables, strict=True):
        np.testing.assert_array_equal(value, variable.value)
    with pytest.raises(ValueError, match="^the checkpoint has more variables 'c_w_vel"):
        migrate.from_keras([*variables, variables[-1]], params, layout=layout)


def test_keras_layers_of_one_name(standard_promotion):
    """Two models that are trained together."""
    keras = quietly("keras")
    layers = [keras.layers.Dense(3, name="dense") for _ in range(2)]
    for layer in layers:
        layer.build((None, 3))
    trained = [v for layer in layers for v in layer.trainable_variables]
    optimizer = keras.optimizers.RMSprop(0.1)
    optimizer.build(trained)
    for i, variable in enumerate(optimizer.variables):
        if variable.name.endswith("velocity"):
            variable.assign(np.full(variable.shape, i))
    params = [[np.zeros((3, 3)), np.zeros(3)] for _ in range(2)]

    def layout(tree):
        return {
            "dense/kernel": tree[0][0],
            "dense/bias": tree[0][1],
            "dense/kernel#2": tree[1][0],
            "dense/bias#2": tree[1][1],
        }

    state = migrate.from_keras(optimizer.variables, params, layout=layout)
    found = [float(x.ravel()[0]) for x in jax.tree.leaves(optax.tree.get(state, "nu"))]
    theirs = [v for v in optimizer.variables if v.name.endswith("velocity")]
    assert found == [float(np.asarray(v).ravel()[0]) for v in theirs]


def test_buffers_and_tied_weights_are_one_line():
    torch = quietly("torch")
    model = torch.nn.Sequential(
        torch.nn.Linear(2, 2, bias=False), torch.nn.BatchNorm1d(2)
    )
    params = {"w": np.zeros((2, 2)), "scale": np.zeros(2), "shift": np.zeros(2)}

    def layout(tree):
        return {
            "0.weight": tree["w"],
            "1.weight": tree["scale"],
            "1.bias": tree["shift"],
        }

    with pytest.raises(ValueError, match="running_mean") as refused:
        migrate.from_named(model.state_dict(), params, layout=layout)
    assert str(refused.value) == (
        "`layout` has no '1.running_mean', but `arrays` has; if it is a buffer or the "
        "second name of a tied weight, pass dict(model.named_parameters())"
    )
    found = migrate.from_named(dict(model.named_parameters()), params, layout=layout)
    np.testing.assert_array_equal(found["w"], model[0].weight.detach().numpy())


def test_slots_that_do_not_fit():
    params, same = {"w": np.ones(2)}, dict
    with pytest.raises(ValueError, match="the checkpoint has an unknown slot 'v'"):
        migrate.from_tf1({"v": {"w": np.ones(2)}}, params, layout=same)
    with pytest.raises(
        ValueError, match="`layout` has no 'w:0', but the checkpoint has"
    ):
        migrate.from_tf1({"rms": {"w:0": np.ones(2)}}, params, layout=same)
    with pytest.raises(ValueError, match="the checkpoint has no rms for 'w'"):
        migrate.from_tf1({}, params, layout=same)


def test_optax_states_that_do_not_fit():
    params = {"w": np.ones(2)}
    with pytest.raises(TypeError, match="`optax_state` must be the state of optax.rms"):
        migrate.from_optax(optax.adam(0.1).init(params), params)
    corrected = optax.rmsprop(0.1, bias_correction=True).init(params)
    with pytest.raises(ValueError, match="`decay` must be given for a bias"):
        migrate.from_optax(corrected, params)
    with pytest.raises(ValueError, match="the state has no mu for"):
        migrate.to_optax(
            rmsprop(0.1).init(params),
            params,
            optax.rmsprop(0.1, centered=True).init(params),
        )
