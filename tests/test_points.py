"""Ranges and points."""

import numpy as np
import pytest

from jax_rmsprop import log_one_minus


def test_log_one_minus():
    gammas = log_one_minus(0.5, 0.9999, 9)
    np.testing.assert_allclose(np.diff(np.log(1 - gammas)), np.log(2e-4) / 8, rtol=1e-9)
    assert (gammas[0], gammas[-1]) == (0.5, 0.9999)
    for low, high, n, error, message in (
        (1.0, 0.9, 3, ValueError, "`low` must be in [0, 1), got 1.0"),
        (0.9, 1.0, 3, ValueError, "`high` must be in [0, 1), got 1.0"),
        (0.9, 0.99, 1, ValueError, "`num` must be an integer >= 2, got 1"),
    ):
        with pytest.raises(error) as caught:
            log_one_minus(low, high, n)
        assert str(caught.value) == message
