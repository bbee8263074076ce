"""Make the project's own Python environment, quietly, with progress, or say what is missing.

`python3 infra/environment.py .venv pipeline dev` (the Makefile) runs on a bare Python of any 3.x
version. TORCH_INDEX_URL, if set, is the package index that torch and torchvision are taken from
(CPU-only builds, say, which are far smaller on Linux).
"""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS = ROOT / "infra" / "constraints.txt"
FITTING = ((3, 11), (3, 12))


def main(folder, extras):
    python = fitting_python()
    started = time.monotonic()
    if not (folder / "bin" / "python").exists():
        make_environment(python, folder)
    pip = [str(folder / "bin" / "python"), "-m", "pip", "--disable-pip-version-check"]
    install = [*pip, "install", "--no-input", "-c", str(CONSTRAINTS)]
    if os.environ.get("TORCH_INDEX_URL"):
        index = ["--index-url", os.environ["TORCH_INDEX_URL"]]
        # Both from one index: a torchvision built against another torch cannot be imported, and
        # without it neither can open_clip, timm and transformers' CLIP.
        run_with_progress([*install, *index, "torch", "torchvision"], "torch", started)
    target = f"{ROOT}[{','.join(extras)}]" if extras else str(ROOT)
    run_with_progress([*install, "-e", target], " + ".join(["evaclip", *extras]), started)
    if "dev" in extras:
        # Its prompts and metrics are what tests compare with; what it depends on, 100 MB of
        # captioning tools, is not.
        run_with_progress([*install, "--no-deps", "clip-benchmark"], "clip-benchmark", started)
    # img2dataset asks for the Python 3.6 back-port of `dataclasses`; Prefect's embedded server
    # puts site-packages before the standard library and would import it.
    remove = [*pip, "uninstall", "-q", "-y", "dataclasses"]
    subprocess.run(remove, check=True, stderr=subprocess.DEVNULL)
    files = (p for p in folder.rglob("*") if p.is_file() and not p.is_symlink())
    size_gb = sum(p.stat().st_size for p in files) / 1e9
    say(f"environment ready in {folder}: {size_gb:.1f} GB, {time.monotonic() - started:.0f} s")
    sys.stdout.write("\n")


def fitting_python():
    """The first interpreter of a supported version: this one, or one on the PATH."""
    named = [os.environ["PYTHON"]] if os.environ.get("PYTHON") else []
    for name in [*named, sys.executable, "python3.11", "python3.12"]:
        path = shutil.which(name)
        if path and version_of(path) in FITTING:
            return path
    found = ".".join(map(str, sys.version_info[:2]))
    stop(
        f"this project needs Python 3.11 or 3.12, found {found}: install one, "
        "or name it with PYTHON=/path/to/python"
    )


def version_of(python):
    code = "import sys; print(*sys.version_info[:2])"
    ran = subprocess.run([python, "-c", code], capture_output=True, text=True)
    return tuple(map(int, ran.stdout.split())) if ran.returncode == 0 else None


def make_environment(python, folder):
    ran = subprocess.run([python, "-m", "venv", str(folder)], capture_output=True, text=True)
    if ran.returncode:
        said = (ran.stdout + ran.stderr).strip().splitlines()[-1]
        stop(
            "Python's venv module is missing or broken "
            f"(on Debian and Ubuntu: install python3-venv): {said}"
        )


def run_with_progress(command, what, started):
    """Run pip, showing one line that moves; on failure show pip's last lines and stop."""
    lines, packages = [], 0
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    for line in process.stdout:
        lines.append(line.rstrip())
        packages += line.startswith("Collecting ")
        step = re.match(r"(Collecting|Downloading|Building wheel for|Installing) [\w.\-]+", line)
        if step:
            seconds = time.monotonic() - started
            say(f"setting up {what}: {packages} packages, {seconds:.0f} s, {step[0][:50].lower()}")
    if process.wait():
        sys.stdout.write("\n")
        last = "\n  ".join(lines[-6:])
        stop(f"pip could not install {what}:\n  {last}")


def say(text):
    """Rewrite the status line on a terminal; elsewhere stay silent but for the last word."""
    if sys.stdout.isatty():
        sys.stdout.write("\r\033[K" + text[: shutil.get_terminal_size().columns - 1])
    elif text.startswith("environment ready"):
        sys.stdout.write(text)
    sys.stdout.flush()


def stop(sentence):
    sys.stderr.write(f"set-up: {sentence}\n")
    sys.exit(1)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
