import pytest

from expertgate.server.config import Config, ConfigError

LEAST = "identity: {api_keys: keys.yaml}\npolicies: policies\n"


@pytest.fixture
def load(tmp_path):
    def _load(text: str) -> Config:
        path = tmp_path / "expertgate.yaml"
        path.write_text(text)
        return Config.load(path)

    return _load


def test_the_least_configuration(load, tmp_path):
    config = load(LEAST)
    assert config.identity.api_keys == tmp_path / "keys.yaml"
    assert config.policies == tmp_path / "policies"
    assert (config.model, config.catalogue, config.engine) == (None, None, {})


def test_paths_are_relative_to_the_file(load, tmp_path, monkeypatch):
    (tmp_path / "flex").mkdir()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    config = load(LEAST + "model: flex\ncatalogue: /etc/experts.json\n")
    assert config.model == str(tmp_path / "flex")
    assert str(config.catalogue) == "/etc/experts.json"
    assert load(LEAST + "model: ./gone\n").model == str(tmp_path / "gone")


def test_a_hub_id_stays_as_it_is(load):
    assert load(LEAST + "model: allenai/FlexOlmo-7x7B-1T\n").model == "allenai/FlexOlmo-7x7B-1T"


def test_engine_arguments_pass_through_as_they_are(load):
    config = load(LEAST + "engine:\n  max_model_len: 2048\n  compilation_config: {mode: 0}\n")
    assert config.engine == {"max_model_len": 2048, "compilation_config": {"mode": 0}}


@pytest.mark.parametrize(
    ("text", "faults"),
    [
        ("", ["1: is empty; it must name at least identity and policies"]),
        ("- a\n", ["1: must be a mapping of model, revision, "]),
        (LEAST + "prot: 1\n", ["3: prot: unknown key; did you mean port?"]),
        (LEAST + "zzz: 1\n", ["3: zzz: unknown key"]),
        ("policies: p\n", ["1: identity: is missing"]),
        (
            "policies: p\nidentity:\n",
            ["2: identity: must be a mapping of api_keys, jwt, certificates, anonymous"],
        ),
        (
            "policies: p\nidentity:\n  api_key: k\n",
            ["3: identity.api_key: unknown key; did you mean api_keys?"],
        ),
        ("policies: p\nidentity: {}\n", ["2: identity: lets nobody in; name at least one of"]),
        (
            "policies: p\nidentity: {anonymous: false}\n",
            ["2: identity: lets nobody in; name at least one of"],
        ),
        (
            "policies: p\nidentity: {anonymous: 1}\n",
            ["2: identity.anonymous: must be true or false"],
        ),
        (LEAST + "port: 70000\n", ["3: port: must be less than or equal to 65535"]),
        (LEAST + "port: true\n", ["3: port: must be a whole number, without quotes"]),
        (LEAST + "claims: {a: text}\n", ["3: claims.a: must be 'string', 'integer'"]),
        (LEAST + "claims: {a b: string}\n", ["3: claims.a b"]),
        (LEAST + "limits: {a: {concurrent: 0}}\n", ["3: limits.a.concurrent: must be gr"]),
        (LEAST + "limits: {a: {tokens: 5}}\n", ["3: limits.a.tokens: unknown key"]),
        (
            LEAST + "limits: {a: {concurent: 5}}\n",
            ["3: limits.a.concurent: unknown key; did you mean concurrent?"],
        ),
        (
            LEAST + "admin: {listn: 'unix:a', token: t}\n",
            [
                "3: admin.listen: is missing",
                "3: admin.listn: unknown key; did you mean listen?",
            ],
        ),
        (
            LEAST + "admin: {listen: nowhere, token: t}\n",
            ["3: admin.listen: must be HOST:PORT, such as 127.0.0.1:9100, or"],
        ),
        (
            LEAST + "admin: {listen: '127.0.0.1:99999', token: t}\n",
            ["3: admin.listen: must be HOST:PORT, such as 127.0.0.1:9100, or"],
        ),
        (LEAST + "logs: xml\n", ["3: logs: must be 'text' or 'json'"]),
        (LEAST + "model: 7\n", ["3: model: must be text; quote what looks like a number"]),
        (LEAST + "engine: [1]\n", ["3: engine: must be a mapping, as {key: value}"]),
        # As a template leaves it whose variable isn't set: it would listen everywhere.
        (LEAST + "host: ''\n", ["3: host: must have at least 1 character"]),
        (LEAST + "port: 1\nport: 2\n", ["4: port: is given twice"]),
        (LEAST + "a: [\n", ["4: "]),
    ],
)
def test_every_fault_has_its_place(load, tmp_path, text, faults):
    with pytest.raises(ConfigError) as error:
        load(text)
    lines = str(error.value).splitlines()
    assert len(lines) == len(faults)
    for line, fault in zip(lines, faults, strict=True):
        assert line.startswith(f"{tmp_path}/expertgate.yaml:{fault}")


def test_the_operators_part(load, tmp_path):
    for listen in ("127.0.0.1:9100", "[::1]:9100", "localhost:0"):
        config = load(LEAST + f"admin: {{listen: '{listen}', token: t}}\n")
        assert config.admin.listen == listen
        assert config.admin.token == tmp_path / "t"
    config = load(LEAST + "admin: {listen: 'unix:a.sock', token: /etc/t}\n")
    assert config.admin.listen == f"unix:{tmp_path}/a.sock"
    assert str(config.admin.token) == "/etc/t"


def test_a_missing_file(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.yaml: No such file"):
        Config.load(tmp_path / "none.yaml")


ISSUER = """policies: p
claims: {department: string}
identity:
  jwt:
    - name: corp
      issuer: https://id.example.com
      audience: expertgate
"""


def test_an_issuer_needs_no_more_than_name_issuer_and_audience(load):
    (issuer,) = load(ISSUER).identity.jwt
    assert issuer.audience == ("expertgate",)
    assert issuer.algorithms == ("RS256", "ES256")
    assert (issuer.leeway_s, issuer.user, issuer.groups, issuer.claims) == (30, ("sub",), (), ())


def test_an_issuer_in_full(load, tmp_path):
    config = load(
        ISSUER.replace("audience: expertgate", "audience: [a, b]")
        + """
      jwks_file: jwks.json
      algorithms: [PS384, EdDSA]
      leeway_s: 0
      user: [act, sub]
      groups:
        - {claim: teams, prefix: team-}
        - claim: [realm_access, roles]
          values: {ds: research}
      claims: [department]
"""
    )
    (issuer,) = config.identity.jwt
    assert issuer.jwks_file == tmp_path / "jwks.json"
    assert (issuer.audience, issuer.user) == (("a", "b"), ("act", "sub"))
    assert [rule.claim for rule in issuer.groups] == [("teams",), ("realm_access", "roles")]


IN = "identity.jwt[0]"


@pytest.mark.parametrize(
    ("more", "fault"),
    [
        ("algorithms: [HS256]", f"8: {IN}.algorithms[0]: HS256 is no signature"),
        ("algorithms: [ES256, none]", f"8: {IN}.algorithms[1]: none is no signature"),
        ("algorithms: [rs256]", f"8: {IN}.algorithms[0]: must be 'RS256', "),
        ("algorithms: []", f"8: {IN}.algorithms: must name at least one"),
        ("algorithm: RS256", f"8: {IN}.algorithm: unknown key; did you mean algorithms?"),
        ("jwks_url: http://id.example.com/keys", f"8: {IN}.jwks_url: must be https://"),
        ("jwks_url: http://127.0.0.1.example.com/", f"8: {IN}.jwks_url: must be https://"),
        ("jwks_url: file:///etc/keys", f"8: {IN}.jwks_url: must be a URL"),
        ("jwks_url: https://", f"8: {IN}.jwks_url: must be a URL"),
        ("jwks_url: https://u:p@id.example.com/", f"8: {IN}.jwks_url: must have no user"),
        ("jwks_url: https://id.example.com:x/", f"8: {IN}.jwks_url: is no URL"),
        ("jwks_url: https://[id/", f"8: {IN}.jwks_url: is no URL"),
        ("leeway_s: 3600", f"8: {IN}.leeway_s: must be less than or equal to 300"),
        ("leeway_s: -1", f"8: {IN}.leeway_s: must be greater"),
        ("user: []", f"8: {IN}.user: must name at least one"),
        ("groups: {claim: a}", f"8: {IN}.groups: "),
        ("groups: [{}]", f"8: {IN}.groups[0].claim: is missing"),
        ("groups: [{claim: a, prefix: b, values: {c: d}}]", f"8: {IN}.groups[0]: has prefix and"),
        ("groups: [{claim: a, value: {c: d}}]", f"8: {IN}.groups[0].value: unknown key; did you"),
        (
            "groups: [{claim: a, values: {c: ''}}]",
            f"8: {IN}.groups[0].values.c: must have at least 1",
        ),
        ("claims: [level]", f"8: {IN}.claims[0]: 'level' has no type; give it one in"),
    ],
)
def test_every_fault_of_an_issuer_has_its_place(load, tmp_path, more, fault):
    with pytest.raises(ConfigError) as error:
        load(f"{ISSUER}      {more}\n")
    assert str(error.value).startswith(f"{tmp_path}/expertgate.yaml:{fault}")
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("      audience: expertgate\n", "", f"5: {IN}.audience: is missing"),
        ("audience: expertgate", "audience: []", f"7: {IN}.audience: must name at least one"),
        ("audience: expertgate", "audience: ''", f"7: {IN}.audience[0]: "),
        ("      issuer: https://id.example.com\n", "", f"5: {IN}.issuer: is missing"),
        ("    - name: corp\n      issuer:", "    - issuer:", f"5: {IN}.name: is missing"),
        ("name: corp", "name: Corp:a", f"5: {IN}.name: must match"),
        ("https://id.example.com", "corp", f"5: {IN}: has neither jwks_url nor jwks_file"),
        ("https://id.example.com", "http://id.example.com", f"5: {IN}: has neither jwks_url"),
        (
            "audience: expertgate",
            "audience: a\n      jwks_url: https://a.example\n      jwks_file: b",
            f"5: {IN}: has jwks_url and jwks_file; name one",
        ),
        (
            "audience: expertgate\n",
            "audience: a\n    - {name: corp, issuer: 'https://b.example', audience: a}\n",
            "3: identity: jwt has two issuers of the same name",
        ),
        (
            "audience: expertgate\n",
            "audience: a\n    - {name: b, issuer: 'https://id.example.com', audience: b}\n",
            "3: identity: jwt has two issuers of the same issuer",
        ),
    ],
)
def test_what_an_issuer_needs(load, tmp_path, old, new, fault):
    assert old in ISSUER
    with pytest.raises(ConfigError) as error:
        load(ISSUER.replace(old, new))
    assert str(error.value).startswith(f"{tmp_path}/expertgate.yaml:{fault}")


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (LEAST + "suspended: audit/suspended.yaml\n", "3: suspended: "),
        (LEAST + "suspended: other/suspended.yaml\n", "3: suspended: "),
        (LEAST + "audit: {path: .}\n", "1: suspended: "),
        (LEAST.replace("keys.yaml", "audit/keys.yaml"), "1: identity.api_keys: "),
    ],
)
def test_what_commands_change_stands_not_in_the_audit_logs_folder(load, tmp_path, text, fault):
    """The server has that folder locked, and so has whoever changes a file in it."""
    (tmp_path / "other").symlink_to("audit")
    with pytest.raises(ConfigError, match="stands in the folder of the audit log") as error:
        load(text)
    assert str(error.value).startswith(f"{tmp_path}/expertgate.yaml:{fault}")
    load(LEAST + "suspended: audit/suspended.yaml\naudit: {enabled: false}\n")


def test_a_limit_that_no_clock_can_count(load):
    with pytest.raises(ConfigError, match="tokens_per_minute: must be less than or equal to"):
        load(LEAST + f"limits: {{a: {{tokens_per_minute: 1{'0' * 400}}}}}\n")
