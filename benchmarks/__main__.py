"""Run all benchmarks, also on a GPU if JAX finds one: `python -m benchmarks`.

Each needs only the libraries it compares with: `python -m benchmarks eager large
quantization` needs JAX and Optax alone. `JAX_PLATFORMS=cuda` skips the CPU.
"""

import argparse
import contextlib
import datetime
import importlib
import importlib.metadata
import os
import platform
import sys

import jax
from tqdm import tqdm

# The module of each benchmark.
PARTS = {
    "eager": "update",
    "large": "update",
    "compiling": "update",
    "quantization": "quantization",
    "leaves": "quantization",
    "half_precision": "quantization",
    "block": "block",
    "schemes": "schemes",
    "training": "airfoil",
    "against_loop_and_vmap": "sweeps",
    "sizes": "sweeps",
    "against_torch": "sweeps",
    "against_hyperoptax": "sweeps",
    "stores": "stores",
    "long_trainings": "stores",
    "cluster": "cluster",
}


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


def run(name):
    """The table of a benchmark, or the name of the library it lacks."""
    try:
        return getattr(importlib.import_module(f"benchmarks.{PARTS[name]}"), name)()
    except ModuleNotFoundError as error:
        return f"### {name} needs {error.name}, which is not installed\n"


def devices():
    """JAX's default device and the CPU, by platform."""
    found = [jax.devices()[0]]
    with contextlib.suppress(RuntimeError):  # JAX_PLATFORMS excludes it
        found.append(jax.devices("cpu")[0])
    return {device.platform: device for device in found}


def main():
    """Print a table for each benchmark on each available device."""
    parser = argparse.ArgumentParser(description="ratios to the alternatives")
    parser.add_argument("names", nargs="*", help=", ".join(PARTS))
    names = parser.parse_args().names
    chosen = [name for name in PARTS if not names or name in names]
    if not chosen:
        parser.error(f"no such benchmark: {' '.join(names)}")

    print(f"Measured {machine()}.\n")
    for platform_name, device in devices().items():
        print(f"## {platform_name}: {device.device_kind}\n", flush=True)
        with jax.default_device(device):
            for name in tqdm(chosen, desc=platform_name, file=sys.stderr):
                print(run(name), flush=True)


if __name__ == "__main__":
    main()
