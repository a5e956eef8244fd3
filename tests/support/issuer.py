"""An issuer of tokens: a real HTTP server with keys that can be rotated, and with bad days."""

import json
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm

AUDIENCE = "expertgate"

_KINDS = {
    "ES256": (lambda: ec.generate_private_key(ec.SECP256R1()), ECAlgorithm),
    "ES384": (lambda: ec.generate_private_key(ec.SECP384R1()), ECAlgorithm),
    "RS256": (lambda: rsa.generate_private_key(65537, 2048), RSAAlgorithm),
    "EdDSA": (ed25519.Ed25519PrivateKey.generate, OKPAlgorithm),
}


class Issuer:
    """`answers` is what it answers with instead: a body, a status, or a function of the handler."""

    def __init__(self) -> None:
        self.keys: dict[str, tuple[str, Any]] = {}
        self.answers: Any = None
        self.asked: list[str] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        self.rotate("one")

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def rotate(self, *kids: str, algorithm: str = "ES256") -> None:
        """From now on it has these keys and no other; one that it had stays the same."""
        make, _ = _KINDS[algorithm]
        self.keys = {kid: self.keys.get(kid) or (algorithm, make()) for kid in kids}

    def config(self, name: str) -> dict[str, Any]:
        """What `identity.jwt` says of it."""
        return {
            "name": name,
            "issuer": self.url,
            "audience": AUDIENCE,
            "jwks_url": f"{self.url}/keys",
            "groups": [{"claim": "groups"}],
            "claims": ["department"],
        }

    def jwks(self) -> list[dict[str, Any]]:
        return [public_jwk(kid, *key) for kid, key in self.keys.items()]

    def claims(self, **claims: Any) -> dict[str, Any]:
        """Those of a token that holds, with some set otherwise, or left out where None."""
        now = int(time.time())
        whole = {"iss": self.url, "aud": AUDIENCE, "sub": "ada", "iat": now, "exp": now + 600}
        return {name: value for name, value in {**whole, **claims}.items() if value is not None}

    def token(self, kid: str = "one", headers: dict[str, Any] | None = None, **claims: Any) -> str:
        algorithm, key = self.keys[kid]
        return jwt.encode(
            self.claims(**claims), key, algorithm, headers={"kid": kid, **(headers or {})}
        )


def public_jwk(kid: str, algorithm: str, key: Any) -> dict[str, Any]:
    _, kind = _KINDS[algorithm]
    return {**kind.to_jwk(key.public_key(), as_dict=True), "kid": kid, "use": "sig"}


def _handler(issuer: Issuer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            issuer.asked.append(self.path)
            answer = issuer.answers
            with suppress(OSError):  # whoever asked has left
                if callable(answer):
                    answer = answer(self)
                    if answer is None:
                        return
                if isinstance(answer, int):
                    self.send_error(answer)
                    return
                self.send_response(200)
                self.end_headers()
                self.wfile.write(answer if answer is not None else self.usual())

        def usual(self) -> bytes:
            if self.path == "/.well-known/openid-configuration":
                found: Any = {"issuer": issuer.url, "jwks_uri": f"{issuer.url}/keys"}
            else:
                found = {"keys": issuer.jwks()}
            return json.dumps(found).encode()

        def log_message(self, *_: object) -> None: ...

    return Handler
