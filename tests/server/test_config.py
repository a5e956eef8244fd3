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
        ("policies: p\nidentity:\n", ["2: identity: must be a mapping of api_keys, anonymous"]),
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
            ["2: identity.anonymous: Input should be a valid boolean"],
        ),
        (LEAST + "port: 70000\n", ["3: port: Input should be less than or equal to 65535"]),
        (LEAST + "port: true\n", ["3: port: Input should be a valid integer"]),
        (LEAST + "claims: {a: text}\n", ["3: claims.a: Input should be 'string', 'integer'"]),
        (LEAST + "claims: {a b: string}\n", ["3: claims.a b"]),
        (LEAST + "model: 7\n", ["3: model: Input should be a valid string"]),
        (LEAST + "engine: [1]\n", ["3: engine: Input should be a valid dictionary"]),
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


def test_a_missing_file(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.yaml: No such file"):
        Config.load(tmp_path / "none.yaml")
