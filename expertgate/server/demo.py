"""The demo: the model that comes with this package, and three users with different grants."""

import json
import os
import shlex
import tempfile
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path

from expertgate.server.config import AuditConfig, Config
from expertgate.server.identity_config import IdentityConfig
from expertgate.server.key_edits import create_key
from expertgate.server.serving import serve_config

DEMO = Path(str(files("expertgate"))) / "demo"

USERS: Mapping[str, str] = {"nurse": "clinical", "lawyer": "legal", "engineer": "engineering"}
"""Each user, and the group whose experts the demo's policies grant."""

_MODEL_NAME = "demo"
_ENGINE = {
    "served_model_name": _MODEL_NAME,
    "max_model_len": 1024,
    "max_num_seqs": 16,
    "kv_cache_memory_bytes": 1 << 28,
    # Compiling would take longer than this model takes to answer.
    "enforce_eager": True,
}


def serve_demo(host: str, port: int) -> None:
    """Serves until it is told to stop. The keys are new each time, and end with it."""
    # Eager, vLLM still compiles what ranks log-probabilities: 14 s, and with a C++ compiler.
    os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")
    with tempfile.TemporaryDirectory(prefix="expertgate-demo-") as folder:
        path = Path(folder) / "keys.yaml"
        keys = {user: create_key(path, user, [group], None) for user, group in USERS.items()}
        config = Config(
            model=str(DEMO / "model"),
            identity=IdentityConfig(api_keys=path),
            policies=DEMO / "policies",
            suspended=path.with_name("suspended.yaml"),
            audit=AuditConfig(path=path.with_name("audit"), signing_key=path.with_name("key.pem")),
            host=host,
            port=port,
            engine=dict(_ENGINE),
        )
        serve_config(config, model=None, host=None, port=None, flags=(), greet=_Greeting(keys))


class _Greeting:
    """Prints, for each user, the key and a command that asks the same question."""

    def __init__(self, keys: Mapping[str, str]) -> None:
        self._keys = keys

    def __call__(self, url: str) -> None:
        question = _question()
        print("\nThe same question, asked by three users who may consult different experts:")
        for user, key in self._keys.items():
            print(f"\n# {user}: {key}\n{_curl(url, key, question)}")
        print(f"\nWhat a user may consult: curl {url}/v1/experts -H 'Authorization: Bearer KEY'")
        print("Stop with Ctrl-C.", flush=True)


def _question() -> str:
    """It asks for three things at once; each user may know one of them, and each another one."""
    return str(json.loads((DEMO / "questions.json").read_bytes())["joint"]["question"])


def _curl(url: str, key: str, question: str) -> str:
    body = {
        "model": _MODEL_NAME,
        "temperature": 0,
        "messages": [{"role": "user", "content": question}],
    }
    headers = [f"Authorization: Bearer {key}", "Content-Type: application/json"]
    return shlex.join(
        ["curl", "-s", f"{url}/v1/chat/completions"]
        + [part for header in headers for part in ("-H", header)]
        + ["-d", json.dumps(body)]
    )
