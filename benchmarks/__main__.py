"""Run all benchmarks: `python -m benchmarks`. On a GPU, if JAX finds one, there too."""

import argparse
import datetime
import importlib.metadata
import os
import platform
import sys

import jax
from tqdm import tqdm

from benchmarks import airfoil, cluster, quantization, schemes, stores, sweeps, update


def machine():
    """The machine and the versions, as one line of Markdown."""
    versions = []
    for name in (
        "jax",
        "jaxlib",
        "optax",
        "numpy",
        "torch",
        "bitsandbytes",
        "hyperoptax",
    ):
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"no {name}")
    return (
        f"{datetime.date.today()}, {platform.machine()}, {os.cpu_count()} cores, "
        f"Python {platform.python_version()}, {', '.join(versions)}"
    )


def main():
    """Print a table for each benchmark, on each device there is."""
    parts = [
        update.eager,
        update.large,
        update.compiling,
        quantization.quantization,
        schemes.schemes,
        airfoil.training,
        sweeps.against_loop_and_vmap,
        sweeps.sizes,
        sweeps.against_torch,
        sweeps.against_hyperoptax,
        stores.stores,
        cluster.cluster,
    ]
    parser = argparse.ArgumentParser(description="ratios to the alternatives")
    parser.add_argument("names", nargs="*", help=", ".join(p.__name__ for p in parts))
    names = parser.parse_args().names
    chosen = [p for p in parts if not names or p.__name__ in names]
    if not chosen:
        parser.error(f"no such benchmark: {' '.join(names)}")

    devices = {d.platform: d for d in [jax.devices()[0], jax.devices("cpu")[0]]}
    print(f"Measured {machine()}.\n")
    for name, device in devices.items():
        print(f"## {name}: {device.device_kind}\n", flush=True)
        with jax.default_device(device):
            for part in tqdm(chosen, desc=name, file=sys.stderr):
                print(part(), flush=True)


if __name__ == "__main__":
    main()
