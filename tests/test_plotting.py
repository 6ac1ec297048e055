"""The contents of a sweep's pictures, summary and table."""

import re
import sys

import jax
import jax.numpy as jnp
import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest

from jax_rmsprop import (
    Summary,
    Training,
    diagnose,
    plotting,
    rmsprop,
    successive_halving,
    summary,
    sweep,
    to_dataframe,
)
from jax_rmsprop.plotting import best_curves, heatmap, loss_against_gamma, sensitivity

GAMMAS = [0.0, 0.9, 0.99, 0.999]
RATES = [0.001, 0.01, 0.1]


def train(gamma, learning_rate, seed):
    """Losses with a minimum at gamma .99, learning rate .01; .1 and .999 diverge."""
    distance = (jnp.log10(1 - gamma) + 2) ** 2 + (jnp.log10(learning_rate) + 2) ** 2
    loss = (1 + distance) * (1 + seed / 10) * jnp.arange(5.0, 0, -1)
    bad = (gamma > 0.995) & (learning_rate > 0.05) & (seed == 1)
    return {
        "loss": jnp.where(bad & (jnp.arange(5) > 2), jnp.nan, loss),
        "accuracy": 1 / (1 + distance),
    }


@pytest.fixture(scope="module")
def curves():
    grid = {"gamma": GAMMAS, "learning_rate": RATES, "seed": [0.0, 1.0, 2.0]}
    return sweep(train, grid, progress=False)


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


def final():
    """The last losses, in NumPy."""
    g, r, s = np.meshgrid(GAMMAS, RATES, range(3), indexing="ij")
    loss = 1 + (np.log10(1 - g) + 2) ** 2 + (np.log10(r) + 2) ** 2
    loss = loss * (1 + s / 10)
    loss[3, 2, 1] = np.nan
    return loss


def test_summary(curves):
    found = summary(curves)
    assert isinstance(found, Summary)
    assert found.best == {"gamma": 0.99, "learning_rate": 0.01}
    np.testing.assert_allclose(
        (found.value, found.low, found.high), (1.1, 1, 1.2), 1e-6
    )
    assert (found.members, found.diverged, found.unfinished) == (36, 1, 0)
    assert found.seeds == 3
    assert found.edges == []
    around = {(axis, label): mean for axis, label, mean, _, _ in found.neighbours}
    assert list(around) == [
        ("gamma", 0.9),
        ("gamma", 0.999),
        ("learning_rate", 0.001),
        ("learning_rate", 0.1),
    ]
    np.testing.assert_allclose(list(around.values()), 2.2, rtol=1e-5)
    text = str(found)
    assert "36 members, 1 diverged" in text
    assert (
        "lowest loss: 1.1 (1 to 1.2 over 3 seeds)\nat gamma 0.99, learning_rate" in text
    )


def test_a_point_with_a_diverged_seed_is_never_the_best(curves):
    """Even if its other seeds are the best."""
    corner = curves.isel(gamma=[2, 3], learning_rate=[1, 2])
    corner = corner.assign(loss=corner.loss - 100 * (corner.gamma > 0.995))
    found = summary(corner)
    assert found.best == {"gamma": 0.999, "learning_rate": 0.01}
    assert np.isnan([x[2] for x in found.neighbours if x[0] == "learning_rate"]).all()
    assert "diverged" in str(found)


def test_summary_by_another_output(curves):
    assert summary(curves, "accuracy", maximize=True).value == pytest.approx(1)
    least = summary(curves, "accuracy", maximize=False)
    assert least.best["learning_rate"] in (0.001, 0.1)
    assert "lowest accuracy: " in str(least)
    assert "highest accuracy: " in str(summary(curves, "accuracy", maximize=True))
    with pytest.raises(ValueError, match="^`maximize` must be True or False for 'acc"):
        summary(curves, "accuracy")
    edge = summary(curves.isel(gamma=slice(0, 3)))
    assert edge.edges == ["gamma"]
    assert "at the end of its axis: gamma" in str(edge)
    single = summary(curves.isel(seed=0))
    assert single.seeds == 1
    assert "seed" not in str(single).split("\n", 3)[3]


def test_summary_where_it_is_not_clear_what_to_judge(curves):
    with pytest.raises(ValueError, match=r"must be one of accuracy, loss, got 'lost'"):
        summary(curves, "lost")
    renamed = sweep(lambda x: {"a": x, "b": x}, {"x": [1.0]}, progress=False)
    with pytest.raises(ValueError, match="`output` must be one of a, b, got None"):
        summary(renamed)
    lost = sweep(lambda x: {"loss": x / 0}, {"x": [1.0]}, progress=False)
    with pytest.raises(ValueError, match="every point has a seed that diverged or"):
        summary(lost)
    matrix = sweep(
        lambda x: {"loss": x * jnp.ones((2, 3))}, {"x": [1.0]}, progress=False
    )
    with pytest.raises(ValueError, match="at most one axis of its own, but loss"):
        summary(matrix)


def test_zipped_points_have_a_summary_and_a_table():
    points = {"gamma": [0.9, 0.99, 0.999], "learning_rate": [0.1, 0.01, 0.01]}
    curves = sweep(
        lambda **point: train(seed=jnp.float32(0), **point),
        points,
        zipped=True,
        progress=False,
    )
    assert summary(curves).best == {"gamma": 0.99, "learning_rate": 0.01}
    table = to_dataframe(curves)
    assert list(table.gamma) == points["gamma"]
    assert table.shape == (3, 6)


def test_table(curves):
    table = to_dataframe(curves)
    columns = ["gamma", "learning_rate", "seed", "accuracy", "loss"]
    assert list(table.columns) == [*columns, "diverged", "finished"]
    assert len(table) == 36
    np.testing.assert_allclose(table.loss, final().ravel(), rtol=1e-5)
    assert list(np.flatnonzero(table.diverged)) == [34]
    assert table.finished.all()


def lines(ax):
    return {line.get_label(): line.get_xydata() for line in ax.get_lines()}


def test_loss_against_gamma(curves):
    ax = loss_against_gamma(curves)
    drawn = lines(ax)
    expected = final()[:, 1]
    np.testing.assert_allclose(drawn["mean"][:, 0], 1 - np.array(GAMMAS), rtol=1e-12)
    np.testing.assert_allclose(drawn["mean"][:, 1], expected.mean(1), rtol=1e-5)
    np.testing.assert_allclose(drawn["best: gamma = 0.99"], [[0.01, 1.1]], rtol=1e-5)
    band = ax.collections[0].get_paths()[0].vertices
    assert {round(float(y), 4) for y in band[:, 1]} >= {1.0, 1.2}
    assert ax.get_xlabel() == "gamma"
    assert ax.get_xscale() == "log"
    assert ax.xaxis_inverted()
    ax.figure.canvas.draw()
    assert [t.get_text() for t in ax.get_xticklabels()] == ["0.999", "0.99", "0.9", "0"]
    (top,) = ax.child_axes
    assert [t.get_text() for t in top.get_xticklabels()] == ["1,000", "100", "10", "1"]
    assert top.get_xlabel() == "steps looked back over, 1/(1 - gamma)"
    assert ax.get_title() == "loss against gamma, at learning_rate 0.01"


def test_what_diverged_is_marked(curves):
    """Only at learning rate .1, gamma .999 has no mean."""
    ax = loss_against_gamma(curves.isel(learning_rate=[2]))
    np.testing.assert_allclose(lines(ax)["diverged"][:, 0], [0.001])
    ax = sensitivity(curves)
    np.testing.assert_allclose(lines(ax)["diverged"][:, 0], [0.001])
    ax = heatmap(curves)
    np.testing.assert_array_equal(lines(ax)["a seed diverged"], [[3.5, 2.5]])


def test_heatmap(curves):
    ax = heatmap(curves)
    (mesh,) = ax.collections
    np.testing.assert_allclose(
        np.ma.filled(mesh.get_array(), np.nan), final().mean(-1).T, rtol=1e-5
    )
    (outline,) = ax.patches
    assert outline.get_xy() == (2, 1)
    assert [t.get_text() for t in ax.get_xticklabels()] == ["0", "0.9", "0.99", "0.999"]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["0.001", "0.01", "0.1"]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("gamma", "learning_rate")


def test_best_curves(curves):
    ax = best_curves(curves, top_k=3)
    drawn = lines(ax)
    assert len(drawn) == 3
    first = drawn["gamma 0.99, learning_rate 0.01"]
    np.testing.assert_array_equal(first[:, 0], [1, 2, 3, 4, 5])
    np.testing.assert_allclose(first[:, 1], 1.1 * np.arange(5, 0, -1), rtol=1e-5)
    assert "gamma 0.999, learning_rate 0.1" not in lines(best_curves(curves, top_k=12))


def test_sensitivity(curves):
    drawn = lines(sensitivity(curves))
    for i, rate in enumerate(RATES):
        np.testing.assert_allclose(
            drawn[f"{rate:g}"][:, 1], final()[:, i].mean(-1), rtol=1e-5
        )


def test_more_lines_than_colours():
    curves = sweep(
        lambda gamma, learning_rate: {"loss": gamma * learning_rate},
        {"gamma": [0.5, 0.9, 1.0], "learning_rate": np.linspace(0.1, 1, 12)},
        progress=False,
    )
    ax = sensitivity(curves)  # and a gamma of 1, which has no position
    assert len({mpl.colors.to_hex(line.get_color()) for line in ax.get_lines()}) == 12


def test_labels_say_the_units(curves):
    curves = curves.copy()
    curves.loss.attrs.update(long_name="training loss", units="nats")
    assert loss_against_gamma(curves).get_ylabel() == "training loss [nats]"
    assert best_curves(curves).get_ylabel() == "training loss [nats]"


def ranks(function, axes):
    """The first-order and total indices of a function's ranks, by loops."""
    grid = np.meshgrid(*axes.values(), indexing="ij")
    values = function(**dict(zip(axes, grid, strict=True))).ravel()
    # Equal values share the mean of their ranks.
    y = np.array([(values < v).sum() + ((values == v).sum() + 1) / 2 for v in values])
    y = y.reshape(grid[0].shape)
    found = {}
    for i, name in enumerate(axes):
        rows = np.moveaxis(y, i, 0).reshape(y.shape[i], -1)
        found[name] = (rows.mean(1).var() / y.var(), rows.var(0).mean() / y.var())
    return found


@pytest.mark.parametrize(
    "function",
    [
        lambda gamma, learning_rate, width: gamma + 10 * learning_rate + 0 * width,
        lambda gamma, learning_rate, width: (gamma - 0.5) * (learning_rate - 0.5),
        lambda gamma, learning_rate, width: gamma * learning_rate**2 - width,
    ],
)
def test_importance_is_the_analysis_of_variance(function):
    axes = {
        "gamma": np.linspace(0, 0.875, 8),
        "learning_rate": np.array([0.25, 0.5, 0.75]),
        "width": np.array([1.0, 2.0, 4.0, 8.0]),
    }
    grid = {name: x.tolist() for name, x in axes.items()}

    def train(gamma, learning_rate, width):
        return {"loss": function(gamma, learning_rate, width)}

    curves = sweep(train, grid, batch_size=96, progress=False)
    expected = ranks(function, axes)
    found = plotting._members.explained(curves, "loss", False)
    assert list(found) == list(axes)
    for name, shares in found.items():
        np.testing.assert_allclose(shares, expected[name], rtol=1e-9, atol=1e-12)
    # Reversing the order does not change it.
    turned = plotting._members.explained(curves, "loss", True)
    np.testing.assert_allclose(list(turned.values()), list(found.values()))


def test_importance_of_points():
    """A hyperparameter that decides explains all; one without effect, nothing."""
    rng = np.random.default_rng(0)
    members = {
        "gamma": rng.uniform(0, 0.999, 400),
        "learning_rate": rng.uniform(0.1, 1, 400),
        "seed": np.arange(400) % 5,
    }

    def train(gamma, learning_rate, seed):
        del gamma, seed
        return {"loss": learning_rate**3}

    curves = sweep(train, members, zipped=True, batch_size=100, progress=False)
    found = plotting._members.explained(curves, "loss", False)
    assert found["learning_rate"][0] > 0.98
    # Without the correction, by chance 19 of 399 degrees of freedom.
    assert found["gamma"][0] < 0.03
    assert found["seed"][0] < 0.03
    assert all(np.isnan(total) for _, total in found.values())


def test_importance_drawn(curves):
    ax = plotting.importance(curves, "loss")
    names = [label.get_text() for label in ax.get_yticklabels()]
    assert sorted(names) == ["gamma", "learning_rate", "seed"]
    lengths = [bar.get_width() for bar in ax.containers[1]]
    assert lengths == sorted(lengths)
    found = plotting._members.explained(curves, "loss", False)
    np.testing.assert_allclose(lengths, [found[name][0] for name in names])
    same = sweep(lambda gamma: {"loss": 0 * gamma}, {"gamma": GAMMAS}, progress=False)
    with pytest.raises(ValueError, match="members that differ in loss, but all 4"):
        plotting.importance(same)


def test_parallel_coordinates(curves):
    ax = plotting.parallel_coordinates(curves, "loss")
    (points,) = ax.collections
    lines = np.array(points.get_segments())
    assert lines.shape == (12, 3, 2)
    # gamma .99 is third of four by log(1 - gamma), learning rate .01 second of three.
    np.testing.assert_allclose(lines[-1, :, 1], [2 / 3, 0.5, 0], atol=1e-12)
    np.testing.assert_array_equal(ax.lines[0].get_xydata(), lines[-1])
    # One diverged: it is drawn below all others, and ends above the axis.
    np.testing.assert_allclose(lines[0, :, 1], [1, 1, 1.1])
    assert ax.get_legend_handles_labels()[1] == ["best: 1.1", "diverged: 1"]
    labels = [label.get_text() for label in ax.get_xticklabels()]
    assert labels == ["gamma", "learning_rate", "loss"]


def test_parallel_coordinates_of_python_values():
    def train(gamma, centered):
        return {"loss": gamma + (2.0 if centered else 1.0)}

    grid = {"gamma": [0.5, 0.9], "centered": [False, True]}
    curves = sweep(train, grid, batch_size=2, progress=False)
    ax = plotting.parallel_coordinates(curves)
    texts = [text.get_text() for text in ax.texts]
    assert {"True", "False", "0.5", "0.9"} <= set(texts)


def test_python_values_of_every_kind(tmp_path):
    """Values without an order, or with characters that HTML escapes."""
    members = {
        "kind": np.array(["<mean>", None, True] * 4, object),
        "gamma": np.linspace(0.5, 0.99, 12),
    }

    def train(kind, gamma):
        return {"loss": gamma + (1.0 if kind else 0.0)}

    curves = sweep(train, members, zipped=True, batch_size=4, progress=False)
    shares = plotting._members.explained(curves, "loss", False)
    assert shares["kind"][0] > shares["gamma"][0]
    plotting.parallel_coordinates(curves)
    curves = curves.isel(member=curves.kind.values == "<mean>")
    page = plotting.report(curves, tmp_path / "sweep.html").read_text()
    # Escaped for the page's JSON, and again as text.
    assert "kind &amp;lt;mean&amp;gt;" in page


def test_a_report_is_one_file_with_everything_in_it(curves, tmp_path):
    noted = curves.assign_attrs(note="a person's <own>")
    path = plotting.report(noted, tmp_path / "sweep.html", "loss")
    page = path.read_text()
    assert not re.search(r"<(script|link)[^>]* (src|href)=", page)
    assert "lowest loss: 1.1 (1 to 1.2 over 3 seeds)" in page
    for word in ("gamma", "learning_rate", "seed", "accuracy", "diverged", "DataTable"):
        assert word in page
    with pytest.raises(ValueError, match="`top_k` must be"):
        plotting.report(curves, path, "loss", top_k=0)


def legend(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def test_what_did_not_finish_has_not_diverged(tmp_path):
    training = Training(
        lambda gamma, learning_rate: 0 * gamma,
        lambda t, gamma, learning_rate: (t + 1, {"loss": (t + 1) * gamma}),
    )
    axes = {"gamma": [0.1, 0.2, 0.3, 0.9], "learning_rate": [1.0, 2.0]}
    options = {"steps": [1, 3], "keep": 0.25, "progress": False}
    found = successive_halving(training, axes, **options)
    for picture in (loss_against_gamma, heatmap, sensitivity):
        assert "diverged" not in legend(picture(found))
    assert "not finished" in legend(heatmap(found))
    assert "not finished: 6" in legend(plotting.parallel_coordinates(found))
    page = plotting.report(found, tmp_path / "sweep.html").read_text()
    # The table's marks, the best first; only the best have finished.
    marks = re.search(r'\["_mark",\{[^}]*"array":(\[[^]]*\])', page).group(1)
    assert marks.count("circle") == 2
    assert marks.count("triangle") == 6
    assert "the best 2 members" in page


def test_an_output_that_is_not_judged_marks_nothing(tmp_path):
    def train(gamma):
        auc = jnp.where(gamma == 0.5, jnp.nan, gamma)
        return {"loss": (gamma - 0.5) ** 2, "auc": auc}

    found = sweep(train, {"gamma": [0.1, 0.5, 0.9]}, progress=False)
    page = plotting.report(found, tmp_path / "sweep.html", "loss").read_text()
    assert re.search(r'\["_mark",\{[^}]*\}', page)[0].count("circle") == 3


def test_labels_tell_values_apart():
    gammas = [0.9, 0.99, 0.999, 0.9999, 0.99997, 0.99999]

    def train(gamma, learning_rate):
        return {"loss": (jnp.log10(1 - gamma) + 4.6) ** 2 + learning_rate}

    axes = {"gamma": gammas, "learning_rate": [0.900_01, 0.900_02]}
    ax = heatmap(sweep(train, axes, progress=False))
    assert [t.get_text() for t in ax.get_xticklabels()] == list(map(str, gammas))
    assert [t.get_text() for t in ax.get_yticklabels()] == ["0.90001", "0.90002"]
    whole = sweep(
        lambda n: {"loss": ((n - 1048577) ** 2).astype(float)},
        {"n": [1048576, 1048577, 1048578]},
        progress=False,
    )
    assert "| n 1048578 |" in str(summary(whole))


def test_an_infinite_value_is_a_value(tmp_path):
    def train(clip, rate):
        return {"loss": 1 / jnp.minimum(clip, 3.0) + rate}

    axes = {"clip": [10.0, np.inf, 1.0], "rate": [0.1, 0.2]}
    found = sweep(train, axes, progress=False)
    ax = plotting.parallel_coordinates(found)
    upwards = sorted(ax.texts, key=lambda text: text.xy[1])
    assert [t.get_text() for t in upwards if t.xy[0] == 0] == ["1", "10", "inf"]
    assert np.isfinite(
        [s for line in ax.collections[0].get_segments() for s in line]
    ).all()
    page = plotting.report(found, tmp_path / "sweep.html").read_text()
    assert '"factors":["1","10","inf"]' in page
    pairs = {"clip": [10.0, np.inf, 1.000001, 1.0000014], "rate": [0.1] * 4}
    found = sweep(train, pairs, zipped=True, progress=False)
    page = plotting.report(found, tmp_path / "sweep.html").read_text()
    assert '"factors":["1.000001","1.0000014","10","inf"]' in page


def test_complex_outputs_are_not_judged():
    found = sweep(
        lambda a: {"loss": jax.lax.complex(a, a)}, {"a": [0.1]}, progress=False
    )
    with pytest.raises(ValueError, match="^`output` must be real, but loss is complex"):
        summary(found)


def test_pictures_into_a_given_axes(curves):
    _, axes = plt.subplots(1, 6)
    of_a_sweep = [n for n in plotting.__all__ if n not in ("diagnosis", "report")]
    for draw, ax in zip(of_a_sweep, axes, strict=True):
        assert getattr(plotting, draw)(curves, ax=ax) is ax


def test_bad_input(curves, monkeypatch):
    with pytest.raises(ValueError, match="^`gamma` must be one of the grid's axes gam"):
        loss_against_gamma(curves, gamma="rho")
    with pytest.raises(ValueError, match="^`y` must be .* gamma, got 'learning_rate'"):
        heatmap(curves.isel(learning_rate=0))
    with pytest.raises(
        ValueError, match="^`gamma` must be .* 1, but seed begins at 1$"
    ):
        loss_against_gamma(curves.isel(seed=[1, 2]), gamma="seed", seed_dim="none")
    with pytest.raises(ValueError, match="one axis of its own, but accuracy has 0"):
        best_curves(curves, "accuracy", maximize=True)
    with pytest.raises(ValueError, match="`top_k` must be an integer >= 1, got 0"):
        best_curves(curves, top_k=0)
    with pytest.raises(TypeError, match="`maximize` must be True or False, got 1"):
        summary(curves, maximize=1)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'jax-rmsprop\[plot\]'"):
        heatmap(curves)


# Any order of an axis, and any other output.


def hill(gamma, learning_rate):
    distance = (jnp.log10(1 - gamma) + 1.6) ** 2 / 2 + (
        jnp.log10(learning_rate) + 2
    ) ** 2
    return {"loss": 0.1 + distance}


def test_an_axis_in_any_order_gives_the_same():
    said, drawn = [], []
    for gammas, rates in (
        ([0.99, 0.5, 0.999, 0.9], [0.01, 0.1, 0.001]),
        ([0.5, 0.9, 0.99, 0.999], [0.001, 0.01, 0.1]),
    ):
        found = sweep(hill, {"gamma": gammas, "learning_rate": rates}, progress=False)
        said.append(str(summary(found)))
        drawn.append(
            [
                loss_against_gamma(found).lines[0].get_xydata(),
                sensitivity(found).lines[0].get_xydata(),
                heatmap(found).collections[0].get_array(),
            ]
        )
    assert said[0] == said[1]
    for a, b in zip(*drawn, strict=True):
        np.testing.assert_array_equal(a, b)


def test_sweeps_that_xarray_has_joined():
    import xarray as xr

    rates = {"learning_rate": [0.001, 0.01, 0.1]}
    some, others, whole = (
        sweep(hill, {"gamma": gammas} | rates, progress=False)
        for gammas in ([0.5, 0.9], [0.99, 0.999], [0.5, 0.9, 0.99, 0.999])
    )
    for joined in (
        xr.concat([others, some], "gamma", data_vars="minimal"),
        xr.combine_by_coords(
            [some, others], data_vars="minimal", combine_attrs="drop_conflicts"
        ),
    ):
        assert str(summary(joined)) == str(summary(whole))
        assert len(to_dataframe(joined)) == 12
    twice = xr.concat([some, whole], "gamma", data_vars="minimal")
    with pytest.raises(ValueError, match="but gamma has 0.5 more than once$"):
        summary(twice)


def test_an_output_is_judged_by_itself():
    def measured_at_times(gamma):
        loss = (gamma - 0.4) ** 2 + 1 / (1 + jnp.arange(10.0))
        measured = jnp.arange(10) % 5 == 4
        return {"loss": loss, "accuracy": jnp.where(measured, 1 - loss, jnp.nan)}

    found = sweep(measured_at_times, {"gamma": [0.1, 0.5, 0.9]}, progress=False)
    assert found.diverged.all()
    by_loss = summary(found, "loss")
    assert (by_loss.best, by_loss.diverged) == ({"gamma": 0.5}, 0)
    with pytest.raises(ValueError, match="every point has a seed that diverged or"):
        summary(found, "accuracy", maximize=True)
    for draw in (loss_against_gamma, best_curves):
        draw(found)


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("blown", [1e3, 1e20])
def test_one_row_that_blew_up_leaves_the_others_their_scale(blown, maximize):
    def train(gamma, learning_rate):
        loss = jnp.where(learning_rate > 0.5, blown, hill(gamma, learning_rate)["loss"])
        return {"loss": -loss if maximize else loss}

    grid = {"gamma": [0.5, 0.9, 0.99, 0.999], "learning_rate": [1e-3, 0.01, 0.1, 1.0]}
    found = sweep(train, grid, progress=False)
    good = found.loss.isel(learning_rate=slice(0, 3)).values
    ax = heatmap(found, maximize=maximize)
    image = ax.collections[0]
    shades = image.norm(np.array([good.min(), good.max()]))
    assert abs(shades[1] - shades[0]) > 0.9
    assert image.colorbar.extend == ("min" if maximize else "max")
    for draw, count in ((sensitivity, 4), (loss_against_gamma, 0)):
        ax = draw(found, maximize=maximize)
        low, high = ax.get_ylim()
        assert low > -2 * blown / 3 if maximize else high < 2 * blown / 3
        marks = [x for x in ax.lines if x.get_marker() == ("v" if maximize else "^")]
        beyond = [m for m in marks if m.get_linestyle() == "None"]
        assert sum(len(m.get_xdata()) for m in beyond) == count


def test_what_is_no_sweeps_result(curves):
    for call in (summary, to_dataframe, heatmap, best_curves):
        with pytest.raises(TypeError, match="^`curves` must be what `sweep` returned"):
            call(curves.mean("seed"))
        with pytest.raises(TypeError, match="^`curves` must be what `sweep` returned"):
            call({"loss": 1})


def test_diagnosis():
    optimizer, g = rmsprop(0.1, 0.5, 1e-4), jnp.array([1e-4, 0.1, 1.0])

    def step(state, _):
        _, state = optimizer.update(g, state)
        return state, (diagnose(optimizer, state, g), diagnose(optimizer, state))

    _, (found, without) = jax.lax.scan(step, optimizer.init(g), length=20)
    average, share, largest = plotting.diagnosis(found)
    np.testing.assert_allclose(average.lines[1].get_ydata(), 1e-4, 1e-6)
    np.testing.assert_allclose(share.lines[0].get_ydata(), 100 / 3, 1e-6)
    np.testing.assert_allclose(
        largest.lines[0].get_ydata(), np.asarray(found.largest_step)
    )
    _, axes = plt.subplots(3)
    assert plotting.diagnosis(without, axes) == list(axes)
    assert not axes[2].lines


def test_diagnosis_of_one_step():
    optimizer = rmsprop(0.1)
    state = optimizer.init(jnp.ones(3))
    with pytest.raises(ValueError, match=r"`found` must be stacked .* \(5,\)$"):
        plotting.diagnosis(diagnose(optimizer, state))
    found = jax.tree.map(lambda x: x[None], diagnose(optimizer, state))
    with pytest.raises(ValueError, match=r"^`axes` must be three, got 2$"):
        plotting.diagnosis(found, list(plt.subplots(2)[1]))
