"""Print the table of conventions: `python -m jax_rmsprop.conventions [name ...]`."""

import sys

from jax_rmsprop.conventions import explain

try:
    for name in sys.argv[1:] or [None]:
        explain(name)
except ValueError as error:
    sys.exit(str(error))
