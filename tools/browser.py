"""Open every page of the built site in Chromium, in three widths, light and dark: python tools/browser.py

Reports everything that is broken: an error of a script, a request that fails or leaves the site, a picture
that does not load, a page wider than its window, a table or, on a desktop, a block of code that has to be
scrolled, TeX that was not rendered. Screenshots go to a folder for review.
Needs the site (`mkdocs build --strict`), `pip install playwright`, and a Chromium on the PATH.
"""

import functools
import http.server
import itertools
import pathlib
import shutil
import threading

import click
from playwright.sync_api import sync_playwright

ROOT = pathlib.Path(__file__).parents[1]
WINDOWS = {"phone": (360, 800), "desktop": (1280, 900), "wide": (1920, 1080)}
SCHEMES = ("light", "dark")
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")

BROKEN = """() => {
  const broken = [];
  const wide = document.documentElement.scrollWidth - window.innerWidth;
  if (wide > 0) broken.push(`the page is ${wide} px wider than its window`);
  const scrolls = node => node.scrollWidth > node.clientWidth + 1;
  for (const table of document.querySelectorAll(".md-typeset__scrollwrap"))
    if (scrolls(table)) broken.push(`a table is cut off: ${table.innerText.slice(0, 40)}`);
  if (window.innerWidth > 1000)
    for (const code of document.querySelectorAll(".md-typeset .highlight pre > code"))
      if (scrolls(code)) broken.push(`code is cut off: ${code.innerText.slice(0, 40)}`);
  for (const image of document.images)
    if (!image.naturalWidth) broken.push(`${image.src} did not load`);
  const text = document.querySelector(".md-content").cloneNode(true);
  text.querySelectorAll("pre, code").forEach(node => node.remove());
  if (/\\\\[(\\[a-z]|\\$\\$/.test(text.textContent)) broken.push("TeX that was not rendered");
  return broken;
}"""


def serve(folder):
    handler = functools.partial(Quiet, directory=folder)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_address[1]}/"


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


def look(browser, address, path, window, scheme, picture):
    """The problems of a page; a screenshot shows its whole length."""
    broken, (width, height) = [], WINDOWS[window]
    page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
    page.on("pageerror", lambda error: broken.append(f"script error: {error}"))
    page.on("console", lambda line: broken.append(f"console: {line.text}") if line.type == "error" else None)
    page.on("requestfailed", lambda request: broken.append(f"{request.url} failed"))
    page.on("request", lambda request: request.url.startswith((address, "data:", "blob:"))
            or broken.append(f"{request.url} leaves the site"))  # fmt: skip
    page.on(
        "response",
        lambda answer: broken.append(f"{answer.url}: {answer.status}") if answer.status >= 400 else None,
    )
    page.goto(address + path, wait_until="networkidle")
    page.evaluate("document.querySelectorAll('img').forEach(i => i.loading = 'eager')")
    page.wait_for_load_state("networkidle")
    broken += page.evaluate(BROKEN)
    page.screenshot(path=picture, full_page=True)
    page.close()
    return broken


@click.command(help=__doc__, context_settings={"show_default": True})
@click.option("--site", type=click.Path(exists=True, file_okay=False, path_type=pathlib.Path),
              default=ROOT / "site", show_default="site", help="Folder of the built site.")  # fmt: skip
@click.option("--out", type=click.Path(file_okay=False, path_type=pathlib.Path),
              default=ROOT / "runs/site", show_default="runs/site", help="Screenshot folder.")  # fmt: skip
@click.option(
    "--browser", "name", help="Executable to run; default: the first found of " + ", ".join(BROWSERS) + "."
)
@click.argument("pages", nargs=-1)
def main(site, out, name, pages):
    executable = name or next(filter(None, map(shutil.which, BROWSERS)), None)
    if not executable:
        raise click.ClickException(
            f"no browser found: install one of {', '.join(BROWSERS)}, or give --browser"
        )
    out.mkdir(parents=True, exist_ok=True)
    paths = sorted(str(path.relative_to(site)) for path in site.rglob("index.html"))
    paths = [path for path in paths if not pages or path.removesuffix("/index.html") in pages]
    failed, address = 0, serve(site)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=executable,
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync"],
        )
        with click.progressbar(paths, label="Pages", item_show_func=str) as bar:
            for path in bar:
                name = path.removesuffix("index.html").strip("/").replace("/", "-") or "start"
                for window, scheme in itertools.product(WINDOWS, SCHEMES):
                    picture = out / f"{name}-{window}-{scheme}.png"
                    for problem in look(browser, address, path, window, scheme, picture):
                        failed += 1
                        click.echo(f"\n{path} ({window}, {scheme}): {problem}", err=True)
        browser.close()
    click.echo(f"{len(paths)} pages, {failed} problems; screenshots in {out}")
    raise SystemExit(bool(failed))


if __name__ == "__main__":
    main()
