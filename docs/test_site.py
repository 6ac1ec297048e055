"""The built site: its links, and what a browser makes of it.

`make docs` runs this after the build. The browser is Debian's `chromium`, or any that
Playwright finds; without one, only the links are looked at.
"""

import contextlib
import functools
import http.server
import os
import re
import shutil
import threading
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import quote, unquote, urljoin, urlsplit

import publish
import pytest

SITE = Path(__file__).parent / "_build" / "html"
PAGES = sorted(SITE.rglob("*.html"))
# A page of each kind, for what is slow to look at.
KINDS = [
    "index.html",
    "tutorials/index.html",
    "tutorials/textbook.html",
    "tutorials/gamma_sweep.html",
    "tutorials/reading_a_sweep.html",
    "how-to/your_model.html",
    "how-to/batch_size.html",
    "explanation/which_optimizer.html",
    "how-to/gamma_and_eps.html",
    "explanation/variance.html",
    "reference/conventions.html",
    "reference/benchmarks.html",
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


@contextlib.contextmanager
def served(folder):
    """A server of a folder, on this machine alone; its address."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    handler = functools.partial(Quiet, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def address():
    """The site's address."""
    with served(SITE) as found:
        yield found


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


def first_found(tab):
    """The addresses of what a search shows first."""
    summary = "document.querySelector('#search-results .search-summary')"
    tab.wait_for_function(f"{summary}?.innerText.match(/found|did not/)")
    links = tab.locator("#search-results ul.search li a")
    return links.evaluate_all("all => all.map(a => a.getAttribute('href'))")


# What people type, and the page that answers.
SEARCHES = {
    "mixed precision": "how-to/mixed_precision",
    "bf16": "how-to/mixed_precision",
    "FAQ": "reference/faq",
    "quickstart": "index",
    "multi gpu": "how-to/sharding",
    "PBT": "tutorials/population_based_training",
    "early stopping": "tutorials/successive_halving",
    "Haiku": "how-to/your_model",
    "Linen": "how-to/your_model",
    "TrainState": "how-to/your_model",
    "A2C": "how-to/dqn",
    "Colab": "tutorials/",  # any that opens there
    "8-bit": "tutorials/low_precision_state",
    "FSDP": "how-to/sharding",
    "getting started": "index",
    "batch size": "how-to/batch_size",
    "warmup": "how-to/schedules",
    "does it converge": "tutorials/does_it_converge",
}


@pytest.mark.parametrize("words", SEARCHES)
def test_a_search_finds_its_page(looked_at, words):
    """Among the first three."""
    tab = looked_at(f"search.html?q={quote(words)}")
    found = [urlsplit(link).path for link in first_found(tab)]
    pages = list(dict.fromkeys(found))[:3]
    assert any(page.startswith(SEARCHES[words]) for page in pages), pages


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("path", KINDS)
def test_it_reads_on_a_phone(looked_at, path, scheme, tmp_path):
    """Nothing is wider than the screen but what scrolls by itself; text stands out."""
    tab = looked_at(path)
    tab.emulate_media(color_scheme=scheme)
    tab.set_viewport_size({"width": 390, "height": 844})
    wide = tab.evaluate("document.documentElement.scrollWidth")
    assert wide <= 390, path
    faint = tab.evaluate(FAINT)
    assert not faint, faint[:5]
    ground = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (brightness(ground) < 100) == (scheme == "dark")
    folder = Path(os.environ.get("SCREENSHOTS", tmp_path))
    file = f"{path.replace('/', '_')}_{scheme}"
    tab.screenshot(path=folder / f"{file}_phone.png")
    tab.set_viewport_size({"width": 1400, "height": 900})
    tab.screenshot(path=folder / f"{file}.png")


# Texts of a page's body whose contrast is below 4.5, as WCAG 2.1 computes it.
FAINT = """() => {
  const parse = text => {
    const found = text.match(/[\\d.]+/g).map(Number);
    const scale = text.startsWith("color(") ? 255 : 1;
    return [...found.slice(0, 3).map(x => scale * x), found[3] ?? 1];
  };
  const over = (top, below) =>
    [0, 1, 2].map(i => top[3] * top[i] + (1 - top[3]) * below[i]).concat(1);
  const luminance = c => {
    const [r, g, b] = c.slice(0, 3).map(x => {
      x /= 255;
      return x <= 0.03928 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = element => {
    const layers = [];
    for (let e = element; e; e = e.parentElement) {
      layers.unshift(parse(getComputedStyle(e).backgroundColor));
    }
    return layers.reduce((below, top) => over(top, below), [255, 255, 255, 1]);
  };
  const faint = [];
  const bodies = "p, li, td, th, pre span, h1, h2, .xr-wrap :is(span, div, label)";
  for (const e of document.querySelectorAll(`article :is(${bodies})`)) {
    const own = [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
    if (!own || !e.checkVisibility()) continue;
    const behind = ground(e);
    const text = over(parse(getComputedStyle(e).color), behind);
    const [a, b] = [luminance(text), luminance(behind)].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < 4.5) faint.push([e.textContent.trim().slice(0, 40), ratio.toFixed(2)]);
  }
  return faint;
}"""


def brightness(colour):
    """The mean of red, green and blue, from 0 to 255."""
    return sum(map(float, re.findall(r"[\d.]+", colour)[:3])) / 3


def test_the_table_of_conventions_fits_on_one_screen(looked_at):
    tab = looked_at("reference/conventions.html")
    tab.set_viewport_size({"width": 1400, "height": 900})
    wide = "t => t.scrollWidth - t.parentElement.clientWidth"
    assert tab.locator("article table").evaluate(wide) <= 0
    pytorch = tab.locator("article tbody tr").first.locator("td.differs")
    assert pytorch.all_inner_texts() == [
        "alpha 0.99",
        "eps 1e-08, outside",
        "after",
        "coupled",
    ]
    assert tab.locator("article table tbody a").count() >= 25


def test_pages_are_there_for_machines():
    listed = (SITE / "llms.txt").read_text()
    assert "how-to/your_model.md" in listed
    assert (SITE / "how-to" / "your_model.md").read_text().startswith("# Sweep your")
    index = (SITE / "index.html").read_text()
    card = re.search(r'property="og:image" content="([^"]*)"', index)[1]
    assert (SITE / card.removeprefix(publish.ADDRESS)).exists()


def test_names_of_others_are_links():
    text = (SITE / "explanation" / "optax.html").read_text()
    assert "optax.readthedocs.io/en/latest/api/generated/optax.rmsprop.html" in text
    text = (SITE / "how-to" / "sweep.html").read_text()
    assert "docs.jax.dev/en/latest/_autosummary/jax.vmap.html" in text


def test_a_tutorial_opens_in_colab():
    links = page(SITE / "tutorials" / "textbook.html").links
    (colab,) = [link for link in links if link.startswith("https://colab.")]
    assert colab.endswith("/blob/gh-pages/notebooks/textbook.ipynb")
    assert (SITE / "notebooks" / "textbook.ipynb").exists()


def test_versions_are_listed_and_old_ones_say_so(browser, tmp_path):
    def ignore(folder, names):
        return [n for n in names if n.startswith(("_images", "_downloads", "_sources"))]

    small = tmp_path / "built"
    shutil.copytree(SITE, small, ignore=ignore)
    for version in ("0.9.0", "0.10.0", "dev"):
        publish.publish(small, tmp_path / "site", version)
    tab = browser.new_page()
    with served(tmp_path / "site") as address:
        tab.goto(f"{address}0.9.0/how-to/sweep.html")
        banner = tab.locator(".version-banner")
        text = "This is version 0.9.0. The newest release is 0.10.0."
        assert re.sub(r"\s+", " ", banner.inner_text()) == text
        names = tab.locator(".versions option").all_inner_texts()
        assert names == ["0.10.0", "0.9.0", "dev"]
        banner.locator("a").click()
        tab.wait_for_url(f"{address}index.html")
        tab.locator(".versions").wait_for()
        assert not tab.locator(".version-banner").count()
        tab.locator(".versions select").select_option("dev")
        tab.wait_for_url(f"{address}dev/index.html")
        assert "the development version" in tab.locator(".version-banner").inner_text()
    tab.close()


def test_gamma_is_a_slider(looked_at):
    """The textbook's number at 0.9, and another path elsewhere."""
    tab = looked_at("tutorials/textbook.html")
    slider, said = (tab.locator(f".gamma-slider {x}") for x in ("input", "output"))
    assert "after 20 steps x1 -0.010599, x2 0.000000" in said.inner_text()
    path = tab.locator(".gamma-slider polyline")
    before = path.get_attribute("points")
    slider.fill("2")
    assert said.inner_text().startswith("0.990: looks back 100 steps")
    assert path.get_attribute("points") != before


def test_equations_are_drawn(looked_at):
    tab = looked_at("explanation/variance.html")
    heights = "all => all.map(m => m.getBoundingClientRect().height)"
    assert max(tab.locator("math").evaluate_all(heights)) > 30


@pytest.mark.parametrize("tutorial", ["eps_and_the_loss", "reading_a_sweep"])
def test_a_notebook_runs_where_nothing_else_is(tutorial, tmp_path):
    """Downloaded, in an empty folder."""
    import nbclient
    import nbformat

    (path,) = (SITE / "_downloads").glob(f"*/{tutorial}.ipynb")
    notebook = nbformat.read(path, as_version=4)
    title, pip, *rest = notebook.cells
    assert title.cell_type == "markdown"
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
    assert first_cells()[:3] == ["0.5", "0.001", "0.501"]
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
