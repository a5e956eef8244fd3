"""Prefix-cache salts: only requests of the same experts, tenant and weights share KV blocks."""

import hashlib
import hmac
import secrets
from collections import Counter
from collections.abc import Collection

from expertgate.policies.expert_set import ExpertSet
from expertgate.server.names import voucher

_DOMAIN = b"expertgate/cache-salt/1"


class CacheSalts:
    """The salts of one process: its secret is its own, and KV blocks don't outlive it."""

    def __init__(self, weights: bytes, secret: bytes | None = None) -> None:
        """`weights` names those that are served; `secret` is made where none is given."""
        self._weights = weights
        self._epochs: Counter[int] = Counter()
        self._vouched: Counter[str] = Counter()
        self._secret = secret if secret is not None else secrets.token_bytes(32)

    def salt(self, experts: ExpertSet, tenant: str, own: str | None) -> str:
        """`own` is the caller's salt; it can part its requests from others, never join them."""
        mac = hmac.new(self._secret, _DOMAIN, hashlib.sha256)
        epochs = ",".join(str(self._epochs[index]) for index in experts)
        vouched = str(self._vouched[voucher(tenant)])
        fields = [experts.digest, tenant.encode(), self._weights, epochs.encode(), vouched.encode()]
        if own is not None:
            fields.append(own.encode())
        # Each field behind its length, so that no two lists of fields read the same.
        mac.update(len(fields).to_bytes(8))
        for field in fields:
            mac.update(len(field).to_bytes(8) + field)
        return mac.hexdigest()

    def renew(self, experts: ExpertSet) -> None:
        """From now on no set with one of these finds what was cached before; others do."""
        self._epochs.update(experts)

    def renew_of(self, vouchers: Collection[str]) -> None:
        """The same for the tenants that one of these vouches for, whatever their set."""
        self._vouched.update(vouchers)
