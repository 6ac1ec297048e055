"""The built site: its links, and what a browser makes of it.

`make docs` runs this after the build. The browser is Debian's `chromium`, or any that
Playwright finds; without one, only the links are looked at.
"""

import functools
import http.server
import os
import re
import shutil
import threading
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

import pytest

SITE = Path(__file__).parent / "_build" / "html"
PAGES = sorted(SITE.rglob("*.html"))
# A page of each kind, for what is slow to look at.
KINDS = [
    "index.html",
    "tutorials/index.html",
    "tutorials/textbook.html",
    "tutorials/gamma_sweep.html",
    "how-to/gamma_and_eps.html",
    "explanation/variance.html",
    "reference/conventions.html",
    "reference/generated/jax_rmsprop.rmsprop.html",
]


class Page(HTMLParser):
    """What a page links to, the places in it, and its pictures."""

    def __init__(self, path):
        super().__init__()
        self.links, self.places, self.pictures = [], {"", "top"}, []
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.places.add(found.get("id"))
        if tag == "a" and "href" in found:
            self.links.append(found["href"])
        if tag in ("img", "script", "link", "source"):
            self.links.append(found.get("src") or found.get("href") or "")
        if tag == "img":
            self.pictures.append((found.get("src"), found.get("alt")))


@functools.cache
def page(path):
    """A page that was read once."""
    return Page(path)


def name(path):
    """How a test calls a page."""
    return path.relative_to(SITE).as_posix()


def test_the_site_is_built():
    assert len(PAGES) > 80


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_links_and_pictures(path):
    for link in page(path).links:
        split = urlsplit(link)
        if split.scheme or split.netloc:
            assert split.scheme in ("http", "https", "mailto"), link
            continue
        target = SITE / unquote(urljoin(f"/{name(path)}", split.path)).lstrip("/")
        target = path if not split.path else target
        assert target.exists(), f"{link} of {name(path)}"
        if split.fragment and target.suffix == ".html":
            assert unquote(split.fragment) in page(target).places, (
                f"{link} of {name(path)}"
            )
    for source, description in page(path).pictures:
        if source.endswith("_thumb.png"):
            continue  # beside its title, which says the same
        assert description, f"{source} of {name(path)} has no description"
        assert not re.fullmatch(r"\S+\.(png|svg)", description), description


@pytest.fixture(scope="module")
def address():
    """A server of the site, on this machine alone."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    handler = functools.partial(Quiet, directory=str(SITE))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def browser():
    """A headless browser."""
    playwright = pytest.importorskip("playwright.sync_api")
    path = shutil.which("chromium") or os.environ.get("CHROMIUM")
    with playwright.sync_playwright() as p:
        try:
            found = p.chromium.launch(executable_path=path, args=["--no-sandbox"])
        except playwright.Error as error:
            if os.environ.get("REQUIRE_BROWSER"):
                raise
            pytest.skip(f"no browser: {error}".splitlines()[0])
        yield found
        found.close()


@pytest.fixture
def looked_at(browser, address):
    """A page in the browser; at the end, nothing may have gone wrong in its console."""
    complaints = []
    context = browser.new_context()
    tab = context.new_page()
    tab.on("console", lambda m: complaints.append(m.text) if m.type == "error" else 0)
    tab.on("pageerror", lambda error: complaints.append(str(error)))
    # What a page still asks for when the next one is opened is no failure.
    tab.on(
        "requestfailed",
        lambda request: (
            None
            if request.failure == "net::ERR_ABORTED"
            else complaints.append(f"{request.url}: {request.failure}")
        ),
    )

    def look(path, **options):
        tab.goto(address + path, **options)
        return tab

    yield look
    context.close()
    assert not complaints


def test_every_page_opens_without_an_error(looked_at):
    for path in PAGES:
        looked_at(name(path))


def test_nothing_comes_from_elsewhere(looked_at, address):
    asked = []
    tab = looked_at("index.html")
    tab.on("request", lambda request: asked.append(request.url))
    for path in KINDS:
        looked_at(path)
    assert asked
    assert all(url.startswith((address, "data:")) for url in asked)


def test_the_search_finds_an_option(looked_at):
    tab = looked_at("search.html?q=eps_in_sqrt")
    tab.wait_for_selector("#search-results ul.search li a")
    found = tab.locator("#search-results ul.search li a").all_inner_texts()
    assert any("rmsprop" in text for text in found)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("path", KINDS)
def test_it_reads_on_a_phone(looked_at, path, scheme, tmp_path):
    """Nothing is wider than the screen but what scrolls by itself; text stands out."""
    tab = looked_at(path)
    tab.emulate_media(color_scheme=scheme)
    tab.set_viewport_size({"width": 390, "height": 844})
    wide = tab.evaluate("document.documentElement.scrollWidth")
    assert wide <= 390, path
    colours = tab.evaluate(
        """() => {
          const style = getComputedStyle(document.querySelector("article p"));
          return [style.color, getComputedStyle(document.body).backgroundColor];
        }"""
    )
    text, ground = (brightness(colour) for colour in colours)
    assert abs(text - ground) > 150
    assert (ground < 100) == (scheme == "dark")
    folder = Path(os.environ.get("SCREENSHOTS", tmp_path))
    file = f"{path.replace('/', '_')}_{scheme}"
    tab.screenshot(path=folder / f"{file}_phone.png")
    tab.set_viewport_size({"width": 1280, "height": 900})
    tab.screenshot(path=folder / f"{file}.png")


def brightness(colour):
    """The mean of red, green and blue, from 0 to 255."""
    return sum(map(float, re.findall(r"[\d.]+", colour)[:3])) / 3


def test_equations_are_drawn(looked_at):
    tab = looked_at("explanation/variance.html")
    heights = "all => all.map(m => m.getBoundingClientRect().height)"
    assert max(tab.locator("math").evaluate_all(heights)) > 30


@pytest.mark.parametrize("tutorial", ["eps_and_the_loss", "reading_a_sweep"])
def test_a_notebook_runs_where_nothing_else_is(tutorial, tmp_path):
    """Downloaded, in an empty folder: what it needs of its neighbours it has."""
    import nbclient
    import nbformat

    (path,) = (SITE / "_downloads").glob(f"*/{tutorial}.ipynb")
    notebook = nbformat.read(path, as_version=4)
    pip, *rest = notebook.cells
    assert pip.source.startswith("%pip install")
    # This machine has the package, which may not be published. And one more cell.
    searched = "sweep(lambda x: {'y': x}, {'x': [1.0, 2.0]}, batch_size=2);"
    progress = f"from jax_rmsprop import sweep\n{searched}"
    notebook.cells = [*rest, nbformat.v4.new_code_cell(progress)]
    here = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=300, resources=here).execute()
    outputs = [o for cell in notebook.cells for o in cell.get("outputs", [])]
    shown = {kind for output in outputs for kind in output.get("data", {})}
    assert "application/vnd.jupyter.widget-view+json" in shown  # the progress
    if tutorial == "reading_a_sweep":
        assert {"image/png", "text/html"} <= shown
        assert any(
            "xarray.Dataset" in output.get("data", {}).get("text/html", "")
            for output in outputs
        )
    assert (tmp_path / "common.py").exists()


def test_the_report_of_a_sweep(browser, tmp_path):
    """It opens from the disk, offline; one hovers, selects an axis, and sorts."""
    from jax_rmsprop import plotting, sweep

    grid = {"gamma": [0.5, 0.9, 0.99], "learning_rate": [0.1, 0.01, 0.001]}
    curves = sweep(
        lambda gamma, learning_rate: {"loss": gamma + learning_rate},
        grid,
        batch_size=9,
        progress=False,
    )
    path = plotting.report(curves, tmp_path / "sweep.html")
    context = browser.new_context(viewport={"width": 1200, "height": 1400})
    context.set_offline(True)
    tab, complaints, asked = context.new_page(), [], []
    tab.on(
        "console",
        lambda m: complaints.append(m.text) if m.type in ("error", "warning") else 0,
    )
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto(path.as_uri())
    tab.wait_for_selector(".bk-DataTable .slick-row")
    assert all(url.startswith(("file:", "data:", "blob:")) for url in asked)

    def first_cells():
        return tab.locator(".slick-row").first.inner_text().split()

    # The best first; a click on a head sorts by it, another one backwards.
    assert first_cells()[:3] == ["0.5", "1.0000e-3", "0.501"]
    head = tab.locator(".slick-header-column", has_text="gamma")
    head.click()
    head.click()
    assert first_cells()[0] == "0.99"
    # Under the pointer stand the member's values.
    box = tab.locator(".bk-Figure").first.bounding_box()
    tip = tab.get_by_text("learning_rate:").first
    tab.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    for x in range(int(box["x"]) + 60, int(box["x"] + box["width"]) - 60, 12):
        for y in range(int(box["y"]) + 10, int(box["y"] + box["height"]) - 60, 12):
            if not tip.is_visible():
                tab.mouse.move(x, y)
    assert tip.is_visible()
    tab.locator("select").first.select_option("learning_rate")
    visible = tab.evaluate(
        "() => Bokeh.documents[0].roots()[0].children"
        ".filter(c => c.type == 'Figure').map(c => c.visible)"
    )
    assert visible == [False, True]
    tab.screenshot(path=Path(os.environ.get("SCREENSHOTS", tmp_path)) / "report.png")
    context.close()
    assert not complaints
