"""The pages in a headless browser: no error, sorting by click and keyboard, hover, a telephone's width, the dark."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from kdnas.cli.main import main
from kdnas.report.page import write_report
from tests.commands.test_report import search
from tests.report.test_page import every_kind, whole

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)

# A page around PAGE, which a person's hands are played in: the last table's COLUMN is sorted.
HANDS = """<!doctype html><iframe src="PAGE" width="400" height="900"></iframe><pre></pre><script>
onload = () => {
  const page = document.querySelector("iframe").contentDocument, told = {};
  const table = [...page.querySelectorAll("table")].at(-1);
  const heading = [...table.tHead.rows[0].cells].find(cell => cell.textContent.includes("COLUMN"));
  const column = () => [...table.tBodies[0].rows].map(row => row.cells[heading.cellIndex].textContent);
  told.sorted_at_first = table.querySelector("[aria-sort]")?.textContent ?? "";
  for (const _ of "12") table.querySelector("th button").click();  // by number, downwards: what is not known is first
  told.by_first_column = column()[0];
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
  document.querySelector("iframe").width = 1200;
  told.cut = [...page.querySelectorAll(".scroll")].map(part => Math.max(0, part.scrollWidth - part.clientWidth));
  document.querySelector("pre").textContent = JSON.stringify(told);
};
</script>"""


# Of each page: a column of its last table, what is read there, and the first mark of its pictures.
PAGES = {
    "report.html": (
        "latency",
        {"sorted_at_first": "reward", "by_first_column": "-"},
        ["1.25", "2.50", "4.00", "4.00", "6.25", "-"],
        ["6.25", "4.00", "4.00", "2.50", "1.25", "-"],
        "trial [0-3]: . x 64, 2 heads, ",
    ),
    "comparison.html": (
        "loss",
        {"sorted_at_first": "", "by_first_column": "0.5000"},  # that of the last run by name
        ["0.1250", "0.2500", "0.5000", "-"],
        ["0.5000", "0.2500", "0.1250", "-"],
        "done: 0.7500 after 2 candidates",
    ),
}


@pytest.mark.skipif(
    BROWSER is None, reason=f"there is no browser: none of {', '.join(BROWSERS)} is on the PATH"
)
@pytest.mark.parametrize(
    ("scheme", "paper"), [("dark", "rgb(21, 24, 27)"), ("light", "rgb(255, 255, 255)")]
)
@pytest.mark.parametrize("page", PAGES)
def test_a_page_works_in_a_browser(page: str, scheme: str, paper: str, tmp_path: Path) -> None:
    column, first, ascending, descending, tip = PAGES[page]
    if page == "report.html":
        write_report(whole(tmp_path), every_kind(), output=tmp_path / page)
    else:
        runs = {"done": [0.5, 0.25], "begun": [0.375, 0.125], "other": [0.5], "none": []}
        for name, losses in runs.items():
            search(tmp_path, name, losses)
        assert main(["report", "--root", str(tmp_path), "--run", *runs]) == 0
    (tmp_path / "hands.html").write_text(HANDS.replace("PAGE", page).replace("COLUMN", column))
    options = "--headless --no-sandbox --disable-gpu --allow-file-access-from-files --enable-logging=stderr"
    options += f" --blink-settings=preferredColorScheme={['dark', 'light'].index(scheme)}"
    options += " --virtual-time-budget=5000 --dump-dom"
    command = [str(BROWSER), *options.split(), f"--user-data-dir={tmp_path / 'profile'}"]
    done = subprocess.run(
        [*command, f"file://{tmp_path}/hands.html"], capture_output=True, text=True, timeout=300
    )
    assert re.findall(".*CONSOLE.*", done.stderr) == []
    told = json.loads(re.findall("<pre>(.*?)</pre>", done.stdout)[0])
    assert told == first | {
        "ascending": ascending,
        "first_sort": "ascending",
        "descending": descending,
        "second_sort": "descending",
        "num_sorted": 1,
        "focusable": 0,
        "tip": told["tip"],
        "tip_is_gone": True,
        "too_wide": 0,
        "paper": paper,
        "cut": [0] * len(told["cut"]),
    }
    assert re.match(tip, told["tip"])
