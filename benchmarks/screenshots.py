"""`python -m benchmarks.screenshots`: pictures of the live page for the documentation.

Writes docs/page-desktop.png (after an answer), docs/page-live.png (while one comes, dark) and docs/page-phone.png.
Needs playwright and a Chromium (--chromium). Guesses are always on, so that there is something to see.
"""

import argparse
import contextlib
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
# A story that is long enough to be watched, and one that the model gets right.
LONG, SHORT = "def read_lines(path):\n", "4735 + 281"
MOST_BYTES = 300_000


@contextlib.contextmanager
def serving(*flags: str) -> Iterator[str]:
    """While inside, the shipped model is served with a quarter of its experts: the address."""
    command = [
        sys.executable, "-m", "foreroute.cli.main", "serve", str(ROOT / "models" / "foreroute-tiny"),
        "--port", "0", "--json", "--memory", "25%", "--threads", "1", *flags,
    ]  # fmt: skip
    child = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert child.stdout is not None, "it is piped"
    try:
        line = child.stdout.readline()
        assert line, "the server has said on standard error why it does not start"
        yield json.loads(line)["url"]
    finally:
        child.send_signal(signal.SIGINT)
        child.wait(30)


def main() -> int:
    """Run it; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chromium", default=shutil.which("chromium"), help="the browser")
    parser.add_argument("--out", type=Path, default=ROOT / "docs", metavar="DIR", help="where pictures go")
    args = parser.parse_args()
    from playwright.sync_api import expect, sync_playwright

    # (file, width, height, colours, pixels per point, what is said, taken while the answer comes)
    shots = (
        ("page-desktop.png", 1440, 900, "light", 1, SHORT, False),
        ("page-live.png", 1440, 900, "dark", 1, LONG, True),
        ("page-phone.png", 390, 844, "light", 1.5, SHORT, False),
    )
    with serving("--no-governor") as url, sync_playwright() as play:
        browser = play.chromium.launch(executable_path=args.chromium, args=["--no-sandbox"])
        for name, width, height, scheme, scale, text, is_live in shots:
            size = {"width": width, "height": height}
            page = browser.new_context(viewport=size, color_scheme=scheme, device_scale_factor=scale).new_page()
            page.goto(url)
            page.wait_for_selector("#why-1:has-text('layers')")
            page.fill("#text", text)
            page.keyboard.press("Enter")
            if is_live:
                expect(page.locator("#caption")).to_contain_text("in time", timeout=30_000)
            else:
                page.wait_for_selector(".took", timeout=60_000)
                # What stands still is what a reader looks at.
                expect(page.locator("#caption")).to_contain_text("Nothing is computed", timeout=30_000)
            page.screenshot(path=args.out / name, full_page=width < 500)
            print(f"{args.out / name}: {(args.out / name).stat().st_size / 1e3:.0f} kB", flush=True)
            assert (args.out / name).stat().st_size < MOST_BYTES, f"{name} is too large for the documentation"
            page.context.close()
            time.sleep(0.5)
    return 0


if __name__ == "__main__":
    sys.exit(main())
