"""Make the virtual environment that the Makefile uses: `PYTHON .ci/environment.py FOLDER EXTRA`. Standard library only.

A torch that PYTHON can import is reused and not installed again: the environment then sees PYTHON's packages. What will
be downloaded is said before it is.
"""

from __future__ import annotations

import json
import os
import re
import site
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MIN_PYTHON = (3, 10)
MIN_TORCH = (2, 11)

EXTRAS = ("app", "demo", "images", "test", "bench", "dev")
SIZES = {
    "torch": "torch and triton: about 400 MB where pip finds a CPU build of torch, several GB where it finds a CUDA "
    "build (the default on Linux)",
    "triton": "triton: about 200 MB",
    "app": "gradio, pillow, scikit-image and what they need: about 170 MB; trained weights, when used: 3 to 48 MB each",
    "demo": "matplotlib, pillow, tqdm and what they need: about 30 MB; trained weights, at the first demo: 13 MB",
    "images": "pillow, scikit-image, tqdm and what they need: about 80 MB; trained weights, when used: 3 to 48 MB each",
    "test": "pytest, hypothesis, onnx, matplotlib, scikit-image and what they need: about 120 MB",
    "bench": "pytest-benchmark, onnx, onnxruntime, openvino and what they need: about 130 MB",
    "dev": "import-linter, mypy, pdoc, ruff: about 35 MB",
}

# Run by an interpreter: the versions of torch and of what must fit it, those outside of the environment itself.
PROBE = """
import importlib.metadata as m, json, pathlib, re, sys
import torch
names = ["torch", "triton", "numpy"] + [re.match("[A-Za-z0-9._-]+", r).group() for r in m.requires("torch") or []]
found = {}
for name in names:
    try:
        d = m.distribution(name)
    except m.PackageNotFoundError:
        continue
    found[name.lower()] = [d.version, pathlib.Path(sys.prefix) in pathlib.Path(str(d.locate_file(""))).parents]
print(json.dumps(found))
"""


def probe(python: str) -> dict[str, tuple[str, bool]]:
    """name -> (version, whether it lies inside the interpreter's environment); empty where torch cannot be imported."""
    done = subprocess.run([python, "-c", PROBE], capture_output=True, text=True, cwd="/")
    return json.loads(done.stdout) if done.returncode == 0 else {}


def new_enough(found: dict[str, tuple[str, bool]]) -> bool:
    if "torch" not in found:
        return False
    return tuple(int(n) for n in re.findall(r"\d+", found["torch"][0])[:2]) >= MIN_TORCH


def create(folder: Path, reuse: bool) -> None:
    """The environment; with ``reuse`` it sees this interpreter's packages (which may be a virtual environment's)."""
    try:
        venv.create(folder, with_pip=True, symlinks=os.name != "nt", system_site_packages=reuse)
    except subprocess.CalledProcessError as error:
        raise SystemExit(
            f"{sys.executable} cannot make a virtual environment with pip ({error}): install its venv module "
            "(Debian: apt-get install python3-venv), or run make with VENV= to use this environment as it is"
        ) from None
    if reuse and sys.prefix != sys.base_prefix:
        inside = subprocess.run(
            [str(folder / "bin" / "python"), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        Path(inside, "cnnfast-outer.pth").write_text("".join(f"{path}\n" for path in site.getsitepackages()))


def constraints(reused: dict[str, str]) -> str:
    """constraints.txt, with the versions of reused packages in the place of its own."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    kept = [line for line in lines if line.split("==")[0] not in reused]
    return "\n".join([*kept, *(f"{name}=={version}" for name, version in reused.items())]) + "\n"


def main(folder: Path, extra: str) -> None:
    if sys.version_info < MIN_PYTHON:
        raise SystemExit(
            f"cnnfast needs Python 3.10 or newer, this is {sys.version.split()[0]}: make PYTHON=python3.11 ..."
        )
    python = str(folder / "bin" / "python")
    if not Path(python).exists():
        found = probe(sys.executable)
        print(f"making {folder} with {sys.executable}", flush=True)
        create(folder, reuse=new_enough(found))
    found = probe(python)
    reused = {name: version for name, (version, inside) in found.items() if not inside} if new_enough(found) else {}
    if reused:
        print(f"reusing torch {reused['torch']} of {sys.executable}")
    needed = [SIZES[extra]]
    if not new_enough(found):
        needed.insert(0, SIZES["torch"])
    elif "triton" not in found and sys.platform == "linux":
        needed.insert(0, SIZES["triton"])
    print("pip will download what is not cached yet:", *needed, sep="\n  ", flush=True)
    pinned = folder / "constraints.txt"
    pinned.write_text(constraints(reused))
    pip = [python, "-m", "pip", "--disable-pip-version-check", "install"]
    done = subprocess.run([*pip, "-c", str(pinned), "-e", f"{ROOT}[{extra}]"])
    if done.returncode != 0:
        raise SystemExit(f"pip failed (exit {done.returncode}); its message is above")


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[2] not in EXTRAS:
        raise SystemExit("usage: python .ci/environment.py FOLDER " + "|".join(EXTRAS))
    main(Path(sys.argv[1]).absolute(), sys.argv[2])
