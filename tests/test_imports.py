"""The rooms' imports point one way."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "expertgate"

# Room → what of ours it may import, besides itself.
ALLOWED = {
    "policies": (),
    "kernels": (),
    "model": ("expertgate.faults", "expertgate.kernels", "expertgate.policies.expert_set"),
    "forge": ("expertgate.model.catalogue", "expertgate.model.checkpoint"),
    "server": ("expertgate.faults", "expertgate.policies", "expertgate.model"),
}
# Room → packages of others that it does not know.
FOREIGN = {
    "policies": ("torch", "vllm", "starlette", "fastapi", "pydantic"),
    "kernels": ("vllm", "transformers"),
    "forge": ("vllm",),
}


def within(module: str, packages: tuple[str, ...]) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def imports(source: str, package: str) -> Iterator[tuple[int, str]]:
    """Line and full name of every module, or name in a module, that is imported anywhere."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) + 1 - node.level]
            module = ".".join([*(above if node.level else []), *filter(None, [node.module])])
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def faults(room: str, source: str, package: str) -> list[tuple[int, str]]:
    own = (f"expertgate.{room}", *ALLOWED[room], "expertgate.__version__")
    return [
        (line, module)
        for line, module in imports(source, package)
        if (within(module, ("expertgate",)) and module != "expertgate" and not within(module, own))
        or within(module, FOREIGN.get(room, ()))
    ]


def test_every_room_has_its_rule():
    rooms = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert rooms - {"demo"} == set(ALLOWED)


@pytest.mark.parametrize("room", ALLOWED)
def test_a_room_imports_only_what_it_may(room):
    found = [
        f"{path.relative_to(PACKAGE)}:{line}: imports {module}"
        for path in sorted((PACKAGE / room).rglob("*.py"))
        for line, module in faults(
            room, path.read_text(), ".".join(path.relative_to(PACKAGE.parent).parent.parts)
        )
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("policies", "from expertgate.model import catalogue"),
        ("policies", "def f():\n    import expertgate.server.keys"),
        ("policies", "from ..model.catalogue import Catalogue"),
        ("policies", "from .. import model"),
        ("policies", "from expertgate import model"),
        ("kernels", "from vllm.triton_utils import triton"),
        ("model", "from expertgate.policies.cedar import PolicySet"),
        ("model", "from expertgate.policies import cedar"),
        ("forge", "from expertgate.model import masks"),
        ("server", "from expertgate.forge import corpus"),
    ],
)
def test_a_wrong_import_is_seen(room, source):
    assert faults(room, source, f"expertgate.{room}")


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("model", "from expertgate.policies import expert_set"),
        ("model", "from .catalogue import Catalogue"),
        ("server", "import expertgate"),
        ("server", "from expertgate import __version__"),
        ("kernels", "import vllm_like"),
    ],
)
def test_a_right_import_is_not(room, source):
    assert not faults(room, source, f"expertgate.{room}")
