"""Trainings of many steps: stopped, killed, extended and resumed, in any order."""

import itertools
import re
import signal
import warnings
from datetime import datetime
from decimal import Decimal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import xarray as xr

from jax_rmsprop import (
    Training,
    drop_carries,
    load_carry,
    load_sweep,
    log,
    plotting,
    points,
    rmsprop,
    successive_halving,
    summary,
    sweep,
    to_dataframe,
)
from jax_rmsprop.sweeps import _batch, _members, _store
from tests.helpers import free_port, require
from tests.sweeps import (
    bits,
    long_training,
    quiet,
    result,
    run_images,
    run_long,
    square,
)

AXES = {"rate": [0.03, 0.1, 1e30], "seed": range(5)}
STEPS = 7


@pytest.fixture(scope="module")
def at_once():
    """All steps of all members, in memory, in batches of four."""
    return quiet(long_training, AXES, steps=STEPS, batch_size=4)


@pytest.fixture
def stepped(monkeypatch):
    """The steps that batches have run."""
    step, count = _batch.CompiledBatch.step, []

    def counted(self, *arguments):
        count.append(self.size)
        return step(self, *arguments)

    monkeypatch.setattr(_batch.CompiledBatch, "step", counted)
    return count


def run(store, steps=STEPS, axes=AXES, **options):
    return quiet(
        long_training, axes, steps=steps, store=store, **{"batch_size": 4} | options
    )


def same(found, expected):
    for name in ("loss", "noise", "steps", "diverged", "diverged_at", "finished"):
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)


def test_a_member_is_its_steps_one_after_the_other():
    found = quiet(long_training, AXES, steps=STEPS, batch_size=1)
    assert found.loss.dims == ("rate", "seed", "step")
    assert found.noise.dims == ("rate", "seed", "step", "noise_dim_0")
    init, step = jax.jit(long_training.init), jax.jit(long_training.step)
    for i, rate in enumerate(AXES["rate"][:2]):
        point = {"rate": np.float32(rate), "seed": np.int32(3)}
        carry = init(**point)
        for t in range(STEPS):
            carry, outputs = step(carry, **point)
            np.testing.assert_array_equal(found.loss[i, 3, t], outputs["loss"])
            np.testing.assert_array_equal(found.noise[i, 3, t], outputs["noise"])


def test_who_diverges_ends_there(at_once, stepped):
    lost = at_once.isel(rate=2)
    assert lost.diverged.all()
    assert lost.finished.all()
    first = lost.diverged_at.sel(output="loss")
    np.testing.assert_array_equal(lost.steps, first + 1)
    assert (lost.steps < STEPS).all()
    for i in range(5):
        assert np.isfinite(lost.loss[i, : int(first[i])]).all()
        assert np.isnan(lost.loss[i, int(first[i]) + 1 :]).all()
    # A batch in which all members diverge stops one step later.
    quiet(long_training, AXES | {"rate": [1e30]}, steps=1000, batch_size=5)
    assert len(stepped) <= int(first.max()) + 2


ORDERS = {
    "more steps": [{"steps": 2}, {"steps": 3}, {}],
    "more seeds": [{"axes": AXES | {"seed": [4, 1]}, "steps": 3}, {}],
    "some further": [
        {"steps": 2},
        {"axes": AXES | {"seed": [0, 3], "rate": [0.03, 0.1]}},
        {"steps": 4},
        {},
    ],
    "points": [{"axes": {"rate": [0.03, 0.1], "seed": [2, 2]}, "zipped": True}, {}],
    "one, then all": [{"axes": {"rate": [0.1], "seed": [2]}, "steps": 5}, {}],
}


@pytest.mark.parametrize(
    "order",
    [
        o
        if o in ("some further", "points")
        else pytest.param(o, marks=pytest.mark.slow)
        for o in ORDERS
    ],
)
def test_in_any_order_the_bits_of_at_once(order, tmp_path, at_once):
    devices = itertools.cycle([jax.devices()[:1], jax.devices()[:3]])
    for options in ORDERS[order]:
        found = run(tmp_path, devices=next(devices), **options)
    same(found, at_once)
    assert run(tmp_path).computed == 0
    loaded = load_sweep(tmp_path)
    if "member" not in loaded.dims:
        same(loaded, at_once)
    # A request for fewer steps than stored.
    few = run(tmp_path, steps=2)
    np.testing.assert_array_equal(few.loss, at_once.loss[..., :2])
    assert int(few.steps.max()) == 2
    expected = quiet(long_training, AXES, steps=2, batch_size=4)
    same(few, expected)
    # The plain store has each member once.
    steps = xr.open_zarr(tmp_path).steps.values
    assert (steps > 0).sum() == at_once.steps.size


def test_ctrl_c_and_again(tmp_path, monkeypatch, ctrl_c, at_once, stepped):
    step = _batch.CompiledBatch.step

    def interrupted(self, *arguments):
        if len(stepped) == 9:
            signal.raise_signal(signal.SIGINT)
        return step(self, *arguments)

    one = jax.devices()[:1]
    with monkeypatch.context() as patched:
        patched.setattr(_batch.CompiledBatch, "step", interrupted)
        with pytest.warns(UserWarning, match="^interrupted: 4 of 15 members are fin"):
            part = run(tmp_path, devices=one)
    assert sorted(np.unique(part.steps)) == [0, 3, 7]
    np.testing.assert_array_equal(part.loss[0, :4], at_once.loss[0, :4])
    before = len(stepped)
    same(run(tmp_path, devices=one), at_once)
    # No step was computed twice.
    assert before == 10
    assert len(stepped) - before <= 4 + 7 + 7


class Killed(BaseException):
    """Simulates the end of a process."""


@pytest.mark.parametrize("kind", ["folder", "memory"])
def test_what_was_saved_is_there_again(kind, tmp_path, monkeypatch, at_once, stepped):
    """If a process ends at any moment, its saves are intact and all can resume."""
    store = tmp_path if kind == "folder" else f"memory://{tmp_path.name}/a.zarr"
    append, left = _store.ZarrStore.append, itertools.count()

    def killed(self, blocks):
        if next(left) == 10:
            raise Killed
        append(self, blocks)

    with monkeypatch.context() as patched:
        patched.setattr(_store.ZarrStore, "append", killed)
        with pytest.raises(Killed):
            run(store, save_every=0, devices=jax.devices()[:1])
    part = load_sweep(store)
    assert 0 < int(part.steps.sum()) < int(at_once.steps.sum())
    before = len(stepped)
    same(run(store, devices=jax.devices()[:1]), at_once)
    saved = int(np.ceil(part.steps.sum() / 4))
    assert len(stepped) - before <= 4 * STEPS - saved + 2


@pytest.mark.parametrize("number", range(1, 9))
def test_whoever_is_cut_off_while_a_member_diverges(number, tmp_path, monkeypatch):
    """Its divergence counts only with its steps, at whatever write it ended."""
    import zarr

    def step(x, seed):
        lost = (seed == 1) & (x >= 4)
        return x + 1, {"loss": jnp.where(lost, jnp.nan, x)}

    training = Training(lambda seed: jnp.zeros(()), step)
    axes, options = {"seed": [0, 1]}, {"batch_size": 2, "store": tmp_path}
    expected = quiet(training, axes, steps=8, batch_size=2)
    quiet(training, axes, steps=3, **options)
    count, write = itertools.count(1), zarr.core.array.OIndex.__setitem__

    def cut_off(self, *arguments):
        if next(count) == number:
            raise Killed
        write(self, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(zarr.core.array.OIndex, "__setitem__", cut_off)
        try:
            quiet(training, axes, steps=8, **options)
        except Killed:
            part = load_sweep(tmp_path)
            np.testing.assert_array_equal(part.steps, 3)
            assert not part.diverged.any()
            assert np.isnan(part.loss[:, 3:]).all()
    same_steps = quiet(training, axes, steps=8, **options)
    for name in ("loss", "steps", "diverged_at", "finished"):
        np.testing.assert_array_equal(same_steps[name], expected[name], err_msg=name)


def test_more_steps_than_anybody_has_run(tmp_path):
    """All have ended: the result has the steps that were asked for, all the same."""
    training = Training(lambda x: x, lambda c, x: (c, {"loss": c / 0, "n": c}))
    for steps in (2, 5):
        options = {"steps": steps, "batch_size": 2}
        kept = quiet(training, {"x": [1.0, 2.0]}, store=tmp_path, **options)
        alone = quiet(training, {"x": [1.0, 2.0]}, **options)
        for name in ("loss", "n", "steps", "finished"):
            np.testing.assert_array_equal(kept[name], alone[name])
        assert load_sweep(tmp_path).loss.sizes["step"] == 2


def test_a_carry_of_nothing(tmp_path):
    training = Training(lambda x: None, lambda carry, x: (None, {"loss": 2 * x}))
    for steps in (1, 3):
        found = quiet(training, {"x": [1.0, 2.0]}, steps=steps, store=tmp_path)
    np.testing.assert_array_equal(found.loss, [[2] * 3, [4] * 3])
    assert load_carry(training, tmp_path, {"x": 1.0}) is None


def test_readers_of_the_plain_store_see_all_steps(tmp_path):
    for steps in (2, 4):
        run(tmp_path, steps=steps)
        assert xr.open_zarr(tmp_path).loss.sizes["step"] == steps


def test_who_has_diverged_is_not_best_by_a_whole_number():
    training = Training(
        lambda x: x,
        lambda c, x: (c, {"loss": jnp.where(x == 1, jnp.nan, 1.0), "errors": x * 1}),
    )
    axes = {"x": [1, 2, 3, 4]}
    options = {"by": "errors", "steps": [2, 4], "keep": 0.5, "progress": False}
    found = successive_halving(training, axes, maximize=False, **options)
    np.testing.assert_array_equal(found.rung, [0, 1, 1, 0])


@pytest.mark.slow
def test_kill_9_at_any_event_of_a_write(tmp_path, start):
    """Each time it is killed as it opens or renames another file."""
    random = np.random.default_rng(1)
    axes, store = AXES | {"rate": [0.1, 0.03]}, tmp_path / "a.zarr"
    expected = quiet(long_training, axes, steps=40, batch_size=4)
    for number in [*random.integers(1, 40, 2), *random.integers(40, 400, 8)]:
        process, _ = start(store, axes, 40, int(number), target=run_long)
        process.join(240)
        assert process.exitcode in (-signal.SIGKILL, 0)
        if store.exists():
            steps = xr.open_zarr(store).steps.values
            rows = xr.open_zarr(store).loss.values
            for row, n in zip(rows, steps, strict=True):
                assert np.isfinite(row[:n]).all()  # the claimed steps are stored
    found = result(*start(store, axes, 40, 0, target=run_long))
    assert found == bits(expected[["loss", "noise", "steps"]])


@pytest.mark.slow
def test_two_processes(tmp_path, start, at_once):
    """Processes of `jax.distributed`; the first one writes."""
    for steps in (3, STEPS):
        options = {"devices": 2, "processes": 2, "port": free_port()}
        both = [
            start(tmp_path / "a", AXES, steps, 0, target=run_long, process=i, **options)
            for i in range(2)
        ]
        found = [result(*each) for each in both]
    assert found == [bits(at_once[["loss", "noise", "steps"]])] * 2


@pytest.mark.exhaustive
def test_a_convolutional_network_that_is_killed_ten_times(tmp_path, start):
    """In some minutes, it gets the bits of an uninterrupted training."""
    store, axes = tmp_path / "a.zarr", {"gamma": [0.9, 0.99], "seed": range(4)}
    random = np.random.default_rng(0)
    for number in random.integers(20, 200, 10):
        process, _ = start(store, axes, 30, int(number), target=run_images)
        process.join(600)
        assert process.exitcode in (-signal.SIGKILL, 0)
    found = result(*start(store, axes, 30, 0, target=run_images))
    assert found == result(*start(None, axes, 30, 0, target=run_images))


def test_any_carry_is_kept_as_it_is(tmp_path):
    def init(x):
        return {
            "key": jax.random.key(0),
            "rbg": jax.random.key(1, impl="unsafe_rbg"),
            "half": jnp.full((3,), -0.0, jnp.bfloat16),
            "complex": jnp.full((2,), jnp.complex64(1j * jnp.inf)),
            "flag": jnp.array(True),
            "none": None,
            "count": 0,  # which is weakly typed
            "x": x,
        }

    def step(carry, x):
        split = jax.random.split(carry["key"])[0]
        noise = jax.random.normal(carry["key"], ())
        new = carry | {"key": split, "count": carry["count"] + 1}
        return new, {"loss": x + noise, "more": jax.random.bits(carry["rbg"], (2,))}

    training, axes = Training(init, step), {"x": [1.0, 2.0, 3.0]}
    expected = quiet(training, axes, steps=5, batch_size=2)
    for steps in (1, 2, 5):
        store = tmp_path / "a.zarr"
        found = quiet(training, axes, steps=steps, batch_size=2, store=store)
    np.testing.assert_array_equal(found.loss, expected.loss)
    np.testing.assert_array_equal(found.more, expected.more)
    carry = load_carry(training, store, {"x": 2.0})
    assert carry["count"] == 5
    assert carry["half"].dtype == jnp.bfloat16
    assert np.signbit(carry["half"].astype("float32")).all()
    assert jax.random.key_impl(carry["rbg"]) == "unsafe_rbg"
    assert carry["none"] is None
    again, _ = step(carry, x=2.0)
    assert again["count"] == 6


def test_the_carries_can_be_dropped(tmp_path, at_once):
    store = tmp_path / "a.zarr"
    run(store, steps=3)
    before = sum(1 for _ in store.rglob("*"))
    point = {"rate": 0.03, "seed": 4}
    assert load_carry(long_training, store, point)["count"] == 3
    drop_carries(store)
    assert sum(1 for _ in store.rglob("*")) < before
    np.testing.assert_array_equal(run(store, steps=3).loss, at_once.loss[..., :3])
    with pytest.raises(ValueError, match="^`store` .* has no carries any more"):
        run(store)
    with pytest.raises(ValueError, match="^`store` .* has no carry of {'rate': 0.03, "):
        load_carry(long_training, store, point)
    with pytest.raises(ValueError, match="^`point` must have a value for each of rate"):
        load_carry(long_training, store, {"rate": 0.03})


def test_a_carry_is_that_of_the_training_and_the_point(tmp_path):
    run(tmp_path, steps=2, axes={"rate": [0.1], "seed": [1]})
    point = {"rate": 0.1, "seed": 1}
    with jax.disable_jit():
        carry = load_carry(
            long_training, tmp_path, {n: np.array(x) for n, x in point.items()}
        )
    assert carry["count"] == 2
    other = Training(
        lambda rate, seed: {"b": rate}, lambda c, rate, seed: (c, {"loss": c["b"]})
    )
    with pytest.raises(ValueError, match="another sweep: its `train` is another funct"):
        load_carry(other, tmp_path, point)
    with pytest.raises(
        ValueError, match="^`store` .* has no carry of {'rate': 0.1, 's"
    ):
        load_carry(long_training, tmp_path, point | {"seed": 1.7})
    with pytest.raises(ValueError, match="^`seed` must fit int32, got 4294967297"):
        load_carry(long_training, tmp_path, point | {"seed": 2**32 + 1})
    with pytest.raises(TypeError, match="^`point` must have a number for seed, got 'o"):
        load_carry(long_training, tmp_path, point | {"seed": "one"})


@pytest.mark.parametrize("kept", [False, True])
def test_on_step_hears_of_each_step(kept, tmp_path, at_once):
    heard = []
    options = {"store": tmp_path} if kept else {}
    quiet(long_training, AXES, steps=4, batch_size=4, on_step=heard.append, **options)
    assert len(heard) >= 4 * 3
    for batch in heard:
        count = batch.sizes["step"]
        np.testing.assert_array_equal(batch.step, range(count))
        for member in range(batch.sizes["member"]):
            row = batch.isel(member=member)
            if row.rate < 1:
                whole = at_once.sel(rate=row.rate.item(), seed=row.seed.item())
                np.testing.assert_array_equal(row.loss, whole.loss[:count])
    if kept:
        heard.clear()
        run(tmp_path, steps=6, on_step=heard.append)
        assert {tuple(batch.step.values) for batch in heard} == {(4,), (4, 5)}


def test_tensorboard_hears_it(tmp_path):
    """The code is that of the page about tracking."""
    tensorboard = require("tensorboardX")
    with tensorboard.SummaryWriter(str(tmp_path)) as writer:

        def log(curves):
            last = curves.isel(step=-1)
            for i, loss in enumerate(last.loss.values):
                name = f"rate {last.rate.values[i]:g}, seed {last.seed.values[i]}"
                writer.add_scalar(name, loss, int(last.step))

        quiet(long_training, AXES, steps=2, on_step=log, batch_size=4)
    (file,) = tmp_path.glob("events*")
    assert b"rate_0.03__seed_4" in file.read_bytes()


def test_the_bar_counts_steps(capsys):
    sweep(long_training, AXES, steps=STEPS, batch_size=4)
    shown = capsys.readouterr().err
    assert "step/s" in shown
    assert "loss=" in shown


def test_successive_halving(at_once, tmp_path, stepped):
    axes = {"rate": [0.1, 0.3, 0.02, 0.5, 1e30, 0.7], "seed": range(2)}
    full = quiet(long_training, axes, steps=STEPS, batch_size=4)
    options = {"steps": [1, 3, STEPS], "keep": 0.4, "progress": False, "batch_size": 4}
    stepped.clear()
    found = successive_halving(long_training, axes, **options)
    mean = full.loss.mean("seed")
    best = mean[:, 0].argsort()[:3]  # of 6, two fifths and a bit
    np.testing.assert_array_equal((found.rung > 0).all("seed"), np.isin(range(6), best))
    best = best.values
    last = best[mean[best, 2].argsort().values[:2]]  # ceil(0.4 * 3)
    # Diverged members need no further steps.
    done = np.isin(range(6), [*last, 4])
    np.testing.assert_array_equal(found.finished.all("seed"), done)
    np.testing.assert_array_equal(found.rung, found.rung[:, [0, 0]])
    for i in range(6):
        steps = int(found.steps[i, 0])
        np.testing.assert_array_equal(found.loss[i, :, :steps], full.loss[i, :, :steps])
        assert np.isnan(found.loss[i, :, steps:]).all()
    assert summary(found).best == {"rate": axes["rate"][int(last[0])]}
    said = str(summary(found))
    assert "6 not finished" in said
    # Of the best one's neighbours, which were stopped, no value is compared.
    assert re.search(r"\| rate \S+ +\| +not finished \|", said)
    # The same with a store, which then has nothing left to compute.
    for computed in (None, 0):
        kept = successive_halving(long_training, axes, store=tmp_path, **options)
        for name in ("loss", "rung", "steps"):
            np.testing.assert_array_equal(kept[name], found[name])
        assert computed in (None, kept.computed)


def test_halving_again_runs_nothing(tmp_path):
    """Also if a member that continued has diverged since; NumPy's numbers do."""

    def step(t, a):
        loss = jnp.where(a == 3, jnp.where(t >= 4, jnp.nan, 0.0), a)
        return t + 1, {"loss": loss}

    training, axes = Training(lambda a: 0 * a, step), {"a": np.arange(1.0, 7)}
    options = {"steps": np.array([2, 6]), "keep": np.exp(-1.2), "batch_size": 6}
    options |= {"store": tmp_path, "save_every": np.int64(5), "progress": False}
    for computed in (6, 0):
        found = successive_halving(training, axes, **options)
        np.testing.assert_array_equal(found.rung, [1, 0, 1, 0, 0, 0])
        assert found.computed == computed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": [3, 2]}, r"`steps` must be an ascending .* 7, 20\], got \[3, 2\]"),
        ({"keep": 1.0}, "`keep` must be above 0 and below 1, got 1.0"),
        ({"by": "lost"}, "`maximize` must be True or False for 'lost', whose name"),
        ({"by": "lost", "maximize": True}, "`by` must be one of loss, noise, got 'los"),
        (
            {"by": "noise", "maximize": True},
            "`by` must be one number a step, but noise is more",
        ),
    ],
)
def test_bad_halving(options, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        successive_halving(
            long_training, AXES, **{"steps": [1, 2], "progress": False} | options
        )


def test_bad_trainings(tmp_path):
    def message(error, text, training, **options):
        with pytest.raises(error) as caught:
            quiet(training, {"x": [1.0]}, **options)
        assert str(caught.value).startswith(text)

    def with_step(step):
        return Training(lambda x: {"w": x}, step)

    like = "`step` must return a carry like the one it got, but "
    message(
        TypeError,
        like + "['w'] is float32[2] and was float32[]",
        with_step(lambda c, x: ({"w": jnp.ones(2)}, {"loss": x})),
        steps=1,
    )
    message(TypeError, like, with_step(lambda c, x: ([c["w"]], {"loss": x})), steps=1)
    message(
        TypeError,
        "`step` must return a pair, the carry and the outputs, got float32[]",
        with_step(lambda c, x: c["w"]),
        steps=1,
    )
    message(
        TypeError,
        "`step` must take the axes by name after the carry: it has no 'x'; its ",
        with_step(lambda c: (c, {"loss": c["w"]})),
        steps=1,
    )
    fine = with_step(lambda c, x: (c, {"loss": x}))
    message(TypeError, "`steps` must be an integer >= 1, got None", fine)
    message(
        ValueError,
        "`steps` must be None unless `train` is a Training, got 3",
        lambda x: {"loss": x},
        steps=3,
    )
    with pytest.raises(TypeError, match="^`step` must be a function, got 3"):
        Training(lambda: 0, 3)
    quiet(lambda x: {"loss": x}, {"x": [1.0]}, store=tmp_path)
    message(
        ValueError,
        f"`store` {tmp_path} holds another sweep: its `train` is a function, this",
        fine,
        steps=1,
        store=tmp_path,
    )


# One member that raises.


@pytest.mark.parametrize("kind", ["train", "training"])
def test_one_member_that_raises_is_flagged(kind, tmp_path):
    equinox = pytest.importorskip("equinox")

    def step(carry, x):
        y = equinox.error_if(x * 1, x == 3, "it exploded")
        return carry + y, {"loss": y, "end": carry + y}

    train = Training(lambda x: 0 * x, step)
    options = {"steps": 3, "batch_size": 4}
    if kind == "train":
        train = lambda x: step(jnp.zeros(()), x)[1]  # noqa: E731
        options = {"batch_size": 4}
    axes, one = {"x": np.arange(10.0)}, jax.devices()[:1]
    with pytest.warns(
        UserWarning, match="^`train` raised for x 3, flagged as div"
    ) as w:
        found = quiet(train, axes, store=tmp_path, devices=one, **options)
    assert "\n" not in str(w[0].message)
    np.testing.assert_array_equal(found.diverged, np.arange(10) == 3)
    assert found.finished.all()
    good = found.drop_sel(x=3)
    expected = quiet(train, {"x": [float(x) for x in range(10) if x != 3]}, **options)
    np.testing.assert_array_equal(good.end, expected.end)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert quiet(train, axes, store=tmp_path, devices=one, **options).computed == 0
    with pytest.raises(RuntimeError, match="^`train` raised for x 3: ") as caught:
        quiet(train, {"x": [3.0]}, devices=one, **options)
    assert "\n" not in str(caught.value)


def test_if_all_raise_the_first_is_named():
    equinox = pytest.importorskip("equinox")

    def train(x):
        return {"loss": equinox.error_if(x, x > 0, "it exploded")}

    message = "^`train` raised for x 1 and 3 others: "
    with pytest.raises(RuntimeError, match=message):
        quiet(train, {"x": [1.0, 2.0, 3.0, 4.0]}, batch_size=4)


# Callbacks and meshes.


@pytest.mark.parametrize("options", [{}, {"batch_size": 4}], ids=str)
def test_who_fills_a_batch_up_calls_nobody(options):
    called = []

    def train(x):
        jax.debug.callback(lambda x: called.append(float(x)), x)
        return {"loss": x}

    quiet(train, {"x": np.arange(6.0)}, **options)
    jax.effects_barrier()
    assert sorted(called) == [0, 1, 2, 3, 4, 5]


def test_another_callback_is_another_training(tmp_path):
    def training(scale):
        shape = jax.ShapeDtypeStruct((), jnp.float32)

        def train(x):
            return {
                "loss": jax.pure_callback(lambda y: y * np.float32(scale), shape, x)
            }

        return train

    quiet(training(2), {"x": [1.0]}, store=tmp_path, batch_size=1)
    assert quiet(training(2), {"x": [1.0]}, store=tmp_path).computed == 0
    with pytest.raises(ValueError, match="holds another sweep: its `train` is another"):
        quiet(training(3), {"x": [1.0]}, store=tmp_path)


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_a_sweep_within_a_mesh(kind, at_once):
    axis = getattr(jax.sharding.AxisType, kind)
    mesh = jax.make_mesh((4,), ("d",), (axis,))
    with jax.set_mesh(mesh):
        found = quiet(long_training, AXES, steps=STEPS, batch_size=4)
    same(found, at_once)


def test_a_training_with_a_mesh_of_its_own():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("d",))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("d"))

    def train(x):
        y = jax.lax.with_sharding_constraint(jnp.ones(4) * x, place)
        return {"loss": y.sum()}

    found = quiet(train, {"x": [1.0, 2.0, 3.0]}, batch_size=2)
    np.testing.assert_array_equal(found.loss, [4, 8, 12])


# Changes that others make to a store.


def test_a_variable_that_others_add_grows_with_it(tmp_path):
    run(tmp_path, axes=AXES | {"seed": [0, 1]}, steps=2)
    table = xr.open_zarr(tmp_path)
    table["best"] = table["loss"].min("step")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Consolidated")
        table[["best"]].to_zarr(tmp_path, mode="a")
    curves = run(tmp_path, steps=3)
    assert curves.finished.all()
    plain = xr.open_zarr(tmp_path)
    assert plain.best.sizes == {"member": plain.sizes["member"]}
    assert np.isfinite(plain.best).sum() == 4  # of those that did not diverge
    assert load_sweep(tmp_path).finished.all()


def test_one_hyperparameter_at_a_time_stays_a_table(tmp_path):
    base = {"a": 1.0, "b": 2.0, "c": 3.0}

    def train(a, b, c):
        return {"loss": a * b * c}

    for name in base:
        axes = {n: np.arange(1.0, 9) if n == name else [v] for n, v in base.items()}
        quiet(train, axes, store=tmp_path, batch_size=4)
    found = load_sweep(tmp_path)
    assert dict(found.sizes) == {"member": 22, "output": 1}
    np.testing.assert_array_equal(found.loss, found.a * found.b * found.c)
    assert summary(found).value == 2


@pytest.mark.parametrize("how", ["refuses", "forgets"])
def test_a_file_system_whose_locks_are_none(how, tmp_path, monkeypatch):
    import filelock

    def acquire(self, *_, **__):
        if how == "refuses":
            raise OSError(37, "No locks available")

    monkeypatch.setattr(filelock.FileLock, "acquire", acquire)
    with pytest.raises(OSError, match="^.*`store` .* cannot be locked: ") as caught:
        run(tmp_path / "a.zarr")
    assert "let one call write at a time" in str(caught.value)


def test_the_versions_that_count(tmp_path):
    """The format's version counts, not the package's."""
    import zarr

    run(tmp_path, steps=1)
    group = zarr.open_group(tmp_path)
    header = group.attrs["sweep"]
    assert set(header["versions"]) == {"jax", "jaxlib", "device"}
    group.update_attributes({"sweep": header | {"format": 2}})
    with pytest.raises(ValueError, match="has format 2, but this version of"):
        load_sweep(tmp_path)


# Points, and seeds.


def test_points_are_pairs():
    space = {"rate": log(0.01, 1.0)}
    found = quiet(lambda rate: {"loss": rate}, points(space, 8))
    assert found.loss.dims == ("member",)
    seeds = {"seed": np.arange(8)}
    for more in (points(space, 8) | seeds, seeds | points(space, 8).copy()):
        found = quiet(lambda rate, seed: {"loss": rate * seed.astype(float)}, more)
        assert found.sizes["member"] == 8


def test_seeds_of_points_are_averaged():
    def train(rate, seed):
        return {"loss": rate + jnp.where(seed == 1, 3 * (rate - 0.2), 0.0)}

    rates = np.repeat([0.5, 0.1, 0.3], 2)
    axes = {"rate": rates, "seed": np.tile([0, 1], 3)}
    found = quiet(train, axes, zipped=True)
    judged = summary(found)
    assert judged.best == {"rate": pytest.approx(0.1)}
    assert judged.seeds == 2
    assert judged.value == pytest.approx(0.1 + 1.5 * (0.1 - 0.2), rel=1e-5)
    # A point with a missing seed is not the best, but is reported.
    part = summary(found.isel(member=[0, 1, 2, 4, 5]))
    assert part.best == {"rate": pytest.approx(0.3)}
    assert "1 point lacks seeds; by those that ran, 0.1 at rate 0.1" in str(part)


def test_selections_are_read_like_the_whole(at_once):
    whole, last = summary(at_once), at_once.loss.values[:2, :, -1].mean(1)
    assert whole.best == {"rate": AXES["rate"][last.argmin()]}
    assert whole.value == pytest.approx(last.min())
    more = at_once.assign(extra=at_once.loss.mean("step"))
    assert str(summary(more)) == str(whole)
    some = at_once.where(at_once.rate < 1, drop=True)
    assert summary(some).best == whole.best
    assert summary(some).diverged == 0
    member = at_once.isel(rate=0, seed=1)
    few = at_once.isel(rate=[0, 1], step=slice(0, 6, 2))
    values = at_once.loss.values[:2, :, 4].mean(1)
    for selected in (few, few.isel(step=-1)):
        assert summary(selected).value == pytest.approx(values.min())
    assert list(to_dataframe(few.isel(step=-1)))[:2] == ["rate", "seed"]
    (line,) = plotting.best_curves(few, top_k=1).lines
    np.testing.assert_array_equal(line.get_xdata(), [1, 3, 5])
    with pytest.raises(ValueError, match="^`curves` must have an output: one of loss,"):
        summary(at_once.rename(loss="nll", noise="n"))
    assert "noise" not in to_dataframe(at_once.drop_vars("noise"))
    table = to_dataframe(member)
    assert len(table) == 1
    assert table.seed.item() == 1
    assert summary(member).value == pytest.approx(float(member.loss[-1]))


# Python values.


class Config:
    """An object identified by its parts."""

    def __init__(self, width):
        self.width = width


def scaled(width):
    return lambda x: x * width


def test_a_value_is_what_it_is(tmp_path):
    def train(f, x):
        return {"loss": f(x) if callable(f) else x * f.width}

    def go(values):
        axes = {"f": values, "x": [1.0, 2.0]}
        return quiet(train, axes, store=tmp_path, batch_size=2)

    first = go([scaled(2), scaled(3), Config(4), jnp.tanh])
    expected = [4, 6, 8, np.tanh(np.float32(2))]
    np.testing.assert_allclose(first.loss[:, 1], expected, rtol=1e-6)
    again = go([Config(4), scaled(3), jnp.tanh, scaled(2), scaled(5)])
    assert again.computed == 2
    np.testing.assert_array_equal(
        again.loss[:, 0], [4, 3, np.tanh(np.float32(1)), 2, 5]
    )
    assert not any("0x" in name for name in again.f.values)
    assert set(first.f.values) < set(again.f.values)


def test_a_value_is_identified_once(tmp_path, monkeypatch):
    """However many points have it."""
    count, identify = [], _members.identify

    def counted(value):
        count.append(value)
        return identify(value)

    monkeypatch.setattr(_members, "identify", counted)
    axes = {"f": [jnp.sin, jnp.cos] * 20, "x": np.arange(40.0)}
    train = lambda f, x: {"loss": f(x)}  # noqa: E731
    quiet(train, axes, zipped=True, batch_size=20, store=tmp_path)
    assert len(count) == 2


def test_values_can_be_named(tmp_path):
    train = lambda f, x: {"loss": x * f.width}  # noqa: E731
    axes = {"f": [Config(2), Config(3)], "x": [1.0]}
    names = {"f": ["narrow", "wide"]}
    found = quiet(train, axes, labels=names, store=tmp_path)
    assert found.loss.sel(f="wide").item() == 3
    other = {"f": [Config(3)], "x": [1.0]}
    assert quiet(train, other, labels={"f": ["wide"]}, store=tmp_path).computed == 0
    for labels, message in (
        ({"g": ["a"]}, "`labels` must name axes, but there is no 'g'"),
        ({"f": ["a"]}, r"`labels` must be a text for each value of `f`, all"),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            quiet(train, axes, labels=labels)
    opaque = {"f": [iter([]), iter([])], "x": [1.0]}
    with pytest.raises(TypeError, match="^`axes` has a value that cannot be told ap"):
        quiet(lambda f, x: {"loss": x}, opaque, store=tmp_path / "b")


def test_rmsprop_in_a_training(tmp_path):
    """An optimizer's state is a carry like any other."""

    def init(gamma):
        x = jnp.array([-5.0, -2.0])
        return x, rmsprop(0.1, gamma, momentum=0.9).init(x)

    def step(carry, gamma):
        x, state = carry
        loss, gradient = jax.value_and_grad(lambda x: (x**2).sum())(x)
        updates, state = rmsprop(0.1, gamma, momentum=0.9).update(gradient, state)
        return (x + updates, state), {"loss": loss}

    training, axes = Training(init, step), {"gamma": [0.9, 0.99]}
    whole = quiet(training, axes, steps=10, batch_size=2)
    quiet(training, axes, steps=4, store=tmp_path, batch_size=2)
    found = quiet(training, axes, steps=10, store=tmp_path)
    np.testing.assert_array_equal(found.loss, whole.loss)
    x, state = load_carry(training, tmp_path, {"gamma": 0.99})
    assert state.count == 10


# Kinds of faults from the trackers of other packages.


def test_values_without_attributes_are_told_apart(tmp_path):
    def values():
        return [datetime(2020, 1, 1), datetime(2021, 1, 1), Decimal("0.5"), Path("/a")]

    whole = {value: float(i) for i, value in enumerate(values())}
    for again in (False, True):
        axes = {"value": np.array(values(), object)}
        if again:  # a path keeps its hash, which is no content
            hash(axes["value"][-1])
        found = quiet(
            lambda value: {"loss": jnp.float32(whole[value])}, axes, store=tmp_path
        )
        np.testing.assert_array_equal(found.loss, [0, 1, 2, 3])
        assert found.computed == (0 if again else 4)
    long = "a long text " * 10
    texts = np.array([long + "1", long + "2"], object)
    found = quiet(lambda text: {"loss": jnp.float32(len(text))}, {"text": texts})
    assert found.text.values.tolist() == texts.tolist()


def test_values_with_parts_that_have_no_hash():
    values = np.empty(2, object)
    values[:] = [("relu", [16, 32]), ("relu", [64])]
    found = quiet(lambda net: {"loss": jnp.float32(len(net[1]))}, {"net": values})
    np.testing.assert_array_equal(found.loss, [2, 1])
    flags = {"flag": [np.bool_(True), np.bool_(False)]}
    assert quiet(lambda flag: {"loss": jnp.float32(flag)}, flags).flag.dtype == bool
    big = {"x": np.array([1.0, 2.0], ">f8")}
    np.testing.assert_array_equal(quiet(square, big).loss, [1, 4])


def test_random_bits_do_not_depend_on_the_batch():
    """`jax.vmap` draws those of "rbg" from the first key of a batch."""

    def train(seed):
        return {"loss": jax.random.uniform(jax.random.key(seed, impl="rbg"))}

    whole = quiet(train, {"seed": range(6)}, batch_size=4)
    turned = quiet(train, {"seed": range(5, -1, -1)}, batch_size=4)
    np.testing.assert_array_equal(whole.loss, turned.loss[::-1])
    assert len(np.unique(whole.loss)) == 6


def test_a_score_that_is_infinite_does_not_continue():
    training = Training(
        lambda x: x,
        lambda c, x: (c, {"loss": c, "score": jnp.where(x == 0, jnp.inf, x)}),
    )
    options = {"steps": [1, 2], "by": "score", "maximize": True, "progress": False}
    found = successive_halving(training, {"x": [0.0, 1.0, 2.0]}, **options)
    np.testing.assert_array_equal(found.rung, [0, 0, 1])
    found = successive_halving(training, {"x": [1.0, 2.0]}, keep=1e-12, **options)
    np.testing.assert_array_equal(found.rung, [0, 1])


def test_who_ended_early_is_not_best_by_another_output():
    training = Training(
        lambda x: x,
        lambda c, x: (c, {"loss": jnp.where(x == 9, jnp.nan, c), "accuracy": x}),
    )
    found = quiet(training, {"x": [1.0, 9.0]}, steps=3)
    best = summary(found, "accuracy", maximize=True)
    assert best.best == {"x": 1.0}
    assert best.diverged == 1


@pytest.mark.parametrize("error", [ValueError, jax.errors.JaxRuntimeError])
def test_an_on_step_that_raises_loses_nothing(error, tmp_path):
    def on_step(curves):
        if curves.sizes["step"] == 2:
            raise error("mine")

    with pytest.raises(error, match="^mine$"):
        quiet(
            long_training, AXES, steps=3, batch_size=4, store=tmp_path, on_step=on_step
        )
    assert load_sweep(tmp_path).steps.max() >= 2


def test_a_store_in_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for computed in (2, 0):
        assert quiet(square, {"x": [1.0, 2.0]}, store=".").computed == computed
    assert Path.cwd() == tmp_path


def test_more_of_what_a_training_returns(tmp_path):
    def init(x):
        return {"x": x, "act": jax.nn.relu}

    message = "^`init` must return a tree of arrays, but .*act.* is "
    with pytest.raises(TypeError, match=message):
        quiet(Training(init, lambda c, x: (c, x)), {"x": [1.0]}, steps=1)
    with pytest.raises(ValueError, match="must not return an output 'loss'"):
        quiet(lambda loss_dim_0: {"loss": jnp.ones(2)}, {"loss_dim_0": [1.0]})
    found = quiet(
        lambda x: {"loss": x.astype("float8_e5m2")}, {"x": [1.0]}, store=tmp_path
    )
    assert found.loss.dtype == np.float32
