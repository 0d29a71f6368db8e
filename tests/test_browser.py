"""The pages in a headless browser: no error, sorting by click and by keyboard, hover, a telephone's width, the dark."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from test_report import every_kind, whole

from kdnas.report import write_report

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)

# A page around the report, which a person's hands are played in.
HANDS = """<!doctype html><iframe src="report.html" width="400" height="900"></iframe><pre></pre><script>
onload = () => {
  const page = document.querySelector("iframe").contentDocument, told = {};
  const table = [...page.querySelectorAll("table")].at(-1);
  const heading = [...table.tHead.rows[0].cells].find(cell => cell.textContent.includes("latency"));
  const column = () => [...table.tBodies[0].rows].map(row => row.cells[heading.cellIndex].textContent);
  told.sorted_at_first = table.querySelector("[aria-sort]").textContent;
  for (const _ of "12") table.querySelector("th button").click();  // by number, downwards: what is not known is first
  told.unknown_first = column()[0];
  heading.querySelector("button").click();
  told.ascending = column(); told.first_sort = heading.getAttribute("aria-sort");
  heading.querySelector("button").click();
  told.descending = column(); told.second_sort = heading.getAttribute("aria-sort");
  told.num_sorted = table.querySelectorAll("[aria-sort]").length;
  told.focusable = heading.querySelector("button").tabIndex;
  const mark = page.querySelector(".mark"), tip = page.querySelector(".tip");
  mark.dispatchEvent(new PointerEvent("pointerover", { bubbles: true }));
  told.tip = tip.hidden ? "" : tip.textContent;
  page.body.dispatchEvent(new PointerEvent("pointerover", { bubbles: true }));
  told.tip_is_gone = tip.hidden;
  const { scrollWidth, clientWidth } = page.documentElement;
  told.too_wide = scrollWidth - clientWidth;
  told.paper = getComputedStyle(page.body).backgroundColor;
  document.querySelector("pre").textContent = JSON.stringify(told);
};
</script>"""


@pytest.mark.skipif(BROWSER is None, reason=f"there is no browser: none of {', '.join(BROWSERS)} is on the PATH")
def test_the_report_works_in_a_browser(tmp_path: Path) -> None:
    write_report(whole(tmp_path), every_kind(), output=tmp_path / "report.html")
    (tmp_path / "hands.html").write_text(HANDS)
    options = "--headless --no-sandbox --disable-gpu --allow-file-access-from-files --enable-logging=stderr"
    options += " --blink-settings=preferredColorScheme=0 --virtual-time-budget=5000 --dump-dom"
    command = [str(BROWSER), *options.split(), f"--user-data-dir={tmp_path / 'profile'}"]
    done = subprocess.run([*command, f"file://{tmp_path}/hands.html"], capture_output=True, text=True, timeout=300)
    assert re.findall(".*CONSOLE.*", done.stderr) == []
    told = json.loads(re.findall("<pre>(.*?)</pre>", done.stdout)[0])
    assert told == {
        "sorted_at_first": "reward",
        "unknown_first": "-",
        "ascending": ["1.25", "2.50", "4.00", "4.00", "6.25", "-"],
        "first_sort": "ascending",
        "descending": ["6.25", "4.00", "4.00", "2.50", "1.25", "-"],
        "second_sort": "descending",
        "num_sorted": 1,
        "focusable": 0,
        "tip": told["tip"],
        "tip_is_gone": True,
        "too_wide": 0,
        "paper": "rgb(21, 24, 27)",
    }
    assert re.match("trial [0-3]: . x 64, 2 heads, ", told["tip"])
