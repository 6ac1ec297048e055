"""The script for accelerators runs, in a small form, without one."""

import jax
import numpy as np
import pytest

from benchmarks import accelerator

pytestmark = pytest.mark.usefixtures("standard_promotion")


def test_the_models_are_the_published_ones():
    """Compare the numbers of arrays and parameters to papers and checkpoints."""
    for shapes, arrays, parameters in (
        (accelerator.resnet50(), 161, 25_557_032),
        (accelerator.gpt2_medium(), 292, 354_823_168),
    ):
        assert len(shapes) == arrays
        assert sum(int(np.prod(s)) for s in shapes) == parameters


@pytest.mark.slow
def test_the_script_for_accelerators(capsys):
    seen = accelerator.main(["--tiny"])
    printed = capsys.readouterr().out
    found = dict(seen)
    assert set(accelerator.OPTIMIZERS) <= set(found)
    for name, cells in seen:
        missing = any(w in name for w in ("PyTorch", "bitsandbytes", "flash"))
        hosts = jax.__version_info__ >= (0, 10)  # before, CPUs have no pinned_host
        if not missing and (hosts or len(cells) > 1):
            assert float(cells[0]) > 0, (name, cells)
    assert printed.count("### ") == 5


@pytest.mark.slow
def test_the_script_ends_when_its_time_is_up(capsys):
    seen = accelerator.main(["--tiny", "--seconds", "0"])
    assert {cells[0] for _, cells in seen} == {"not measured: the time is up"}
    assert capsys.readouterr().out.count("the time is up") == len(seen)
