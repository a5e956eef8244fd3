"""An issuer's public keys: JSON Web Key Sets (RFC 7517), in a file or at a URL.

A key is found by the `kid` and the algorithm that a token names. Keys without a `kid`, secret ones,
and those that are not for signatures are passed over; so is what a token itself says of where keys
are (`jwk`, `jku`, `x5u`), which nobody asks here.
"""

import asyncio
import functools
import json
import logging
import ssl
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import httpx
from jwt import PyJWK, PyJWTError

from expertgate.server.changes import CredentialChange
from expertgate.server.identity_config import IssuerConfig, checked_url
from expertgate.server.watched import WatchedFile

log = logging.getLogger(__name__)

Keys = Mapping[tuple[str, str], PyJWK]
"""By `kid` and algorithm."""

TTL_S = 300.0
"""How long fetched keys are used before they are fetched again."""
COOLDOWN_S = 10.0
"""Between two fetches, whatever tokens come: nobody can have the issuer asked more often."""
MAX_AGE_S = 3600.0
"""How long fetched keys are used where the issuer can't be reached any more."""
TIMEOUT_S = 5.0
KNOWN_S = 0.25
"""How long a key that is known waits for newer ones: an issuer that is slow holds nobody up."""
MAX_BYTES = 1 << 18
_MAX_KEYS = 100


class JwksError(ValueError):
    """A key set that can't be had or used, and why."""


class NoKeys(Exception):  # noqa: N818  (a state of affairs)
    """None have come yet, or none for too long."""


class KeySource(Protocol):
    """Where an issuer's keys come from."""

    async def key(self, kid: str, algorithm: str) -> PyJWK | None:
        """None for one that the issuer doesn't have. Raises NoKeys."""

    async def refresh(self) -> tuple[CredentialChange, ...]:
        """The keys that are other ones than when this was last asked, by `kid`."""


def key_source(config: IssuerConfig) -> KeySource:
    """Raises JwksError for a file that can't be used."""
    if config.jwks_file is not None:
        return JwksFile(config.jwks_file, config.algorithms)
    return JwksUrl(config)


class JwksFile:
    """Keys in a file, read again when it changes; a broken file leaves the old ones in force."""

    def __init__(self, path: Path, algorithms: Sequence[str]) -> None:
        """Raises JwksError."""

        def parse(raw: bytes, path: Path) -> Keys:
            return parse_jwks(raw, algorithms, str(path))

        try:
            self._file = WatchedFile(path, parse)
        except OSError as error:
            raise JwksError(f"{path}: {error.strerror or error}") from None

    async def key(self, kid: str, algorithm: str) -> PyJWK | None:
        return self._file.value.get((kid, algorithm))

    async def refresh(self) -> tuple[CredentialChange, ...]:
        before = self._file.value
        if not await self._file.refresh():
            return ()
        return _changes(before, self._file.value)


class JwksUrl:
    """Keys fetched from the issuer when a token needs them: in the background of other requests.

    Fetched again after TTL_S, and for a `kid` that isn't among them, but never twice in COOLDOWN_S.
    """

    def __init__(self, config: IssuerConfig) -> None:
        _trusted()
        self._config = config
        self._keys: Keys | None = None
        self._reported: Keys = {}
        self._fetched = -MAX_AGE_S
        self._tried = -MAX_AGE_S
        self._fetching: asyncio.Task[None] | None = None
        self._fault = ""

    async def key(self, kid: str, algorithm: str) -> PyJWK | None:
        fresh = time.monotonic() - self._fetched < TTL_S
        known = self._keys is not None and (kid, algorithm) in self._keys
        if not (known and fresh):
            too_old = time.monotonic() - self._fetched >= MAX_AGE_S
            await self._fetch(KNOWN_S if known and not too_old else None)
        if self._keys is None or time.monotonic() - self._fetched >= MAX_AGE_S:
            raise NoKeys
        return self._keys.get((kid, algorithm))

    async def refresh(self) -> tuple[CredentialChange, ...]:
        now = self._keys or {}
        before, self._reported = self._reported, now
        return _changes(before, now) if now is not before else ()

    async def _fetch(self, patience_s: float | None) -> None:
        """All who wait for keys wait for the same fetch, and none of them ends it by leaving."""
        if self._fetching is None or self._fetching.done():
            if time.monotonic() - self._tried < COOLDOWN_S:
                return
            self._tried = time.monotonic()
            self._fetching = asyncio.create_task(self._load())
        await asyncio.wait({self._fetching}, timeout=patience_s)

    async def _load(self) -> None:
        began = time.monotonic()
        try:
            # Of the whole: an issuer that sends a byte now and then is never idle.
            async with asyncio.timeout(TIMEOUT_S):
                url = self._config.jwks_url or await _discovered(self._config.issuer)
                raw = await _get(url)
            keys = parse_jwks(raw, self._config.algorithms, url)
        except Exception as error:  # also of a kind that nobody thought of: the old ones stay
            fault = str(error) if isinstance(error, JwksError) else repr(error)
            if isinstance(error, TimeoutError):
                fault = f"no answer within {TIMEOUT_S:.0f} s"
            if fault != self._fault:
                log.error("no new keys of %s: %s", self._config.issuer, fault)
            self._fault = fault
            return
        self._fault = ""
        self._keys, self._fetched = keys, began


def parse_jwks(raw: bytes, algorithms: Sequence[str], place: str) -> Keys:
    """The keys that may verify one of `algorithms`. Raises JwksError, with the place."""
    try:
        listed = json.loads(raw)["keys"]
    except json.JSONDecodeError as error:
        raise JwksError(f"{place}:{error.lineno}: is not JSON: {error.msg}") from None
    except (ValueError, RecursionError, TypeError, KeyError):
        raise JwksError(f"{place}: is not a JSON object with a list `keys`") from None
    if not isinstance(listed, list) or len(listed) > _MAX_KEYS:
        raise JwksError(f"{place}: `keys` must be a list of at most {_MAX_KEYS}")
    found: dict[tuple[str, str], PyJWK] = {}
    for jwk in listed:
        if not _verifies(jwk):
            continue
        for algorithm in algorithms:
            try:
                key = PyJWK(jwk, algorithm)
            except (PyJWTError, ValueError, TypeError, KeyError):
                continue  # a key of another kind
            if jwk.get("alg", algorithm) != algorithm:
                continue
            if (jwk["kid"], algorithm) in found:
                raise JwksError(f"{place}: has two keys {jwk['kid']!r} for {algorithm}")
            found[jwk["kid"], algorithm] = key
    if not found:
        wanted = ", ".join(algorithms)
        raise JwksError(f"{place}: has no key with a `kid` that verifies one of {wanted}")
    return found


def _changes(before: Keys, after: Keys) -> tuple[CredentialChange, ...]:
    found = []
    for kid, algorithm in sorted(before.keys() | after.keys()):
        old, new = before.get((kid, algorithm)), after.get((kid, algorithm))
        if old is None or new is None or old.key != new.key:
            terms = {"algorithm": algorithm}
            found.append(
                CredentialChange(
                    kid, None if old is None else terms, None if new is None else terms, secret=True
                )
            )
    return tuple(found)


def _verifies(jwk: Any) -> bool:
    if not isinstance(jwk, dict):
        return False
    kid, uses = jwk.get("kid"), jwk.get("key_ops", ["verify"])
    return (
        isinstance(kid, str)
        and kid != ""
        and jwk.get("use", "sig") == "sig"
        and isinstance(uses, list)
        and "verify" in uses
        # A private key that was published by mistake: whoever reads it can sign.
        and "d" not in jwk
    )


@functools.cache
def _trusted() -> ssl.SSLContext:
    """The authorities that https:// is believed by; reading them takes a while."""
    return httpx.create_ssl_context()


async def _discovered(issuer: str) -> str:
    """The issuer's `jwks_uri` (OpenID Connect Discovery 1.0, §4). Raises JwksError."""
    place = issuer.removesuffix("/") + "/.well-known/openid-configuration"
    try:
        document = json.loads(await _get(place))
        said, url = document["issuer"], document["jwks_uri"]
        if said != issuer or not isinstance(url, str):
            raise JwksError(f"{place}: is of another issuer, or has no jwks_uri")
        return checked_url(url)
    except (RecursionError, TypeError, KeyError):
        raise JwksError(f"{place}: is not a JSON object with issuer and jwks_uri") from None
    except ValueError as error:
        raise JwksError(
            str(error) if isinstance(error, JwksError) else f"{place}: {error}"
        ) from None


async def _get(url: str) -> bytes:
    """What is at `url` itself: a redirect is not followed. Raises JwksError."""
    # Not compressed, so that what is counted is what is kept.
    headers = {"Accept": "application/json", "Accept-Encoding": "identity"}
    try:
        async with (
            # A proxy that the environment names may be passed what https:// protects, not this.
            httpx.AsyncClient(
                verify=_trusted(), timeout=TIMEOUT_S, trust_env=url.startswith("https:")
            ) as client,
            client.stream("GET", url, headers=headers) as response,
        ):
            if response.status_code != httpx.codes.OK:
                raise JwksError(f"{url}: answered with status {response.status_code}, not 200")
            body = b""
            async for chunk in response.aiter_raw():
                body += chunk
                if len(body) > MAX_BYTES:
                    raise JwksError(f"{url}: has more than {MAX_BYTES} bytes")
            return body
    except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
        raise JwksError(f"{url}: {type(error).__name__} {error}".rstrip()) from None
