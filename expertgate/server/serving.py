"""From a configuration to a running server."""

import logging
import signal
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import expertgate
from expertgate.model import catalogue
from expertgate.model.catalogue import Catalogue
from expertgate.model.checkpoint import Checkpoint, locate
from expertgate.policies.cedar import PolicySet
from expertgate.server import environment, logs, suspensions
from expertgate.server.admission import Admission
from expertgate.server.audit.signing import SigningKey
from expertgate.server.audit.trail import Trail
from expertgate.server.audit.writer import AuditLog
from expertgate.server.config import AdminConfig, AuditConfig, Config
from expertgate.server.identity import Identity
from expertgate.server.listening import listen, listen_at
from expertgate.server.policy_files import PolicyFiles, Stamp, resources
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
    """Serves until it is told to stop; what is given here overrides the configuration.

    `greet` is called with the server's URL once it can answer. Raises a named error for each part
    that doesn't hold, before anything slow begins.
    """
    # Until somebody listens for it, the signal to read again would end what reads all anyway.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    parts = _read(config, model)
    known, policies = parts.known, parts.policies
    bound = listen(host or config.host, config.port if port is None else port)
    admin = None if config.admin is None else _admin(config.admin)
    url = f"{'http' if config.tls is None else 'https'}://{_authority(bound)}"
    print(f"expertgate {expertgate.__version__}: starting {parts.model} at {url}", flush=True)
    for line in [*_summary(config, parts), f"operators: {_operators(admin)}"]:
        print(line, flush=True)

    with _audited(config.audit, known, parts.name, policies.version) as trail:
        # vLLM takes seconds to import, and reads its environment while it is.
        from expertgate.server import tracing
        from expertgate.server.admin import create_admin
        from expertgate.server.app import create_app
        from expertgate.server.engine import start
        from expertgate.server.handlers import Handlers
        from expertgate.server.oversight import Oversight
        from expertgate.server.run import Listener, run
        from expertgate.server.service import Service

        arguments = _arguments(config, flags)
        service = Service(known, parts.identity, policies, trail, Admission(config.limits))
        oversight = Oversight(service, parts.files, parts.seen, config.suspended)
        oversight.listeners.append(trail.changed)
        began = time.monotonic()

        def ready() -> None:
            print(f"ready after {time.monotonic() - began:.0f} s at {url}", flush=True)
            greet(url)

        alive_s = config.keep_alive_s
        listeners = [Listener(create_app(service), bound, config.tls, alive_s)]
        if admin is not None:
            operators = create_admin(service, oversight, admin[1])
            listeners.append(Listener(operators, admin[0], None, alive_s))
        spans = tracing.set_up()
        run(
            service,
            oversight,
            listeners,
            lambda: start(parts.checkpoint.folder, parts.name, arguments, service.grants),
            lambda engine: Handlers.around(engine, config.tool_parser),
            ready,
            config.drain_s,
        )
        if spans is not None:
            spans.shutdown()


def check_config(config: Config, *, model: str | None, flags: Sequence[str]) -> None:
    """Reads and checks what `serve_config` would, and says what would be served.

    Neither listens nor writes, so it can be asked beside a server that runs. Raises as it does.
    """
    parts = _read(config, model)
    if config.admin is not None:
        config.admin.read_token()
    if config.audit.enabled and config.audit.signing_key.exists():
        SigningKey.load(config.audit.signing_key)
    for line in _summary(config, parts):
        print(line, flush=True)

    from expertgate.server.engine import configure
    from expertgate.server.oversight import Oversight
    from expertgate.server.service import Service

    service = Service(parts.known, parts.identity, parts.policies, Trail(None, parts.known))
    Oversight(service, parts.files, parts.seen, config.suspended)
    configure(parts.checkpoint.folder, parts.name, _arguments(config, flags))


@dataclass(frozen=True, slots=True)
class _Parts:
    """What a configuration names, read and checked."""

    model: str
    name: str
    """A folder's own name, or the Hub's id."""
    checkpoint: Checkpoint
    known: Catalogue
    identity: Identity
    files: PolicyFiles
    seen: Stamp
    """Of the files, from before they were read: what changes from then on is seen."""
    policies: PolicySet


def _read(config: Config, model: str | None) -> _Parts:
    """Raises a named error for each part that doesn't hold."""
    environment.settle()
    environment.allow_files()
    logs.set_up(config.logs)
    wanted = model or config.model
    if wanted is None:
        raise SettingError(
            "no model: name one on the command line, or as `model:` in the configuration"
        )
    refuse_arguments(config.engine)
    checkpoint = Checkpoint(locate(wanted, config.revision))
    checkpoint.check_weights()
    beside = checkpoint.folder / catalogue.FILE_NAME
    described = config.catalogue or (beside if beside.exists() else None)
    files = PolicyFiles(config.policies, described, config.claims)
    seen = files.stamp()
    known = catalogue.load(checkpoint, config.catalogue)
    identity = Identity(config.identity)
    policies = PolicySet.load(config.policies, resources(known), config.claims)
    if config.tls is not None:
        config.tls.check()
    name = checkpoint.folder.name if Path(wanted).is_dir() else wanted
    return _Parts(wanted, name, checkpoint, known, identity, files, seen, policies)


def _arguments(config: Config, flags: Sequence[str]) -> dict[str, object]:
    """Those of the engine, `flags` before the configuration's. Raises SettingError.

    vLLM takes seconds to import, and reads its environment while it is.
    """
    from expertgate.server.engine import parse_flags
    from expertgate.server.handlers import check_tool_parser

    arguments = {**config.engine, **parse_flags(flags)}
    refuse_arguments(arguments)
    check_tool_parser(config.tool_parser)
    return arguments


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


def _summary(config: Config, parts: _Parts) -> list[str]:
    """What is served to whom, a line each. Raises SuspensionError."""
    experts = [f"{e.name} ({e.owner})" if e.owner else e.name for e in parts.known.experts]
    identity = ["API keys"] if config.identity.api_keys else []
    identity += [f"tokens of {issuer.name} ({issuer.issuer})" for issuer in config.identity.jwt]
    identity += ["client certificates"] if config.identity.certificates else []
    identity += ["anonymous"] if config.identity.anonymous else []
    suspended = sorted(suspensions.read(config.suspended) or ())
    return [
        f"experts: {', '.join(experts)}",
        f"identity: {', '.join(identity)}",
        f"policies: {config.policies}, version {parts.policies.version[:12]}",
        *([f"suspended: {', '.join(suspended)}"] if suspended else []),
        *(f"note: {doubt}" for doubt in parts.policies.doubts(parts.identity.groups)),
    ]


def _operators(admin: tuple[socket.socket, str] | None) -> str:
    """Where their listener is."""
    if admin is None:
        return "no listener, as the configuration has no `admin:`"
    unix = admin[0].family == socket.AF_UNIX
    return f"unix:{admin[0].getsockname()}" if unix else f"http://{_authority(admin[0])}"


def _admin(config: AdminConfig) -> tuple[socket.socket, str]:
    """The operators' listener and their token. Raises ListenError or ConfigError."""
    return listen_at(config.listen), config.read_token()


def _authority(bound: socket.socket) -> str:
    host, port = bound.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
