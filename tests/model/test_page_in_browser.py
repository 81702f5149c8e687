"""`fastmmoe run --report`, looked at in a real browser: what is drawn is there, what somebody says does nothing.

Skipped where there is no Chromium. `FASTMMOE_SCREENSHOTS=DIR` keeps the pictures.
"""

import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import fastmmoe.scenes

from .test_cli import succeed

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SCENES = Path(fastmmoe.scenes.__file__).parent
EXAMPLE = next((SCENES / "example").glob("*.png"))
STRIKE = "</pre><script>document.title = 'struck'</script><img src=x onerror=\"document.title = 'struck'\">"
DARK, PALE = (0x3F, 0x51, 0xB5), (0xC5, 0xCA, 0xE9)  # bars: now, before

pytestmark = pytest.mark.skipif(BROWSER is None, reason="needs Chromium")


def browse(page, *options):
    profile = page.parent / "profile"
    done = subprocess.run(
        [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={profile}",
         "--virtual-time-budget=2000", "--host-resolver-rules=MAP * ~NOTFOUND", *options, page.as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    asked = ["--image", EXAMPLE, "--prompt", f"What color is the circle? {STRIKE}", "--max-new-tokens", 4]
    succeed("run", "--model", SCENES / "checkpoint", *asked, "--device", "cpu", "--report", path)
    return path


def test_it_is_drawn(page, tmp_path):
    directory = Path(os.environ.get("FASTMMOE_SCREENSHOTS", tmp_path))
    directory.mkdir(parents=True, exist_ok=True)
    screenshot = (directory / "report.png").resolve()
    browse(page, "--window-size=1000,3200", f"--screenshot={screenshot}")
    pixels = np.asarray(Image.open(screenshot).convert("RGB"))  # [height, width, 3]
    assert pixels.shape == (3200, 1000, 3)
    for color in (DARK, PALE):
        rows, columns = np.nonzero((pixels == color).all(-1))
        assert len(rows) > 1000 and len(np.unique(rows)) > 100 and len(np.unique(columns)) > 50  # two charts
    # the picture, with its tokens in colors
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 500


def test_what_somebody_says_does_nothing(page):
    dom = browse(page, "--dump-dom")
    assert "struck</title>" not in dom and "<script" not in dom and "<img src=x" not in dom
    assert "&lt;script&gt;document.title = 'struck'&lt;/script&gt;" in dom


def test_this_browser_would_do_what_it_is_told(tmp_path):
    """Else the test above would say nothing."""
    bad = tmp_path / "bad.html"
    bad.write_text(f"<title>x</title><pre>{STRIKE}</pre>")
    assert "<title>struck</title>" in browse(bad, "--dump-dom")
