"""Photographs a run's report and TensorBoard: ``python docs/images/photograph.py lightning_logs/mine``.

It writes report.png and tensorboard.png beside this file, and needs chromium.
"""

import shutil
import subprocess
import sys
from pathlib import Path

from tensorboard import program

HERE = Path(__file__).parent
CURVES = "#scalars&tagFilter=search%2F%7Cval%2F%7Cfull_kd&_smoothingWeight=0"


def photograph(address: str, name: str, size: tuple[int, int]) -> None:
    """Write what a browser of this size, in pixels, shows after ten seconds."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        raise SystemExit("There is no chromium: install it.")
    command = [browser, "--headless", "--no-sandbox", "--hide-scrollbars", "--disable-gpu"]
    command += [f"--window-size={size[0]},{size[1]}", "--virtual-time-budget=10000"]
    subprocess.run([*command, f"--screenshot={HERE / name}", address], check=True)


def main(run: Path) -> None:
    """Photograph both."""
    photograph((run / "report.html").absolute().as_uri(), "report.png", (1000, 1400))
    board = program.TensorBoard()
    board.configure(argv=["tensorboard", f"--logdir={run}", "--port=0", "--reload_interval=1"])
    photograph(board.launch() + CURVES, "tensorboard.png", (1500, 1000))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
