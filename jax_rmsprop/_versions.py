"""Keep in one place what depends on JAX's version or has no stable name there."""

import jax

# Nothing that JAX calls public gathers what processes hold on their hosts.
from jax.experimental import multihost_utils

OLDEST = (0, 8, 0)  # jax.shard_map, jax.typeof, jax.sharding.reshard: all stable there

if jax.__version_info__ < OLDEST:
    raise ImportError(
        f"jax_rmsprop needs jax {'.'.join(map(str, OLDEST))} or newer, "
        f"but {jax.__version__} is installed"
    )

broadcast_one_to_all = multihost_utils.broadcast_one_to_all
process_allgather = multihost_utils.process_allgather
