"""Put a built site beside those of the other versions: where the pages are published.

    python docs/publish.py docs/_build/html SITE dev
    python docs/publish.py docs/_build/html SITE 0.1.0

The newest release is also at the root, so that its addresses do not change. Each copy
has a `versions.json`, from which `versions.js` draws the list and the banner.
"""

import json
import shutil
import sys
import tomllib
from pathlib import Path

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"
ADDRESS = tomllib.loads(PYPROJECT.read_text())["project"]["urls"]["Documentation"]


def publish(built, site, name):
    """Copy `built` to `site/name`, and to the root if it is the newest release."""
    built, site = Path(built), Path(site)
    folder = site / name
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(built, folder)
    names = versions(site)
    newest = names[0]
    if name == newest:
        for path in site.iterdir():
            if path.name not in {*names, ".git"}:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        shutil.copytree(built, site, dirs_exist_ok=True)
    (site / ".nojekyll").touch()
    for here, root in [(newest, ""), *((n, "../") for n in names)]:
        list_versions(site / here if root else site, here, root, names)


def list_versions(folder, here, root, names):
    """Write for a copy its version, the way to the root, and all versions."""
    known = {"here": here, "root": root, "names": names}
    (folder / "versions.json").write_text(json.dumps(known))


def versions(site):
    """Releases from the newest to the oldest, then what is not released."""

    def age(name):
        numbers = name.split(".")
        released = all(n.isdecimal() for n in numbers)
        return (released, [int(n) for n in numbers] if released else [])

    found = [p.parent.name for p in site.glob("*/index.html") if _is_version(p)]
    return sorted(found, key=age, reverse=True)


def _is_version(path):
    """Whether it is a whole site, and not the start page of a part of one."""
    return (path.parent / "genindex.html").exists()


if __name__ == "__main__":
    publish(*sys.argv[1:])
