"""Each example prints the numbers it promises, and writes a picture."""

import importlib
import re
import runpy
from pathlib import Path

import jax
import matplotlib.image
import matplotlib.pyplot as plt
import numpy as np
import optax
import pytest

from jax_rmsprop import plotting, rmsprop
from tests.helpers import airfoil_or_skip, free_port, require
from tests.sweeps import forks, script

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(autouse=True)
def as_a_script(monkeypatch, standard_promotion):
    """Make neighbouring scripts importable, and use JAX's default promotion."""
    monkeypatch.syspath_prepend(str(EXAMPLES))


def look_at(picture):
    """Check a picture's size and content."""
    pixels = matplotlib.image.imread(picture)
    assert min(pixels.shape[:2]) > 400
    assert pixels[..., :3].std() > 0.05


@pytest.fixture
def cells(capsys, monkeypatch, tmp_path):
    """Run a script of cells, check its pictures, and return what it printed.

    Replacements in the script's text make a smaller training.
    """

    def run(name, smaller=()):
        plt.close("all")
        monkeypatch.chdir(tmp_path)
        text = (EXAMPLES / f"{name}.py").read_text()
        assert "from common" not in text, "it runs where it is pasted"
        for whole, part in dict(smaller).items():
            assert whole in text
            text = text.replace(whole, part)
        path = tmp_path / f"{name}.py"
        path.write_text(text)
        run.names = runpy.run_path(str(path), run_name="__main__")
        for number in plt.get_fignums():
            figure = plt.figure(number)
            assert any(axes.get_title() for axes in figure.axes), "of what?"
            figure.canvas.draw()
            assert np.asarray(figure.canvas.buffer_rgba())[..., :3].std() > 10
        found = capsys.readouterr().out, len(plt.get_fignums())
        plt.close("all")
        return found

    return run


def test_the_textbook(cells):
    airfoil_or_skip()
    printed, pictures = cells("textbook")
    assert pictures == 7
    # ln 2 / ln(1/gamma), as the text says for 0.9.
    assert re.search(r" 0.90 +10.0 +6.6 +0.65 ", printed)
    by_hand, ready = re.findall(r"(?:by hand|rmsprop): (\[.*\])", printed)
    assert by_hand == ready
    for gamma in (0.95, 0.9, 0.8, 0.7):
        row = next(line for line in printed.splitlines() if f" {gamma:.2f} " in line)
        assert f"{1 - gamma**40:.4f}" in row
    assert "epoch 20, x1 -0.010599, x2 0.000000\n" in printed
    # The textbook's AdaGrad, with the same learning rate.
    assert "x1 -2.382563, x2 -0.158591\n" in printed
    losses = re.findall(r"loss: (0\.\d{6})", printed)
    # The concise form rounds once less for the same steps: a sign moves.
    assert len(losses) == 2
    assert abs(float(losses[0]) - float(losses[1])) < 1e-5
    mean = float(re.search(r"20 seeds: mean (0\.\d+)", printed).group(1))
    assert 0.242 <= mean <= 0.250
    start, end = re.search(
        r"gamma 1, learning rate 0.4: .* 1 step (\S+), after 20 (\S+)", printed
    ).groups()
    assert 1e3 < float(start) < float(end)
    straight, rotated = re.findall(r"20 steps (\S+)", printed)
    assert float(straight) < 1e-3 < float(rotated)
    # The text's claims about the rates and the gammas.
    rates = dict(re.findall(r"rate +(\S+): .* accuracy (0\.\d+)", printed))
    assert max(rates, key=lambda rate: float(rates[rate])) == "1e-02"
    assert float(rates["1e-02"]) > 0.95
    assert float(rates["1e-05"]) < 0.5
    assert float(rates["1e+00"]) < 0.5
    assert min(float(rates[rate]) for rate in ("1e-03", "1e-01")) > 0.9
    gammas = dict(re.findall(r"gamma +(.+): .* accuracy (0\.\d+)", printed))
    assert len(gammas) == 6
    assert min(gammas, key=lambda name: float(gammas[name])) == "0.999"
    assert min(float(gammas[name]) for name in gammas if name != "0.999") > 0.96


# Flax 0.12.0 still has the old names of what JAX 0.8 calls Ref.
@pytest.mark.filterwarnings(
    "ignore:jax.(array_ref|ArrayRef) is deprecated:DeprecationWarning"
)
@pytest.mark.slow
@pytest.mark.parametrize("name", ["flax_network", "equinox_network"])
def test_networks(cells, name):
    printed, pictures = cells(name)
    assert pictures == 1
    assert float(re.search(r"([\d.]+)% right", printed).group(1)) > 93


@pytest.mark.slow
def test_reading_a_sweep(cells):
    printed, pictures = cells("reading_a_sweep")
    assert pictures == 6
    assert "90 members, 0 diverged" in printed
    assert re.search(r"sweep.html: \d", printed)
    # The text's claims about the pictures.
    curves = cells.names["curves"]
    loss = curves.loss[..., -1].mean("seed")
    rates = loss.learning_rate[loss.argmin("learning_rate").values]
    assert rates[1] > rates[-1]  # the valley is diagonal
    found = plotting._members.explained(curves, "loss", False)
    (rate, _), (gamma, together) = found["learning_rate"], found["gamma"]
    assert rate > gamma
    assert together > 3 * gamma


def test_what_goes_wrong(cells):
    printed, pictures = cells("what_goes_wrong")
    assert pictures == 4
    theirs, ours = map(int, re.findall(r"(\d+) of 1001", printed))
    assert theirs > ours == 0
    full, nearest, random = map(
        float, re.findall(r"(\S+) of what it should be", printed)
    )
    assert full == 1
    assert nearest > 50
    assert 0.9 < random < 1.1
    dead, alive = re.findall(r"at 50 and 1199 are (\S+) and (\S+)", printed)
    assert dead == ("0", "0")
    assert alive == ("3.16", "1")
    halves = [float(x) for x in re.findall(r"gradient of (\S+)", printed)]
    # g / sqrt(g^2 + eps) is one half at g = sqrt(eps / 3).
    assert halves == pytest.approx([(1e-3 / 3) ** 0.5, 1e-3, 0.0316], rel=0.1)


def test_does_it_converge(cells):
    """The sweep's thresholds enclose those of the formula."""
    printed, pictures = cells("does_it_converge")
    assert pictures == 2
    ends = re.findall(r"gamma (\S+): x goes from 1 to (\S+)", printed)
    assert [float(x) > 1 for _, x in ends] == [True, True, False, False]
    assert [float(x) for _, x in ends[2:]] == pytest.approx([-2, -2], abs=0.1)
    rows = re.findall(r"(?m)^ +(\d+) +(0\.\d+) +(0\.\d+) +(0\.\d+) ", printed)
    assert len(rows) == 5
    for _, diverges, converges, computed in rows:
        # Up to the spacing of the axis.
        assert float(diverges) <= float(computed) + 2e-5
        assert float(computed) <= float(converges)


@pytest.mark.slow
def test_dqn(cells):
    """Nature's recipe on a sum is DQN Zoo's on a mean; on a mean it barely learns."""
    require("gymnax")
    fewer = {
        "THOUSANDS = 100": "THOUSANDS = 20",
        "RATES, SEEDS = [2.5e-4, 1e-3, 1e-2]": "RATES, SEEDS = [2.5e-4]",
        "list(RECIPES | VARIANTS), ": "list(RECIPES := dict([*RECIPES.items()][:3])), ",
        "\ngrid = ": "\nVARIANTS = {}\ngrid = ",
        "thousands % 50": "thousands % 10",
    }
    printed, pictures = cells("dqn", fewer)
    assert pictures == 2
    assert "dqn_zoo, 10,000 steps" in printed
    rows = dict(re.findall(r"(?m)^(\S.{21})( +\d+ \(.*)$", printed))
    rows = {name.strip(): row for name, row in rows.items()}
    assert rows["nature_dqn"] == rows["dqn_zoo"]
    first = {name: float(row.split()[0]) for name, row in rows.items()}
    assert first["nature_dqn on a mean"] < first["nature_dqn"] / 2
    assert first["nature_dqn"] > 100


@pytest.mark.slow
def test_eps_and_the_loss(cells):
    printed, pictures = cells("eps_and_the_loss")
    assert pictures == 1
    rows = re.findall(r"(\S+)\s+([\d.]+)%\s+(\d+)%", printed)
    (summed, accuracy, share), (_, worse, all_of_it), (mean, same, _) = rows
    # Powers of two, so the first and the third are the same steps.
    assert (summed, accuracy) == (mean, same)
    assert float(accuracy) > 90 > float(worse)
    assert int(share) < 60
    assert int(all_of_it) == 100


def test_data_that_is_nowhere(monkeypatch, tmp_path):
    common = importlib.import_module("common")
    both = r"Either connect to the internet, .* set JAX_RMSPROP_DATA to that folder"
    monkeypatch.setenv("JAX_RMSPROP_DATA", str(tmp_path))
    with pytest.raises(SystemExit, match=f"has no such file. {both}"):
        common.airfoil()

    def no_internet(*args, **kwargs):
        raise ConnectionError

    monkeypatch.delenv("JAX_RMSPROP_DATA")
    monkeypatch.setattr(common.pooch, "retrieve", no_internet)
    with pytest.raises(SystemExit, match=f"the download failed .* {both}"):
        common.airfoil()


def test_port_from_pytorch(cells):
    require("torch")
    printed, pictures = cells("port_from_pytorch")
    assert pictures == 1
    losses = re.findall(r"  (\d\.\d{6})$", printed, re.M)
    assert len(losses) == 3
    # The error of 100 steps of two frameworks' float32 arithmetic.
    assert abs(float(losses[0]) - float(losses[1])) < 1e-4
    with_state, without = (
        float(x) for x in re.findall(r"(\d\.\de-\d+)$", printed, re.M)
    )
    assert with_state < 1e-3
    assert without > 0.1


@pytest.mark.slow
def test_low_precision_state(cells):
    printed, pictures = cells("low_precision_state")
    assert pictures == 1
    rows = re.findall(r"^(.{16})  +([\d,]+) +(\d\.\d+) \+- (\d\.\d+)$", printed, re.M)
    loss = [float(row[2]) for row in rows]
    spread = float(rows[0][3])
    assert len(rows) == 4
    assert abs(loss[1] - loss[0]) < spread
    assert abs(loss[2] - loss[0]) < spread
    # By then, rounding alone has made it another training.
    assert loss[3] - loss[0] > 3 * spread


@pytest.mark.slow
def test_gamma_sweep(cells, tmp_path):
    """Check the text's claims about the numbers."""
    printed, pictures = cells("gamma_sweep")
    assert pictures == 4
    assert "357 members, 0 diverged" in printed
    assert "at gamma 0.982217, learning_rate 0.01" in printed
    look_at(tmp_path / "gamma_sweep.png")
    loss = cells.names["curves"].loss.sel(learning_rate=0.01)
    mean, low, high = (f("seed").values for f in (loss.mean, loss.min, loss.max))
    best = mean.argmin()
    assert (low[[best - 1, best + 1]] < high[best]).all()
    assert (mean[loss.gamma.values < 0.98] < 0.08).all()
    assert (mean[loss.gamma.values > 0.9985] > 0.4).all()
    # One of the members, trained alone with a plain Python loop.
    curve = cells.names["curves"].train_loss.sel(learning_rate=0.01, seed=1)[4]
    p = cells.names["network"](key := jax.random.key(1))
    optimizer = rmsprop(np.float32(0.01), np.float32(curve.gamma))
    state, losses = optimizer.init(p), []
    step = jax.jit(jax.value_and_grad(cells.names["cross_entropy"]))
    order = jax.random.permutation(jax.random.fold_in(key, 0), 1500)
    for rows in order.reshape(50, 30):
        value, gradient = step(p, rows)
        updates, state = optimizer.update(gradient, state)
        p = optax.apply_updates(p, updates)
        losses.append(value)
    # A vmapped matrix product adds in another order; 50 steps accumulate that.
    np.testing.assert_allclose(curve[0], np.mean(losses), rtol=1e-4)


@pytest.mark.slow
def test_sweep_many_hosts(tmp_path):
    """The two commands of its docstring give the results of one process."""
    found = []
    for processes in (2, 1):
        words = ["--processes", processes, "--address", f"127.0.0.1:{free_port()}"]
        words += ["--store", tmp_path / f"{processes}.zarr"]
        words += ["--output", tmp_path / "picture.png"]
        printed = [tmp_path / f"{i} of {processes}.txt" for i in range(processes)]
        started = [
            forks().Process(
                target=script,
                args=(EXAMPLES / "sweep_many_hosts.py",)
                + ([str(word) for word in (*words, "--process", i)], printed[i]),
                daemon=True,
            )
            for i in range(processes)
        ]
        for process in started:
            process.start()
        for process in started:
            process.join(240)
        assert [process.exitcode for process in started] == [0] * processes
        first = printed[0].read_text()
        assert f"on {2 * processes} devices of {processes} process(es)" in first
        found.append(re.search(r"lowest loss: .*", first).group(0))
        assert (tmp_path / "picture.png").exists()
    assert found[0] == found[1]


@pytest.mark.slow
def test_sweep_on_a_cluster(cells):
    pytest.importorskip("distributed")
    # Eight batches, so that each worker gets some.
    printed, pictures = cells("sweep_on_a_cluster", {"steps=5": "steps=1"})
    assert pictures == 1
    assert "64 trainings on 2 devices" in printed
    assert "64 members, 0 diverged" in printed


@pytest.mark.slow
def test_successive_halving(cells):
    """A point as good as the grid's best, with at most a third of the steps."""
    fewer = {
        "0.9999, 17)": "0.9999, 9)",
        "[0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3]": "[0.001, 0.003, 0.01, 0.1]",
        "(2, 7, 20)": "(1, 3, 9)",
    }
    printed, pictures = cells("successive_halving", fewer)
    assert pictures == 1
    share = int(re.search(r"(\d+)% of the grid's steps", printed).group(1))
    ours = float(re.search(r"halving: loss ([\d.]+)", printed).group(1))
    theirs = re.search(r"the grid: loss ([\d.]+) \(([\d.]+) to ([\d.]+)", printed)
    best, low, high = map(float, theirs.groups())
    assert share <= 33
    assert best <= ours <= best + (high - low)


@pytest.mark.slow
def test_population_based_training(cells):
    """It improves, members copy others, and bad rates die out."""
    printed, pictures = cells("population_based_training", {"16, 6, 2": "16, 3, 2"})
    assert pictures == 1
    best = [float(x) for x in re.findall(r"best loss ([\d.]+)", printed)]
    assert len(best) == 3
    assert best[-1] < best[0]
    assert printed.count("; 4 replaced") == 3
    before = float(re.search(r"rates: (\d+) times", printed).group(1))
    after = float(re.search(r"end: (\d+) times", printed).group(1))
    assert after < before / 10
