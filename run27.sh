cd /tmp/w27; PYTHONPATH=/tmp/w27 JAX_COMPILATION_CACHE_DIR=/tmp/w27/.cache/jax /work/main/.venv/bin/python "$@"
