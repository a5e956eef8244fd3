"""A Kubernetes API server on this machine, of the folder that KUBEBUILDER_ASSETS names."""

import functools
import secrets
import socket
import ssl
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.rsa import generate_private_key

from tests.support.waiting import until

Item = dict[str, Any]


class ApiServer:
    """Asked by HTTP; what it serves is as its discovery says."""

    def __init__(self, http: httpx.Client) -> None:
        self.http = http

    def get(self, path: str) -> Item:
        found: Item = self.http.get(path).raise_for_status().json()
        return found

    @functools.cached_property
    def version(self) -> str:
        found: str = self.get("/version")["gitVersion"]
        return found

    def knows(self, definition: str, field: str) -> bool:
        found: Item = self._definitions.get(f"io.k8s.api.{definition}", {})
        return field in found.get("properties", {})

    @functools.cached_property
    def _definitions(self) -> Item:
        found: Item = self.get("/openapi/v2")["definitions"]
        return found

    def collection(self, item: Item, namespace: str) -> str | None:
        """Where objects like `item` are; None where its kind isn't served in its version."""
        group = item["apiVersion"]
        root = f"/apis/{group}" if "/" in group else f"/api/{group}"
        found = self.http.get(root)
        if found.status_code == 404:
            return None
        for each in found.raise_for_status().json()["resources"]:
            if each["kind"] == item["kind"] and "/" not in each["name"]:
                inside = f"namespaces/{namespace}/" if each["namespaced"] else ""
                return f"{root}/{inside}{each['name']}"
        return None

    def create(self, item: Item, namespace: str = "") -> httpx.Response:
        path = self.collection(item, namespace)
        assert path, f"{item['apiVersion']} {item['kind']} isn't served"
        return self.http.post(path, json=item, params={"fieldValidation": "Strict"})

    def change(self, item: Item, namespace: str) -> httpx.Response:
        """Puts what `item` says over the object of its name."""
        return self.http.patch(
            f"{self.collection(item, namespace)}/{item['metadata']['name']}",
            json=item,
            headers={"Content-Type": "application/merge-patch+json"},
            params={"fieldValidation": "Strict"},
        )


@contextmanager
def running(programs: Path, folder: Path) -> Iterator[ApiServer]:
    """Keeps its files in `folder`, and ends with the block."""
    key = generate_private_key(public_exponent=65537, key_size=2048).private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.TraditionalOpenSSL,
        serialization.NoEncryption(),
    )
    (folder / "accounts.pem").write_bytes(key)
    token = secrets.token_hex()
    (folder / "tokens.csv").write_text(f"{token},admin,1,system:masters\n")
    store, secure = _free_ports(2)
    etcd = [
        programs / "etcd",
        f"--data-dir={folder / 'etcd'}",
        f"--listen-client-urls=http://127.0.0.1:{store}",
        f"--advertise-client-urls=http://127.0.0.1:{store}",
        "--listen-peer-urls=http://127.0.0.1:0",
    ]
    server = [
        programs / "kube-apiserver",
        f"--etcd-servers=http://127.0.0.1:{store}",
        f"--cert-dir={folder / 'certificates'}",
        "--bind-address=127.0.0.1",
        "--advertise-address=127.0.0.1",
        f"--secure-port={secure}",
        "--service-cluster-ip-range=10.0.0.0/16",
        "--authorization-mode=RBAC",
        f"--token-auth-file={folder / 'tokens.csv'}",
        "--service-account-issuer=https://127.0.0.1",
        f"--service-account-key-file={folder / 'accounts.pem'}",
        f"--service-account-signing-key-file={folder / 'accounts.pem'}",
    ]
    with _process(etcd, folder / "etcd.log"), _process(server, folder / "server.log") as process:
        certificate = folder / "certificates" / "apiserver.crt"

        def is_ready() -> bool:
            assert process.poll() is None, (folder / "server.log").read_text()[-2000:]
            try:
                trust = ssl.create_default_context(cafile=certificate)
                url = f"https://127.0.0.1:{secure}/readyz"
                return httpx.get(url, verify=trust, headers=admin).status_code == 200
            except (OSError, httpx.HTTPError):
                return False

        admin = {"Authorization": f"Bearer {token}"}
        until(is_ready, "the API server does not become ready")
        with httpx.Client(
            base_url=f"https://127.0.0.1:{secure}",
            headers=admin,
            verify=ssl.create_default_context(cafile=certificate),
            timeout=60,
        ) as http:
            yield ApiServer(http)


def _free_ports(count: int) -> list[int]:
    taken = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in taken]
    for each in taken:
        each.close()
    return ports


@contextmanager
def _process(command: Sequence[object], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as out:
        process = subprocess.Popen([*map(str, command)], stdout=out, stderr=out)
    try:
        yield process
    finally:
        process.terminate()
        process.wait(60)
