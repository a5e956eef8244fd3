"""Tokens of a real issuer that runs beside: what holds, what is forged, and its bad days."""

import asyncio
import base64
import hashlib
import hmac
import json
import threading
import time
from datetime import UTC, datetime, timedelta

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from jwt.algorithms import ECAlgorithm
from starlette.requests import HTTPConnection

from expertgate.policies.principal import Principal
from expertgate.server import jwks, tokens
from expertgate.server.changes import CredentialsChanged
from expertgate.server.errors import ApiError
from expertgate.server.identity import Identity
from expertgate.server.identity_config import GroupRule, IdentityConfig, IssuerConfig
from expertgate.server.key_edits import create_key
from tests.support.issuer import AUDIENCE, Issuer, public_jwk

LEEWAY_S = 30


@pytest.fixture
def issuer():
    made = Issuer()
    yield made
    made.stop()


def trusting(issuer, **more) -> Identity:
    place = {} if "jwks_file" in more else {"jwks_url": f"{issuer.url}/keys"}
    config = {"name": "corp", "issuer": issuer.url, "audience": AUDIENCE, **place, **more}
    return Identity(IdentityConfig(jwt=(IssuerConfig(**config),), anonymous=True))


@pytest.fixture
def identity(issuer):
    return trusting(issuer)


@pytest.fixture
def no_cooldown(monkeypatch):
    monkeypatch.setattr(jwks, "COOLDOWN_S", 0.0)


def connection(token) -> HTTPConnection:
    headers = [(b"authorization", b"Bearer " + token.encode())]
    return HTTPConnection({"type": "http", "headers": headers})


def ask(identity, token) -> Principal:
    return asyncio.run(identity.identify(connection(token)))


def refused(identity, token, status=401) -> str:
    with pytest.raises(ApiError) as error:
        ask(identity, token)
    assert error.value.status == status
    if status == 401:
        assert error.value.code == "invalid_credential"
        assert error.value.headers == {"WWW-Authenticate": "Bearer"}
    assert error.value.__cause__ is None
    for part in token.split("."):
        assert not part or part not in str(error.value.body())
    return error.value.message


def look(identity) -> list[CredentialsChanged]:
    """What a server would see in two looks: the first sees a change, the second its end."""

    async def looks():
        found = [await source.refresh() for _ in range(2) for source in identity.sources]
        return [change for change in found if change is not None]

    return asyncio.run(looks())


# --- what holds -------------------------------------------------------------------------------


def test_a_token_tells_who_asks(identity, issuer):
    assert ask(identity, issuer.token()) == Principal("corp:ada", via="jwt:corp")
    assert ask(identity, issuer.token(aud=["other", AUDIENCE])).id == "corp:ada"


@pytest.mark.parametrize("algorithm", ["RS256", "ES256", "ES384", "EdDSA"])
def test_every_kind_of_key(issuer, algorithm):
    issuer.rotate("its", algorithm=algorithm)
    identity = trusting(issuer, algorithms=["PS256", algorithm])
    assert ask(identity, issuer.token("its")).id == "corp:ada"


def test_discovery_finds_the_keys(issuer):
    identity = trusting(issuer, jwks_url=None)
    assert ask(identity, issuer.token()).id == "corp:ada"
    assert issuer.asked == ["/.well-known/openid-configuration", "/keys"]


def test_keys_are_fetched_once(identity, issuer):
    for _ in range(5):
        ask(identity, issuer.token())
    assert len(issuer.asked) == 1


def test_a_token_that_held_is_still_judged_by_the_time_and_by_its_key(
    identity, issuer, monkeypatch, no_cooldown
):
    """Its signature is remembered, and nothing else."""
    exp = int(time.time()) + 100
    token = issuer.token(exp=exp)
    found = ask(identity, token)
    assert found.expires == datetime.fromtimestamp(exp + LEEWAY_S, UTC)
    with monkeypatch.context() as later:
        later.setattr(tokens, "datetime", Later)
        assert "has expired" in refused(identity, token)
    assert ask(identity, token) == found
    # Another key of the same name.
    del issuer.keys["one"]
    issuer.rotate("one")
    monkeypatch.setattr(jwks, "TTL_S", 0.0)
    assert "can't be verified" in refused(identity, token)


class Later(datetime):
    @classmethod
    def now(cls, tz=None):
        return datetime.now(tz) + timedelta(seconds=100 + LEEWAY_S)


def test_a_token_without_end_to_speak_of(identity, issuer):
    assert ask(identity, issuer.token(exp=10**30)).expires.year > 6000


def test_of_two_issuers_each_vouches_for_its_own(issuer):
    other = Issuer()
    configs = [
        IssuerConfig(name=name, issuer=each.url, audience=AUDIENCE, jwks_url=f"{each.url}/keys")
        for name, each in (("corp", issuer), ("guests", other))
    ]
    identity = Identity(IdentityConfig(jwt=configs))
    try:
        assert ask(identity, issuer.token()).id == "corp:ada"
        assert ask(identity, other.token()).id == "guests:ada"
        # Each has a key of the same name; only the issuer that a token names is asked for it.
        refused(identity, other.token(iss=issuer.url))
        refused(identity, issuer.token(iss=other.url))
    finally:
        other.stop()


@pytest.mark.parametrize("skew", [LEEWAY_S - 5, -600])
def test_clocks_may_differ_by_the_leeway(identity, issuer, skew):
    now = int(time.time())
    assert ask(identity, issuer.token(nbf=now + skew, iat=now + skew)).id == "corp:ada"
    assert ask(identity, issuer.token(exp=now - min(skew, 0) - LEEWAY_S + 5)).id == "corp:ada"


# --- groups and claims ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rules", "claims", "groups"),
    [
        ([], {"groups": ["research"]}, set()),
        ([GroupRule(claim="groups")], {"groups": ["research", "a b"]}, {"research", "a b"}),
        ([GroupRule(claim="groups")], {"groups": "research"}, {"research"}),
        ([GroupRule(claim="groups")], {}, set()),
        ([GroupRule(claim="groups", prefix="corp-")], {"groups": ["x"]}, {"corp-x"}),
        (
            [GroupRule(claim=["realm", "roles"], values={"ds": "research"})],
            {"realm": {"roles": ["ds", "admin"]}},
            {"research"},
        ),
        ([GroupRule(claim=["realm", "roles"])], {"realm": {}, "realm.roles": ["y"]}, set()),
        ([GroupRule(claim="https://acme.example/g")], {"https://acme.example/g": ["x"]}, {"x"}),
        ([GroupRule(claim="a"), GroupRule(claim="b", prefix="b-")], {"a": "x", "b": ["x"]},
         {"x", "b-x"}),
    ],
)  # fmt: skip
def test_claims_become_groups_as_the_configuration_says(issuer, rules, claims, groups):
    assert ask(trusting(issuer, groups=rules), issuer.token(**claims)).groups == groups


@pytest.mark.parametrize(
    "value", [7, True, {"a": "b"}, ["a", 7], [["a"]], [""], ["a\nb"], ["x" * 257], ["\ud800"]]
)
def test_groups_that_cannot_be_read_are_not_left_out(issuer, value):
    identity = trusting(issuer, groups=[GroupRule(claim="groups")])
    assert "claim groups" in refused(identity, issuer.token(groups=value))


@pytest.mark.parametrize("value", [7, "research", ["research"]])
def test_nor_are_those_that_stand_within_another_claim(issuer, value):
    identity = trusting(issuer, groups=[GroupRule(claim=("realm", "roles"))])
    assert "claim realm → roles" in refused(identity, issuer.token(realm=value))


def test_only_the_claims_that_are_named_are_handed_on(issuer):
    identity = trusting(issuer, claims=["department", "level", "staff", "sites", "ratio", "gone"])
    said = {"department": "x", "level": 3, "staff": True, "sites": ["a"], "ratio": 0.5}
    found = ask(identity, issuer.token(**said, email="ada@acme.example", gone=None))
    assert found.claims == {**said, "sites": ("a",)}


@pytest.mark.parametrize("value", [{"a": 1}, [1], ["a", None], float("inf"), "\udfff", ["\ud800"]])
def test_a_claim_that_policies_could_not_read_is_not_left_out(issuer, value):
    identity = trusting(issuer, claims=["level"])
    assert "claim level" in refused(identity, issuer.token(level=value))


@pytest.mark.parametrize("sub", [None, "", "a\nb", "x" * 257, "\ud800"])
def test_a_user_without_a_name_is_nobody(identity, issuer, sub):
    assert "claim sub" in refused(identity, issuer.token(sub=sub))


def test_another_claim_may_name_the_user(issuer):
    identity = trusting(issuer, user=["act", "who"])
    assert ask(identity, issuer.token(act={"who": "eve"})).id == "corp:eve"
    refused(identity, issuer.token())


def test_a_token_names_nobody_elses_user(issuer, tmp_path):
    """A user of an issuer is never the holder of a key, a gateway's user, or nobody."""
    path = tmp_path / "keys.yaml"
    create_key(path, "alice", ["research"], None)
    config = IssuerConfig(
        name="corp", issuer=issuer.url, audience=AUDIENCE, jwks_url=f"{issuer.url}/keys"
    )
    identity = Identity(IdentityConfig(api_keys=path, jwt=(config,)))
    for sub in ("alice", "portal/alice", "anonymous", "corp:alice", "eg-alice"):
        found = ask(identity, issuer.token(sub=sub))
        assert (found.id, found.groups) == (f"corp:{sub}", frozenset())


# --- forgeries --------------------------------------------------------------------------------


def part(value) -> str:
    raw = value if isinstance(value, bytes) else json.dumps(value).encode()
    return base64.urlsafe_b64encode(raw).decode().rstrip("=")


def unsigned(header, claims) -> str:
    return f"{part(header)}.{part(claims)}."


def with_hmac(header, claims, secret: bytes) -> str:
    signed = f"{part(header)}.{part(claims)}"
    return f"{signed}.{part(hmac.digest(secret, signed.encode(), 'sha256'))}"


@pytest.mark.parametrize("alg", ["none", "None", "NONE", "", None, "HS256", "RS256", [], {}])
def test_without_a_signature(identity, issuer, alg):
    header = {"kid": "one", "typ": "JWT", **({} if alg is None else {"alg": alg})}
    refused(identity, unsigned(header, issuer.claims()))
    with_one = issuer.token().rsplit(".", 1)
    refused(identity, unsigned(header, issuer.claims()) + with_one[1])


def test_signed_with_the_public_key_as_a_secret(issuer):
    issuer.rotate("one", "rsa", algorithm="RS256")
    identity = trusting(issuer)
    for kid, (algorithm, key) in issuer.keys.items():
        forms = [
            key.public_key().public_bytes(encoding, form)
            for encoding in (serialization.Encoding.PEM, serialization.Encoding.DER)
            for form in (serialization.PublicFormat.SubjectPublicKeyInfo,)
        ]
        forms.append(json.dumps(public_jwk(kid, algorithm, key)).encode())
        for secret in (*forms, b""):
            for alg in ("HS256", algorithm):
                header = {"alg": alg, "kid": kid, "typ": "JWT"}
                refused(identity, with_hmac(header, issuer.claims(), secret))


def test_signed_by_somebody_else(identity, issuer):
    stranger = Issuer()
    try:
        refused(identity, stranger.token(iss=issuer.url))
        # A token may say where its key is; nobody looks there.
        algorithm, key = stranger.keys["one"]
        own = {"jwk": public_jwk("one", algorithm, key)}
        there = dict.fromkeys(("jku", "x5u"), f"{stranger.url}/keys")
        refused(identity, stranger.token(headers={**own, **there}, iss=issuer.url))
        assert stranger.asked == []
        # Nor does it harm a token that its issuer did sign.
        assert ask(identity, issuer.token(headers={**own, **there})).id == "corp:ada"
        assert stranger.asked == []
    finally:
        stranger.stop()


@pytest.mark.parametrize(
    ("claims", "words"),
    [
        ({"aud": "another"}, "is for another audience"),
        ({"aud": ["another"]}, "is for another audience"),
        ({"aud": AUDIENCE.upper()}, "is for another audience"),
        ({"aud": None}, "lacks exp or aud"),
        ({"aud": []}, "lacks exp or aud"),
        ({"aud": {"a": 1}}, "is for another audience"),
        ({"exp": None}, "lacks exp or aud"),
        ({"exp": "soon"}, "can't be verified"),
        ({"exp": 1}, "has expired"),
        ({"exp": timedelta(seconds=-LEEWAY_S - 1)}, "has expired"),
        ({"nbf": timedelta(seconds=LEEWAY_S + 600)}, "is not valid yet"),
        ({"iat": timedelta(seconds=LEEWAY_S + 600)}, "is not valid yet"),
        ({"nbf": "now"}, "can't be verified"),
        ({"sub": 7}, "can't be verified"),
    ],
)
def test_signed_and_yet_not_for_us_or_not_now(identity, issuer, claims, words):
    now = datetime.now(UTC)  # which is later than when this file was read
    claims = {k: now + v if isinstance(v, timedelta) else v for k, v in claims.items()}
    assert words in refused(identity, issuer.token(**claims))


def test_another_issuer(identity, issuer):
    for iss in (issuer.url + "/", issuer.url.upper(), "http://another.example", None, "", 7, [1]):
        claims = {k: v for k, v in {**issuer.claims(), "iss": iss}.items() if v is not None}
        algorithm, key = issuer.keys["one"]
        header = {"alg": algorithm, "kid": "one"}
        signed = jwt.PyJWS().encode(json.dumps(claims).encode(), key, algorithm, headers=header)
        refused(identity, signed)


def test_a_token_must_name_its_key(identity, issuer):
    algorithm, key = issuer.keys["one"]
    assert "no kid" in refused(identity, jwt.encode(issuer.claims(), key, algorithm))
    for kid in ("", "One", "one ", "two", "../one", "' OR 1=1 --", "x" * 5000):
        refused(identity, issuer.token(headers={"kid": kid}))
    # PyJWT wouldn't write such a thing.
    _, claims, signature = issuer.token().split(".")
    for kid in (7, None, ["one"], {"one": 1}):
        refused(identity, f"{part({'alg': 'ES256', 'kid': kid})}.{claims}.{signature}")


def test_an_extension_that_must_be_understood(identity, issuer):
    refused(identity, issuer.token(headers={"crit": ["exp"], "exp": 1}))
    refused(identity, issuer.token(headers={"crit": []}))
    # An unencoded payload (RFC 7797), the one extension that the library knows.
    *_, signature = issuer.token().split(".")
    loose = part({"alg": "ES256", "kid": "one", "b64": False, "crit": ["b64"]})
    refused(identity, f"{loose}.{json.dumps(issuer.claims())}.{signature}")
    refused(identity, f"{loose}..{signature}")


def test_every_changed_character_shows(identity, issuer):
    token = issuer.token()
    changed = {token[:i] + ("A" if c != "A" else "B") + token[i + 1 :] for i, c in enumerate(token)}
    for each in sorted(changed):
        refused(identity, each)
    for each in (token[:-1], token + "A", token + ".", "." + token, token.replace(".", "..")):
        refused(identity, each)


def test_a_token_without_end_is_not_looked_at(identity, issuer):
    refused(identity, issuer.token(more="x" * 20_000))
    assert issuer.asked == []


def test_an_algorithm_that_is_not_allowed(issuer):
    issuer.rotate("one", "rsa", algorithm="RS256")
    identity = trusting(issuer, algorithms=["ES256"])
    assert ask(identity, issuer.token("one")).id == "corp:ada"
    assert "not signed by one of ES256" in refused(identity, issuer.token("rsa"))


def test_a_short_rsa_key_verifies_nothing(issuer):
    from cryptography.hazmat.primitives.asymmetric import rsa

    issuer.keys["short"] = ("RS256", rsa.generate_private_key(65537, 1024))
    with pytest.warns(Warning, match="1024 bits"):
        token = issuer.token("short")
    refused(trusting(issuer), token)


# --- keys that come and go --------------------------------------------------------------------


def test_a_new_key_is_fetched_when_a_token_names_it(identity, issuer, no_cooldown):
    ask(identity, issuer.token())
    issuer.rotate("one", "two")
    assert ask(identity, issuer.token("two")).id == "corp:ada"
    assert len(issuer.asked) == 2


def test_a_key_rotated_away_ends_when_keys_are_fetched_again(
    identity, issuer, no_cooldown, monkeypatch
):
    token = issuer.token()
    ask(identity, token)
    assert [change.vouchers for change in look(identity)] == [frozenset()]
    issuer.rotate("two")
    ask(identity, token)  # known, and fetched a moment ago
    monkeypatch.setattr(jwks, "TTL_S", 0.0)
    assert "a key that its issuer doesn't have" in refused(identity, token)
    (change,) = look(identity)
    assert (change.issuer, change.vouchers) == ("corp", {"corp"})
    assert [(key.id, key.before is None) for key in change.changed] == [
        ("one", False),
        ("two", True),
    ]
    assert look(identity) == []


def test_nobody_makes_the_server_ask_the_issuer_all_the_time(identity, issuer):
    ask(identity, issuer.token())

    async def hammer():
        crowd = [issuer.token(headers={"kid": f"kid-{n}"}) for n in range(50)]
        asking = [identity.identify(connection(token)) for token in crowd]
        return await asyncio.gather(*asking, return_exceptions=True)

    assert {error.status for error in asyncio.run(hammer())} == {401}
    assert len(issuer.asked) == 1
    assert ask(identity, issuer.token()).id == "corp:ada"


def test_an_issuer_that_is_down_is_not_asked_all_the_time_either(identity, issuer):
    issuer.answers = 500
    for _ in range(5):
        refused(identity, issuer.token(), 503)
    assert len(issuer.asked) == 1


def test_all_who_wait_wait_for_one_fetch(identity, issuer):
    async def together():
        asking = [identity.identify(connection(issuer.token())) for _ in range(20)]
        return await asyncio.gather(*asking)

    assert {principal.id for principal in asyncio.run(together())} == {"corp:ada"}
    assert len(issuer.asked) == 1


def test_a_slow_issuer_holds_up_no_key_that_is_known(identity, issuer, monkeypatch):
    ask(identity, issuer.token())
    monkeypatch.setattr(jwks, "TTL_S", 0.0)
    monkeypatch.setattr(jwks, "COOLDOWN_S", 0.0)
    monkeypatch.setattr(jwks, "KNOWN_S", 0.1)
    monkeypatch.setattr(jwks, "TIMEOUT_S", 600.0)  # only the issuer's answer could end the fetch
    released, answered = threading.Event(), threading.Event()

    def slow(handler):
        released.wait(60)
        answered.set()

    issuer.answers = slow
    try:
        assert ask(identity, issuer.token()).id == "corp:ada"
        assert not answered.is_set()  # or it was waited for
    finally:
        released.set()


def test_a_proxy_is_not_asked_for_what_is_on_this_machine(issuer, monkeypatch):
    """Without https:// anybody could answer there; on the way to a loopback address nobody is."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    assert ask(trusting(issuer), issuer.token()).id == "corp:ada"
    assert ask(trusting(issuer, jwks_url=None), issuer.token()).id == "corp:ada"


def test_a_fault_that_nobody_thought_of_leaves_the_old_keys_in_force(
    identity, issuer, monkeypatch, caplog, no_cooldown
):
    ask(identity, issuer.token())
    monkeypatch.setattr(jwks, "TTL_S", 0.0)
    monkeypatch.setattr(jwks, "parse_jwks", lambda *_: {}["nosuch"])
    assert ask(identity, issuer.token()).id == "corp:ada"
    assert "no new keys" in caplog.text


def redirect(elsewhere):
    def answer(handler):
        handler.send_response(302)
        handler.send_header("Location", elsewhere)
        handler.end_headers()

    return answer


def drip(handler):
    handler.send_response(200)
    handler.end_headers()
    for _ in range(200):
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.01)
    handler.wfile.write(handler.usual())  # all is right in the end, but who would wait for it


def huge(handler):
    return handler.usual() + b" " * jwks.MAX_BYTES


def silent(handler):
    time.sleep(1)
    return handler.usual()


def cut_off(handler):
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"keys": [')


BAD_DAYS = [
    pytest.param(500, id="an error"),
    pytest.param(b"", id="nothing"),
    pytest.param(b"<html>", id="another page"),
    pytest.param(b"[]", id="a list"),
    pytest.param(b'{"keys": {}}', id="no list"),
    pytest.param(b'{"keys": []}', id="no key"),
    pytest.param(b'{"keys": [7, {}, {"kid": "one", "kty": "EC"}]}', id="no usable key"),
    pytest.param(b'{"keys": ' + b"[" * 100_000, id="nested"),
    pytest.param(huge, id="huge"),
    pytest.param(lambda h: h.connection.close(), id="hung up"),
    pytest.param(cut_off, id="cut off"),
    pytest.param(drip, id="slow"),
    pytest.param(silent, id="silent"),
]


@pytest.mark.parametrize("answers", BAD_DAYS)
def test_a_bad_day_before_there_are_keys(identity, issuer, monkeypatch, answers):
    monkeypatch.setattr(jwks, "TIMEOUT_S", 0.5)
    issuer.answers = answers
    assert "can't be fetched" in refused(identity, issuer.token(), 503)


@pytest.mark.parametrize("answers", BAD_DAYS)
def test_a_bad_day_leaves_the_old_keys_in_force_and_is_told_once(
    identity, issuer, no_cooldown, monkeypatch, caplog, answers
):
    ask(identity, issuer.token())
    monkeypatch.setattr(jwks, "TIMEOUT_S", 0.5)
    monkeypatch.setattr(jwks, "KNOWN_S", 10.0)
    issuer.answers = answers
    monkeypatch.setattr(jwks, "TTL_S", 0.0)
    for _ in range(2):
        assert ask(identity, issuer.token()).id == "corp:ada"
    assert len([r for r in caplog.records if r.levelname == "ERROR"]) == 1
    # Not for ever: a key that was taken back meanwhile would stay good.
    monkeypatch.setattr(jwks, "MAX_AGE_S", 0.0)
    refused(identity, issuer.token(), 503)


def test_keys_elsewhere_are_not_fetched(identity, issuer):
    elsewhere = Issuer()
    try:
        issuer.answers = redirect(f"{elsewhere.url}/keys")
        refused(identity, issuer.token(), 503)
        assert elsewhere.asked == []
    finally:
        elsewhere.stop()


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ({"issuer": "https://another.example", "jwks_uri": "{url}/keys"}, "is of another issuer"),
        ({"issuer": "{url}", "jwks_uri": "http://another.example/keys"}, "must be https://"),
        ({"issuer": "{url}", "jwks_uri": "file:///etc/hosts"}, "must be a URL"),
        ({"issuer": "{url}", "jwks_uri": 7}, "has no jwks_uri"),
        ({"issuer": "{url}"}, "is not a JSON object with issuer and jwks_uri"),
        ([], "is not a JSON object with issuer and jwks_uri"),
    ],
)
def test_discovery_leads_nowhere_else(issuer, caplog, document, words):
    issuer.answers = json.dumps(document).replace("{url}", issuer.url).encode()
    refused(trusting(issuer, jwks_url=None), issuer.token(), 503)
    assert len(issuer.asked) == 1
    assert words in caplog.text


def test_an_issuer_that_hangs_holds_up_nobody_else(issuer, tmp_path, monkeypatch):
    monkeypatch.setattr(jwks, "TIMEOUT_S", 60.0)
    path = tmp_path / "keys.yaml"
    key = create_key(path, "alice", [], None)
    config = IssuerConfig(
        name="corp", issuer=issuer.url, audience=AUDIENCE, jwks_url=f"{issuer.url}/keys"
    )
    identity = Identity(IdentityConfig(api_keys=path, jwt=(config,)))
    asked, go_on = threading.Event(), threading.Event()

    def hang(handler):
        asked.set()
        go_on.wait(20)
        return handler.usual()

    issuer.answers = hang

    async def both():
        waiting = asyncio.create_task(identity.identify(connection(issuer.token())))
        leaving = asyncio.create_task(identity.identify(connection(issuer.token())))
        while not asked.is_set():
            await asyncio.sleep(0.01)
        leaving.cancel()  # whoever leaves does not end the fetch that others wait for
        assert (await identity.identify(connection(key))).id == "alice"
        assert not waiting.done()
        go_on.set()
        return await waiting

    assert asyncio.run(both()).id == "corp:ada"
    assert len(issuer.asked) == 1


# --- keys in a file ---------------------------------------------------------------------------


def test_a_file_of_keys_is_read_again_when_it_changes(issuer, tmp_path):
    path = tmp_path / "jwks.json"
    path.write_text(json.dumps({"keys": issuer.jwks()}))
    identity = trusting(issuer, jwks_file=path)
    old = issuer.token()
    assert ask(identity, old).id == "corp:ada"
    issuer.rotate("two")
    refused(identity, issuer.token("two"))

    path.write_text("broken")
    assert look(identity) == []
    assert ask(identity, old).id == "corp:ada"

    path.write_text(json.dumps({"keys": issuer.jwks()}))
    assert len(look(identity)) == 1
    assert ask(identity, issuer.token("two")).id == "corp:ada"
    refused(identity, old)
    assert issuer.asked == []


def test_another_key_of_the_same_name_is_a_change(issuer, tmp_path):
    """What was signed by the old one is no longer believed, in open requests either."""
    path = tmp_path / "jwks.json"
    path.write_text(json.dumps({"keys": issuer.jwks()}))
    identity = trusting(issuer, jwks_file=path)
    old = issuer.token()
    issuer.rotate("two")
    issuer.rotate("one")
    path.write_text(json.dumps({"keys": issuer.jwks()}))
    (change,) = look(identity)
    assert [credential.id for credential in change.changed] == ["one"]
    assert change.vouchers == {"corp"}
    refused(identity, old)
    assert ask(identity, issuer.token()).id == "corp:ada"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, r"jwks\.json: No such file"),
        ("", r"jwks\.json:1: is not JSON"),
        ('{"keys": [\n  {,}]}', r"jwks\.json:2: is not JSON"),
        ("\udcff", r"jwks\.json: is not a JSON object"),
        ("[]", r"jwks\.json: is not a JSON object with a list `keys`"),
        ('{"keys": []}', r"jwks\.json: has no key"),
    ],
)
def test_a_file_that_cannot_be_used_ends_the_start(issuer, tmp_path, text, words):
    path = tmp_path / "jwks.json"
    if text is not None:
        path.write_text(text, errors="surrogateescape")
    with pytest.raises(jwks.JwksError, match=words) as error:
        trusting(issuer, jwks_file=path)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"kid": None},
        {"kid": 7},
        {"use": "enc"},
        {"key_ops": ["sign"]},
        {"key_ops": 7},
        {"alg": "ES384"},
        {"alg": "HS256"},
        {"kty": "oct", "k": "AAAA"},
        {"crv": "secp256k1"},
        {"x": "AAAA"},
    ],
)
def test_keys_that_verify_nothing(issuer, change):
    [jwk] = issuer.jwks()
    with pytest.raises(jwks.JwksError, match="has no key"):
        jwks.parse_jwks(json.dumps({"keys": [{**jwk, **change}]}).encode(), ["ES256"], "here")


def test_a_private_key_that_was_published_verifies_nothing(issuer):
    """Whoever reads it can sign."""
    _, key = issuer.keys["one"]
    private = {**ECAlgorithm.to_jwk(key, as_dict=True), "kid": "one"}
    assert "d" in private
    with pytest.raises(jwks.JwksError, match="has no key"):
        jwks.parse_jwks(json.dumps({"keys": [private]}).encode(), ["ES256"], "here")


def test_two_keys_of_one_name(issuer):
    [one] = issuer.jwks()
    issuer.rotate("two")
    [two] = issuer.jwks()
    raw = json.dumps({"keys": [one, {**two, "kid": "one"}]}).encode()
    with pytest.raises(jwks.JwksError, match="two keys 'one' for ES256"):
        jwks.parse_jwks(raw, ["ES256"], "here")


def test_nothing_of_a_token_is_logged(identity, issuer, caplog):
    caplog.set_level("DEBUG")
    token = issuer.token(sub="a\nforged line")
    refused(identity, token)
    refused(identity, issuer.token(headers={"kid": "a\nforged line"}))
    refused(identity, issuer.token(headers={"crit": ["a\nforged line"]}))
    ask(identity, issuer.token())
    assert "forged line" not in caplog.text
    assert hashlib.sha256(token.encode()).hexdigest() not in caplog.text
    for each in token.split("."):
        assert each not in caplog.text
