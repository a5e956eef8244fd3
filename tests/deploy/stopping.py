"""How long a server takes to end: read, not imported, because the engine comes with the module."""

import re

from tests.deploy.dockerfile import ROOT

_CONSTANTS = {
    name: int(value)
    for name, value in re.findall(
        r"^(_[A-Z_]+_S) = (\d+)$", (ROOT / "expertgate/server/run.py").read_text(), re.MULTILINE
    )
}


def takes_s(drain_s: int) -> int:
    return drain_s + _CONSTANTS["_CUT_S"] + 2 * _CONSTANTS["_ENGINE_STOP_S"]
