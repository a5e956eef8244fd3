"""TLS, and who asks by the certificate of the connection; real sockets, certificates of the day."""

import asyncio
import datetime
import inspect
import ssl
import threading
import time
from types import SimpleNamespace

import httpx
import pytest
import uvicorn
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from fastapi import FastAPI, Request

from expertgate.server.app import show_errors
from expertgate.server.certificates import STATE, ClientCertificates
from expertgate.server.config import Config, ConfigError, TlsConfig
from expertgate.server.errors import ApiError
from expertgate.server.identity import Identity
from expertgate.server.identity_config import CertificatesConfig, IdentityConfig
from expertgate.server.listening import listen
from expertgate.server.run import Listener, _config

DAY = datetime.timedelta(days=1)
NOW = datetime.datetime.now(datetime.UTC)
USES = list(inspect.signature(x509.KeyUsage).parameters)


class Authority:
    def __init__(self, folder, name):
        self.folder = folder
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self.file = folder / f"{name}.pem"
        self.file.write_bytes(self._sign(self.name, self.key, ca=True))

    def issue(self, file, *subject):
        """A certificate and its key, as two files."""
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(oid, text) for oid, text in subject])
        certificate, private = self.folder / f"{file}.pem", self.folder / f"{file}.key"
        certificate.write_bytes(self._sign(name, key, ca=False))
        private.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )
        return certificate, private

    def _sign(self, name, key, *, ca):
        address = x509.DNSName("localhost")
        # With what RFC 5280 wants, and Python from 3.13 on asks for.
        of = x509.SubjectKeyIdentifier.from_public_key
        by = x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier
        uses = dict.fromkeys(USES, False) | {"digital_signature": True, "key_cert_sign": ca}
        made = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(self.name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(NOW - DAY)
            .not_valid_after(NOW + DAY)
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName([address]), critical=False)
            .add_extension(x509.KeyUsage(**uses), critical=True)
            .add_extension(of(key.public_key()), critical=False)
            .add_extension(by(of(self.key.public_key())), critical=False)
            .sign(self.key, hashes.SHA256())
        )
        return made.public_bytes(serialization.Encoding.PEM)


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("tls"), "ours")


@pytest.fixture
def serve(authority):
    """Starts a listener that says who asks; gives its URL."""
    ends = []

    def start(*, mutual, keys=None, groups=()):
        certificate, key = authority.issue("server", (NameOID.COMMON_NAME, "localhost"))
        tls = TlsConfig(
            certificate=certificate, key=key, client_ca=authority.file if mutual else None
        )
        tls.check()
        identity = Identity(
            IdentityConfig(certificates={"name": "mesh", "groups": groups}, api_keys=keys)
        )
        app = FastAPI()
        app.state.service = SimpleNamespace(audit=SimpleNamespace(refused=lambda *_: None))

        async def who(request: Request):
            principal = await identity.identify(request)
            return {"id": principal.id, "groups": sorted(principal.groups), "via": principal.via}

        app.add_api_route("/who", who)
        show_errors(app)
        bound = listen("127.0.0.1", 0)
        server = uvicorn.Server(_config(Listener(app, bound, tls), 1))
        thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[bound])))
        thread.start()
        while not server.started:
            time.sleep(0.01)

        def end():
            server.should_exit = True
            thread.join(20)

        ends.append(end)
        return f"https://localhost:{bound.getsockname()[1]}/who"

    yield start
    for end in ends:
        end()


def ask(url, authority, certificate=None, **headers):
    context = ssl.create_default_context(cafile=str(authority.file))
    if certificate is not None:
        context.load_cert_chain(*certificate)
    with httpx.Client(verify=context, trust_env=False) as client:
        return client.get(url, headers=headers)


@pytest.mark.parametrize(
    ("groups", "found"),
    [
        ([], []),  # whoever issues certificates doesn't say by that who is in which group
        ([{"claim": "organizationalUnitName"}], ["research", "staff"]),
        ([{"claim": "organizationalUnitName", "values": {"research": "science"}}], ["science"]),
        ([{"claim": "organizationName", "prefix": "of-"}], ["of-acme"]),
        ([{"claim": "localityName"}], []),
    ],
)
def test_a_certificates_subject_is_who_asks(serve, authority, groups, found):
    url = serve(mutual=True, groups=groups)
    alice = authority.issue(
        "alice",
        (NameOID.ORGANIZATIONAL_UNIT_NAME, "research"),
        (NameOID.ORGANIZATIONAL_UNIT_NAME, "staff"),
        (NameOID.ORGANIZATION_NAME, "acme"),
        (NameOID.COMMON_NAME, "alice"),
    )
    bob = authority.issue("bob", (NameOID.COMMON_NAME, "bob"))
    for _ in range(2):
        said = ask(url, authority, alice).json()
        assert said == {"id": "mesh:alice", "groups": found, "via": "certificate"}
        assert ask(url, authority, bob).json()["id"] == "mesh:bob"


def test_without_a_certificate_or_with_a_strangers_nobody_gets_in(serve, authority, tmp_path):
    url = serve(mutual=True)
    stranger = Authority(tmp_path, "theirs").issue("mallory", (NameOID.COMMON_NAME, "alice"))
    for certificate in (None, stranger):
        with pytest.raises(httpx.HTTPError):
            ask(url, authority, certificate)


def test_a_subject_without_a_name_is_nobody(serve, authority):
    url = serve(mutual=True)
    for subject in (
        [(NameOID.ORGANIZATION_NAME, "acme")],
        [(NameOID.COMMON_NAME, "a"), (NameOID.COMMON_NAME, "b")],
        [(NameOID.COMMON_NAME, "a\nb")],
    ):
        nameless = authority.issue("nameless", *subject)
        response = ask(url, authority, nameless)
        assert response.status_code == 401
        assert response.json()["error"]["code"] == "invalid_credential"


def test_groups_that_cannot_be_read_are_not_left_out(serve, authority):
    url = serve(mutual=True, groups=[{"claim": "organizationalUnitName"}])
    subject = (NameOID.ORGANIZATIONAL_UNIT_NAME, "a\nb"), (NameOID.COMMON_NAME, "alice")
    response = ask(url, authority, authority.issue("alice", *subject))
    assert response.status_code == 401
    assert "claim organizationalUnitName" in response.json()["error"]["message"]


def test_a_connection_may_outlive_its_certificate_and_its_principal_may_not():
    certificates = ClientCertificates(CertificatesConfig(name="mesh"))

    def ask(ends):
        said = {
            "subject": ((("commonName", "alice"),),),
            "notAfter": ends.strftime("%b %d %H:%M:%S %Y GMT"),
        }
        connection = SimpleNamespace(scope={"state": {STATE: said}}, headers={})
        return asyncio.run(certificates.identify(connection))

    soon = NOW.replace(microsecond=0) + DAY
    assert ask(soon).expires == soon
    with pytest.raises(ApiError) as error:
        ask(NOW - DAY)
    assert error.value.status == 401


def test_another_credential_is_not_passed_over(serve, authority):
    alice = authority.issue("alice", (NameOID.COMMON_NAME, "alice"))
    response = ask(serve(mutual=True), authority, alice, Authorization="Bearer eg-wrong")
    assert response.status_code == 401


def test_a_header_makes_no_certificate(serve, authority):
    response = ask(serve(mutual=False), authority, **{"X-Client-Certificate": "CN=alice"})
    assert response.status_code == 401


def test_files_that_cannot_be_used(authority, tmp_path):
    certificate, key = authority.issue("server", (NameOID.COMMON_NAME, "localhost"))
    other = authority.issue("other", (NameOID.COMMON_NAME, "localhost"))[1]
    junk = tmp_path / "junk"
    junk.write_text("junk")
    for made in (
        {"certificate": tmp_path / "none", "key": key},
        {"certificate": certificate, "key": other},
        {"certificate": junk, "key": key},
        {"certificate": certificate, "key": key, "client_ca": junk},
        {"certificate": certificate, "key": key, "client_ca": tmp_path / "none"},
    ):
        with pytest.raises(ConfigError, match=r"^tls: "):
            TlsConfig(**made).check()
    with pytest.raises(ConfigError, match=r"none: No such file or directory$"):
        TlsConfig(certificate=certificate, key=tmp_path / "none").check()


def test_a_key_under_a_password_is_refused_and_nobody_asked_for_it(authority, tmp_path):
    certificate, key = authority.issue("server", (NameOID.COMMON_NAME, "localhost"))
    secret = serialization.load_pem_private_key(key.read_bytes(), None)
    locked = tmp_path / "locked.pem"
    locked.write_bytes(
        secret.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"secret"),
        )
    )
    with pytest.raises(ConfigError, match="its private key, unencrypted, both in PEM"):
        TlsConfig(certificate=certificate, key=locked).check()


def test_certificates_need_an_authority_that_checks_them(tmp_path):
    path = tmp_path / "expertgate.yaml"
    text = "identity: {certificates: {name: mesh}}\npolicies: policies\n"
    for tls in ("", "tls: {certificate: c, key: k}\n"):
        path.write_text(text + tls)
        with pytest.raises(ConfigError, match=r"needs tls\.client_ca"):
            Config.load(path)
    path.write_text(text + "tls: {certificate: c, key: k, client_ca: a}\n")
    config = Config.load(path)
    assert config.tls.client_ca == tmp_path / "a"
