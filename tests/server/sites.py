"""A server's folder with all but the engine as it is: keys, policies, catalogue, suspensions."""

import json
from pathlib import Path

from starlette.requests import HTTPConnection

from expertgate.model.catalogue import Catalogue
from expertgate.policies.cedar import PolicySet
from expertgate.policies.context import Context
from expertgate.server.audit.trail import Trail
from expertgate.server.cache_salts import CacheSalts
from expertgate.server.changes import PoliciesLoaded
from expertgate.server.guard import GuardedLLM
from expertgate.server.identity import Identity
from expertgate.server.identity_config import IdentityConfig
from expertgate.server.key_edits import create_key
from expertgate.server.oversight import Oversight
from expertgate.server.policy_files import PolicyFiles, resources
from expertgate.server.selection import Selection
from expertgate.server.service import Service
from tests.server.fakes import FakeEngine
from tests.server.running import EXPERTS

PUBLIC = '@id("public") permit(principal, action, resource == Expert::"public");\n'
ALICE = '@id("alice") permit(principal == User::"alice", action, resource);\n'
RESEARCH = (
    '@id("research") permit(principal in Group::"research", action, resource)\n'
    'when { resource.tags.contains("stem") };\n'
)
NEWS = '@id("no-news") forbid(principal, action, resource == Expert::"news");\n'


REQUEST = "0f0f"


def connection(authorization: str) -> HTTPConnection:
    """As the server has it of a request that shows this."""
    headers = [(b"authorization", authorization.encode())]
    return HTTPConnection({"type": "http", "headers": headers, "state": {"request_id": REQUEST}})


class Site:
    def __init__(self, folder: Path, rules: str = PUBLIC + ALICE + RESEARCH) -> None:
        self.folder = folder
        self.rules = folder / "policies" / "all.cedar"
        self.rules.parent.mkdir(exist_ok=True)
        self.write(rules)
        self.experts = folder / "experts.json"
        self.experts.write_text(json.dumps({"version": 1, "experts": EXPERTS}))
        self.keys = {
            name: create_key(folder / "keys.yaml", name, groups, None)
            for name, groups in {"alice": [], "dave": ["research"]}.items()
        }
        self.suspended = folder / "suspended.yaml"
        self.start()

    def start(self) -> None:
        files = PolicyFiles(self.rules.parent, self.experts, {})
        known = Catalogue.read(self.experts)
        seen = files.stamp()
        self.service = Service(
            known,
            Identity(IdentityConfig(api_keys=self.folder / "keys.yaml")),
            PolicySet.load(files.folder, resources(known)),
            Trail(None, known),
        )
        self.salts = CacheSalts(b"w", b"s")
        self.engine = FakeEngine()
        self.service.engine = GuardedLLM(self.engine, self.service.grants, self.salts)
        self.oversight = Oversight(self.service, files, seen, self.suspended)
        self.changes = []
        self.oversight.listeners.append(self.changes.append)

    @property
    def loads(self) -> int:
        """How often policies have come into force since the start."""
        return sum(isinstance(change, PoliciesLoaded) for change in self.changes)

    def write(self, rules: str) -> None:
        """In place, as an editor would that knows no better."""
        self.rules.write_text(rules)

    def ask(self, name: str, *experts: str):
        """The grant of a request for these experts."""
        selection = Selection(frozenset(experts)) if experts else None
        return self.service.permit(self.connection(name), Context.now(), selection)

    def connection(self, name: str) -> HTTPConnection:
        return connection(f"Bearer {self.keys[name]}")

    async def look(self) -> None:
        for _ in range(2):  # the first sees a change, the second that it is over
            await self.oversight.look_at_suspensions()
            await self.oversight.look_at_policies()
            await self.oversight.look_at_losses()
            for source in self.service.identity.sources:
                await self.oversight.look_at(source)
            await self.oversight.look_at_ends()
