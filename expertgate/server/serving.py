"""From a configuration to a running server."""

import logging
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import expertgate
from expertgate.model import catalogue
from expertgate.model.catalogue import Catalogue
from expertgate.model.checkpoint import Checkpoint, locate
from expertgate.policies.cedar import PolicySet
from expertgate.server import environment
from expertgate.server.audit.signing import SigningKey
from expertgate.server.audit.trail import Trail
from expertgate.server.audit.writer import AuditLog
from expertgate.server.config import AuditConfig, Config
from expertgate.server.identity import Identity
from expertgate.server.listening import listen
from expertgate.server.policy_files import PolicyFiles, resources
from expertgate.server.refusals import SettingError, refuse_arguments

log = logging.getLogger(__name__)


def serve_config(
    config: Config,
    *,
    model: str | None,
    host: str | None,
    port: int | None,
    flags: Sequence[str],
    greet: Callable[[str], None] = lambda _: None,
) -> None:
    """Serves until it is told to stop; what is given here goes before the configuration.

    `greet` is called with the server's URL once it can answer. Raises a named error for each part
    that doesn't hold, before anything slow begins.
    """
    environment.settle()
    wanted = model or config.model
    if wanted is None:
        raise SettingError(
            "no model: name one on the command line, or as `model:` in the configuration"
        )
    arguments = dict(config.engine)
    refuse_arguments(arguments)
    checkpoint = Checkpoint(locate(wanted, config.revision))
    known = catalogue.load(checkpoint, config.catalogue)
    identity = Identity(config.identity)
    beside = checkpoint.folder / catalogue.FILE_NAME
    described = config.catalogue or (beside if beside.exists() else None)
    files = PolicyFiles(config.policies, described, config.claims)
    seen = files.stamp()  # before they are read: what changes from here on is seen
    policies = PolicySet.load(config.policies, resources(known), config.claims)
    # A folder's own name, or the Hub's id.
    name = checkpoint.folder.name if Path(wanted).is_dir() else wanted
    bound = listen(host or config.host, config.port if port is None else port)
    url = f"http://{_authority(bound)}"
    print(f"expertgate {expertgate.__version__}: starting {wanted} at {url}", flush=True)
    print(f"experts: {', '.join(known.names(known.all))}", flush=True)

    with _audited(config.audit, known, name, policies.version) as trail:
        # vLLM takes seconds to import, and reads its environment while it is.
        from expertgate.server.engine import parse_flags, start
        from expertgate.server.oversight import Oversight
        from expertgate.server.run import run
        from expertgate.server.service import Service

        arguments |= parse_flags(flags)
        refuse_arguments(arguments)
        service = Service(known, identity, policies, trail)
        oversight = Oversight(service, files, seen, config.suspended)
        oversight.listeners.append(trail.changed)
        began = time.monotonic()

        def ready() -> None:
            print(f"ready after {time.monotonic() - began:.0f} s at {url}", flush=True)
            greet(url)

        run(
            service,
            oversight,
            bound,
            lambda: start(checkpoint.folder, name, arguments, service.grants),
            ready,
        )


@contextmanager
def _audited(
    config: AuditConfig, known: Catalogue, model: str, policy_version: str
) -> Iterator[Trail]:
    """The trail of a server that starts now and stops at the end. Raises AuditError."""
    audit_log = _open_log(config)
    if audit_log is not None:
        print(f"audit log: {config.path}, signed by {audit_log.key.id}", flush=True)
    trail = Trail(audit_log, known, hashed=config.receipt_principal == "hashed")
    try:
        trail.start(model, policy_version)
        yield trail
    finally:
        trail.stop()


def _open_log(config: AuditConfig) -> AuditLog | None:
    """Raises AuditError."""
    if not config.enabled:
        log.warning("there is no audit log: `audit: {enabled: false}` in the configuration")
        return None
    if config.on_failure == "open":
        log.warning("audit: on_failure: open: what can't be recorded will run all the same")
    key = config.signing_key
    return AuditLog(
        config.path,
        SigningKey.load(key) if key.exists() else SigningKey.create(key),
        rotate_bytes=config.rotate_mib << 20,
        sign_every=config.sign_every,
        fail_open=config.on_failure == "open",
    )


def _authority(bound: socket.socket) -> str:
    host, port = bound.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
