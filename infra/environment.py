"""Make the project's own Python environment, quietly, with progress, or say what is missing.

`python3 infra/environment.py .venv pipeline dev` (the Makefile) runs on a bare Python of any 3.x
version. Everything is installed by the hashes of constraints.txt, what builds it too, but PyTorch
and its CUDA libraries: those by version alone, because every index has wheels of its own.
TORCH_INDEX_URL, if set, is theirs (CPU-only builds, say, which are far smaller on Linux).
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
FITTING = ((3, 11), (3, 12), (3, 13))
OF_TORCH = re.compile(r"(torch|torchvision|triton)$|nvidia-|cuda-")


def main(folder, extras):
    python = fitting_python()
    if version_of(sys.executable) not in FITTING:
        os.execv(python, [python, *sys.argv])
    started = time.monotonic()
    if not (folder / "bin" / "python").exists():
        make_environment(python, folder)
    pip = [str(folder / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "install"]
    pip += ["--no-input", "--no-build-isolation"]  # else what builds comes without a hash
    build = read_pins(["evaclip[build]"])
    pins = build | read_pins(["evaclip", "torchvision", *(f"evaclip[{extra}]" for extra in extras)])
    by_hash = {name: pin for name, pin in pins.items() if not OF_TORCH.match(name)}
    file = folder / "requirements.txt"
    for what, chosen in (("what builds", build), ("packages", by_hash)):
        file.write_text("\n".join(chosen.values()) + "\n")
        run_with_progress([*pip, "--no-deps", "--require-hashes", "-r", str(file)], what, started)
    versions = {name: re.match(r"\S+", pin)[0] for name, pin in pins.items()}
    file.write_text("\n".join(versions.values()) + "\n")
    index = os.environ.get("TORCH_INDEX_URL")
    # Both from one index: a torchvision built against another torch cannot be imported, and without
    # it neither can open_clip, timm and transformers' CLIP.
    torch = [versions["torch"], versions["torchvision"], *(["--index-url", index] if index else [])]
    run_with_progress([*pip, "-c", str(file), *torch], "torch", started)
    run_with_progress([*pip, "--no-deps", "-e", str(ROOT)], "evaclip", started)
    size_gb = sum(path.lstat().st_size for path in folder.rglob("*")) / 1e9
    say(f"environment ready in {folder}: {size_gb:.1f} GB, {time.monotonic() - started:.0f} s")
    sys.stdout.write("\n")


def read_pins(waiting):
    """Name -> its lines of constraints.txt, of everything that requirements need."""
    import tomllib  # Python 3.11

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lists = {**project["optional-dependencies"], "": project["dependencies"]}
    wanted = set()
    while waiting:
        name, extras = re.match(r"([\w.-]+)(?:\[([\w,]+)\])?", waiting.pop()).groups()
        if name == project["name"]:
            waiting += [one for extra in (extras or "").split(",") for one in lists[extra]]
        else:
            wanted.add(re.sub(r"[-_.]+", "-", name).lower())
    blocks = re.split(r"\n(?=\w)", CONSTRAINTS.read_text())[1:]
    pins = {block.partition("==")[0]: block for block in blocks}
    via = re.compile(r"^    #   (?:via )?([\w.-]+)(?:\[.*\])?$|^    # via ([\w.-]+)$", re.MULTILINE)
    needed_by = {name: set(map("".join, via.findall(pin))) for name, pin in pins.items()}
    while more := {name for name in pins.keys() - wanted if needed_by[name] & wanted}:
        wanted |= more
    return {name: pins[name] for name in pins if name in wanted}


def fitting_python():
    """The first interpreter of a supported version: this one, or one on the PATH."""
    named = [os.environ["PYTHON"]] if os.environ.get("PYTHON") else []
    for name in [*named, sys.executable, "python3.11", "python3.12", "python3.13"]:
        path = shutil.which(name)
        if path and version_of(path) in FITTING:
            return path
    stop(
        f"this project needs Python 3.11, 3.12 or 3.13, found {sys.version.split()[0]}: install "
        "one, or name it with PYTHON=/path/to/python"
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
