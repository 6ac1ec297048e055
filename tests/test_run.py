"""Interruption of a sweep by Ctrl-C and kill, several processes, and progress."""

import ast
import os
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import xarray as xr

from jax_rmsprop import load_sweep, sweep
from jax_rmsprop.sweeps import _batch
from tests.helpers import free_port
from tests.sweeps import (
    GRID,
    bits,
    forks,
    interrupt_after,
    kept,
    network,
    quiet,
    result,
    run_together,
    square,
)


def test_progress_is_shown(capsys):
    sweep(network, GRID, batch_size=8, devices=jax.devices()[:2])
    shown = capsys.readouterr().err
    for part in ("compiling for 8 at once", "60/60", "member/s", "diverged=20"):
        assert part in shown
    quiet(square, {"x": [1, 2]})
    assert capsys.readouterr().err == ""
    # An output that ends nobody.
    sweep(lambda x: {"loss": x, "aux": jnp.log(x)}, {"x": [-1.0, 1.0, 2.0]})
    assert "diverged=1" in capsys.readouterr().err


@pytest.mark.parametrize("kept", [False, True])
def test_ctrl_c_ends_with_what_is_finished(
    kept, tmp_path, monkeypatch, together, ctrl_c
):
    store = tmp_path / "sweep.zarr" if kept else None
    before = signal.getsignal(signal.SIGINT)
    interrupt_after(monkeypatch, 2)
    one = jax.devices()[:1]
    again = "; repeat the call to compute them" if kept else ""
    with pytest.warns(UserWarning, match="interrupted") as caught:
        curves = quiet(network, GRID, batch_size=8, store=store, devices=one)
    assert str(caught[0].message) == (
        "interrupted: 16 of 60 members are finished; those where `finished` is False "
        f"are missing{again}"
    )
    assert signal.getsignal(signal.SIGINT) is before
    assert curves.finished.values.sum() == 16
    done = curves.finished.values.ravel()
    assert done[:16].all()
    for name in ("loss", "end.v", "diverged_at", "diverged"):
        rows, whole = (
            x[name].values.reshape(60, -1).astype(float) for x in (curves, together)
        )
        np.testing.assert_array_equal(rows[:16], whole[:16])
        missing = np.nan if name in ("loss", "end.v") else rows[20]
        np.testing.assert_array_equal(
            rows[16:], np.broadcast_to(missing, rows[16:].shape)
        )
    assert not curves.diverged.values.ravel()[16:].any()
    monkeypatch.undo()
    if kept:
        assert int(load_sweep(store).finished.sum()) == 16
        whole = quiet(network, GRID, batch_size=8, store=store, devices=one)
        assert bits(whole) == bits(together)


def test_the_second_ctrl_c_ends_at_once(monkeypatch, tmp_path, ctrl_c):
    step = _batch.CompiledBatch.step

    def interrupted(self, *arguments):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        return step(self, *arguments)

    monkeypatch.setattr(_batch.CompiledBatch, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        quiet(square, {"x": [1]}, store=tmp_path)
    monkeypatch.undo()
    np.testing.assert_array_equal(quiet(square, {"x": [1]}, store=tmp_path).loss, [1])


def test_ctrl_c_before_anything_ran(monkeypatch, ctrl_c):
    build = _batch.CompiledBatch.__init__

    def interrupted(self, *args):
        signal.raise_signal(signal.SIGINT)
        build(self, *args)

    monkeypatch.setattr(_batch.CompiledBatch, "__init__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        quiet(square, {"x": [1]})


def test_a_ctrl_c_that_is_switched_off_stays_off(monkeypatch, ctrl_c):
    """A shell ignores it for background jobs."""
    ctrl_c(signal.SIG_IGN)
    interrupt_after(monkeypatch, 2)
    curves = quiet(square, {"x": range(8)}, batch_size=1, devices=jax.devices()[:1])
    assert curves.finished.all()
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


@pytest.mark.slow
def test_kill_9_ten_times_over(tmp_path, start):
    """Each time it is killed as it opens or renames another file.

    Creating the folder takes 37 such events, and appending a batch 38.
    """
    store = tmp_path / "sweep.zarr"
    random = np.random.default_rng(int.from_bytes(os.urandom(4)))
    creating = random.integers(1, 38, 4)
    computing = random.integers(80, 200, 1), random.integers(1, 160, 5)
    died, counts = np.concatenate([creating, *computing]), []
    for number in died:
        process, _ = start(store, die=int(number), size=1)
        process.join(240)
        assert process.exitcode == -signal.SIGKILL
        counts.append(kept(store))
    print("killed at", died, "with members in the folder", counts)
    assert counts == sorted(counts)
    assert 0 < counts[-1] < 60  # it was running
    found = result(*start(store, size=1))
    whole = quiet(network, GRID, batch_size=1, devices=jax.devices()[:1])
    assert found == (bits(whole), 60)


@pytest.mark.slow
def test_two_processes_give_the_same(tmp_path, start, together):
    for store in (None, tmp_path / "sweep.zarr"):
        options = {"devices": 2, "processes": 2, "port": free_port(), "size": 8}
        both = [start(store, process=i, **options) for i in range(2)]
        assert [result(*each) for each in both] == [(bits(together), 60)] * 2


@pytest.mark.slow
def test_two_processes_of_which_one_is_killed(tmp_path, start, alone):
    store = tmp_path / "sweep.zarr"
    options = {"devices": 2, "processes": 2, "size": 1}
    port = free_port()
    (first, _), (second, _) = (
        start(store, process=i, port=port, die=150 * (1 - i), **options)
        for i in range(2)
    )
    first.join(240)  # the writer
    assert first.exitcode == -signal.SIGKILL
    second.kill()  # it would wait for the other
    second.join()
    assert 0 < kept(store) < 60
    port = free_port()
    both = [start(store, process=i, port=port, **options) for i in range(2)]
    assert [result(*each) for each in both] == [(bits(alone), 60)] * 2


@pytest.mark.slow
def test_two_calls_at_once_twenty_times_over(tmp_path, start):
    """On the same grid, and every other time on two overlapping grids."""
    grids = [np.arange(40.0), np.arange(20.0, 60.0)]
    expected = [(bits(quiet(square, {"x": x}, batch_size=4)), 40) for x in grids]
    stores, barrier = [tmp_path / str(n) for n in range(20)], forks().Barrier(2)
    which = [0] * 20, [0, 1] * 10
    both = [
        start(
            barrier,
            [(store, grids[i]) for store, i in zip(stores, each, strict=True)],
            target=run_together,
        )
        for each in which
    ]
    for call, each in zip(both, which, strict=True):
        assert result(*call) == [expected[i] for i in each]
    for n, store in enumerate(stores):
        steps = xr.open_zarr(store).steps
        assert int(steps.sum()) == (60 if n % 2 else 40)  # no repeats
    locks = [store.with_name(f".{store.name}.lock") for store in stores]
    assert sorted(tmp_path.iterdir()) == sorted([*stores, *locks])


READER = """
import sys, numpy as np, xarray as xr
print("ready", flush=True)
seen = set()
while max(seen, default=0) < 60:
    try:
        rows = xr.open_zarr(sys.argv[1]).drop_vars("output")
        there = rows.steps.values > 0  # first: what it says is there is there
        rows = rows.load().isel(member=there)
    except FileNotFoundError:
        continue
    assert np.isfinite(rows.loss[:, 0]).all() and (rows.gamma > 0).all()
    seen.add(int(there.sum()))
print(sorted(seen))
"""


@pytest.mark.slow
def test_a_reader_sees_whole_rows_only(tmp_path, start):
    """In a loop in another program, reading each array at any time."""
    store = tmp_path / "sweep.zarr"
    reader = subprocess.Popen(
        [sys.executable, "-c", READER, str(store)], stdout=subprocess.PIPE, text=True
    )
    assert reader.stdout.readline() == "ready\n"
    for seeds in (1, 2, 3, 4):
        result(*start(store, size=1, grid=GRID | {"seed": range(seeds)}))
    seen, _ = reader.communicate(timeout=120)
    assert reader.returncode == 0
    assert len(ast.literal_eval(seen)) > 4  # it read while the store grew
