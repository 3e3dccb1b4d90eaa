"""A browser shows the report whole, sorts it by a click, and finds nothing to complain about."""

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from eval.report import write_report
from shards.folder import ShardFolder
from tests.eval.report.reporting import a_run, evaluation

# Clicks like a reader, and leaves what was seen in the document, which the browser then prints.
READER = """
<script>
addEventListener("load", () => {
  const table = document.getElementById("scores");
  const title = (column) => table.tHead.rows[0].cells[column];
  const values = (column) => [...table.tBodies[0].rows].map((row) => row.cells[column].dataset.value ?? null);
  const seen = {images: [...document.images].map((image) => image.complete && image.naturalWidth)};
  const click = (name, column) => {
    title(column).querySelector("button").click();
    const sorted = table.querySelectorAll("[aria-sort]").length;
    seen[name] = {order: title(column).ariaSort, values: values(column), sorted};
  };
  click("falling", 1);
  click("rising", 1);
  click("names", 0);
  seen.means = [...table.tFoot.rows].map((row) => row.cells[0].textContent);
  seen.sideways = document.documentElement.scrollWidth - document.documentElement.clientWidth;
  const result = document.createElement("pre");
  result.id = "seen";
  result.textContent = JSON.stringify(seen);
  document.body.append(result);
});
</script>
"""


@pytest.fixture(scope="module")
def report(phantom_shards: ShardFolder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report with a finding that cannot be scored, and with the reader in it."""
    run = a_run(tmp_path_factory.mktemp("runs") / "demo")
    html = write_report(evaluation(phantom_shards, run, absent=["Hernia"])) / "report.html"
    html.write_text(html.read_text(encoding="utf-8").replace("</body>", f"{READER}</body>"), encoding="utf-8")
    return html


def look(html: Path, width: int, profile: Path) -> tuple[dict[str, Any], str]:
    """What the reader saw at this width in pixels, and what the browser wrote to its console."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no chromium here: that a browser shows and sorts the report is not tested")
    done = subprocess.run(
        [
            *(browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
            *("--enable-logging=stderr", f"--user-data-dir={profile}", f"--window-size={width},900"),
            *("--virtual-time-budget=5000", "--dump-dom", html.as_uri()),
        ],
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    found = re.search(r'<pre id="seen">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stderr
    return json.loads(unescape(found[1])), "\n".join(re.findall(r".*CONSOLE.*", done.stderr))


# 500 is the narrowest window that a headless chromium makes.
@pytest.mark.parametrize("width", [1280, 500])
def test_a_browser_shows_every_picture_and_sorts_by_a_click(report: Path, tmp_path: Path, width: int) -> None:
    seen, console = look(report, width, tmp_path / "profile")
    assert console == ""
    assert len(seen["images"]) == 7 and all(seen["images"])
    assert seen["sideways"] == 0, "tables scroll in their own box, the page does not"
    assert seen["means"] == ["macro", "micro"]
    falling, rising, names = (seen[name] for name in ("falling", "rising", "names"))
    assert [each["order"] for each in (falling, rising, names)] == ["descending", "ascending", "ascending"]
    assert all(each["sorted"] == 1 for each in (falling, rising, names))
    numbers = [float(value) for value in falling["values"] if value is not None]
    assert numbers == sorted(numbers, reverse=True)
    assert [float(value) for value in rising["values"] if value is not None] == sorted(numbers)
    for each in (falling, rising):
        assert None not in each["values"][: len(numbers)], "cells without a value stay last"
    assert names["values"] == sorted(names["values"])
