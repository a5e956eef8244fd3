"""The server's Ed25519 key: it signs heads of the audit log, and receipts.

The private half is a PEM file (PKCS #8) that only its owner may read. The public half travels as
JSON Web Keys (RFC 8037), each under its thumbprint (RFC 7638).
"""

import base64
import hashlib
import hmac
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import rfc8785
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import (
    Ed25519PrivateKey,
    Ed25519PublicKey,
)
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)

from expertgate.server.audit.chain import AuditError, Record

log = logging.getLogger(__name__)

_HEAD_DOMAIN = b"expertgate/audit-head/1\n"
"""Before what is signed, so that no signature for one purpose serves another."""
_MAX_KEY_BYTES = 1 << 16


class SigningKey:
    def __init__(self, private: Ed25519PrivateKey) -> None:
        self.private = private
        self.jwk = jwk_of(private.public_key())
        self.id: str = self.jwk["kid"]
        self._derived: dict[bytes, hmac.HMAC] = {}

    @classmethod
    def create(cls, path: Path) -> "SigningKey":
        """A new key in a new file. Raises AuditError, for a file that is there as well."""
        private = Ed25519PrivateKey.generate()
        pem = private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            try:
                with open(descriptor, "wb") as file:
                    file.write(pem)
                    file.flush()
                    os.fsync(file.fileno())
                sync_folder(path.parent)
            except OSError:
                path.unlink()  # half a key would end every start from now on
                raise
        except OSError as error:
            raise AuditError(f"{path}: {error.strerror or error}") from None
        return cls(private)

    @classmethod
    def load(cls, path: Path) -> "SigningKey":
        """Raises AuditError."""
        raw = _read(path)
        try:
            private = load_pem_private_key(raw, password=None)
        except (ValueError, TypeError):
            raise AuditError(f"{path}: is not an unencrypted private key in PEM") from None
        if not isinstance(private, Ed25519PrivateKey):
            raise AuditError(f"{path}: is not an Ed25519 key; `expertgate audit keygen` makes one")
        if path.stat().st_mode & 0o077:
            log.warning("%s: others than its owner may read this signing key", path)
        return cls(private)

    @property
    def public(self) -> "PublicKeys":
        return PublicKeys({self.id: self.private.public_key()})

    def keyed_digest(self, purpose: bytes, data: bytes) -> str:
        """A digest that only whoever has this key can compare with a text that they guess."""
        if purpose not in self._derived:
            seed = self.private.private_bytes(Encoding.Raw, PrivateFormat.Raw, NoEncryption())
            derived = hmac.digest(seed, purpose, "sha256")
            self._derived[purpose] = hmac.new(derived, digestmod="sha256")
        # Not `hmac.digest`: it lets go of the interpreter, which other threads then keep for longer
        # than this takes.
        found = self._derived[purpose].copy()
        found.update(data)
        return found.hexdigest()

    def sign_head(self, head: Record) -> dict[str, Any]:
        """The head with its signature, which is over all else that it says."""
        signature = self.private.sign(_HEAD_DOMAIN + rfc8785.dumps(dict(head)))
        return {**head, "signature": _b64(signature)}


class PublicKeys:
    """Keys by id."""

    def __init__(self, keys: Mapping[str, Ed25519PublicKey]) -> None:
        self._keys = dict(keys)

    @classmethod
    def load(cls, path: Path) -> "PublicKeys":
        """A PEM file, a JSON Web Key, or a set of them. Raises AuditError."""
        raw = _read(path)
        if raw.lstrip().startswith(b"-----BEGIN"):
            try:
                key = load_pem_public_key(raw)
            except ValueError:
                raise AuditError(f"{path}: is not a public key in PEM") from None
            if not isinstance(key, Ed25519PublicKey):
                raise AuditError(f"{path}: is not an Ed25519 key")
            return cls({jwk_of(key)["kid"]: key})
        try:
            found = json.loads(raw)
        except (ValueError, RecursionError):
            raise AuditError(f"{path}: is neither PEM nor JSON") from None
        entries = found.get("keys", [found]) if isinstance(found, dict) else None
        if not isinstance(entries, list) or not entries:
            raise AuditError(f"{path}: is neither a JSON Web Key nor a set of them")
        return cls(dict(_public_key(entry, path, index) for index, entry in enumerate(entries)))

    def __contains__(self, key_id: object) -> bool:
        return isinstance(key_id, str) and key_id in self._keys

    def __getitem__(self, key_id: str) -> Ed25519PublicKey:
        return self._keys[key_id]

    def signed_head(self, head: Record) -> bool:
        """Whether the key that a head names is known, and made its signature."""
        unsigned = {name: value for name, value in head.items() if name != "signature"}
        try:
            key = self._keys[head["key"]]
            key.verify(_unb64(head["signature"]), _HEAD_DOMAIN + rfc8785.dumps(unsigned))
        except (KeyError, ValueError, TypeError, RecursionError, InvalidSignature):
            return False
        return True


def jwk_of(key: Ed25519PublicKey) -> dict[str, str]:
    required = {
        "crv": "Ed25519",
        "kty": "OKP",
        "x": _b64(key.public_bytes(Encoding.Raw, PublicFormat.Raw)),
    }
    thumbprint = hashlib.sha256(rfc8785.dumps(dict(required))).digest()
    return {**required, "kid": _b64(thumbprint), "use": "sig", "alg": "EdDSA"}


def jwks_of(key: SigningKey) -> dict[str, Any]:
    """What is published of a key (RFC 7517, §5)."""
    return {"keys": [key.jwk]}


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder durable. Raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _public_key(entry: Any, path: Path, index: int) -> tuple[str, Ed25519PublicKey]:
    try:
        if (entry["kty"], entry["crv"]) != ("OKP", "Ed25519"):
            raise ValueError
        key = Ed25519PublicKey.from_public_bytes(_unb64(entry["x"]))
    except (KeyError, TypeError, ValueError):
        raise AuditError(f"{path}: keys[{index}] is not an Ed25519 JSON Web Key") from None
    # By what it is: an id that the file made up could stand for another key.
    return jwk_of(key)["kid"], key


def _read(path: Path) -> bytes:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise AuditError(f"{path}: {error.strerror or error}") from None
    if len(raw) > _MAX_KEY_BYTES:
        raise AuditError(f"{path}: has {len(raw)} bytes; a key has fewer")
    return raw


def _b64(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).decode().rstrip("=")


def _unb64(text: str) -> bytes:
    return base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
