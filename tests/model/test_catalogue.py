import json

import pytest

from expertgate.model.catalogue import FILE_NAME, Catalogue, CatalogueError, load
from expertgate.model.checkpoint import Checkpoint
from tests.support.checkpoints import random_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return random_checkpoint(tmp_path_factory.mktemp("checkpoint"), num_experts=3, layers=2)


def entries(*names):
    return [{"index": i, "name": name} for i, name in enumerate(names)]


def write(tmp_path, content):
    path = tmp_path / FILE_NAME
    raw = content if isinstance(content, str | bytes) else json.dumps(content)
    path.write_bytes(raw.encode() if isinstance(raw, str) else raw)
    return path


GOOD = {"version": 1, "experts": entries("public", "math", "news")}


def test_what_is_written_is_read(tmp_path):
    catalogue = Catalogue.read(write(tmp_path, GOOD))
    catalogue.write(tmp_path / "again.json")
    assert Catalogue.read(tmp_path / "again.json") == catalogue


def test_names_and_indices(tmp_path):
    catalogue = Catalogue.read(write(tmp_path, GOOD))
    assert catalogue.index("news") == 2
    assert catalogue.index("absent") is None
    assert catalogue.names(catalogue.all) == ["public", "math", "news"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{\n", "experts.json:2: is not JSON"),
        (b"\xff", "is not UTF-8"),
        ("[" * 100_000, "is nested too deep"),
        ('{"version": ' + "1" * 5000 + "}", "digits"),
        ("[]", ": must be a mapping of version, experts"),
        ({"version": 2, "experts": entries("public")}, "version: "),
        ({"version": 1, "experts": []}, "names no expert"),
        ({"version": 1}, "experts: is missing"),
        ({**GOOD, "extra": 1}, "extra: unknown key"),
        (
            {"experts": [{"index": 0, "name": "public", "licence": "odc-by"}]},
            "experts[0].licence: unknown key; did you mean license?",
        ),
        # Readers differ in which of the two they take, and a policy may rest on it.
        (
            '{"experts": [{"index": 0, "name": "public", "tags": ["closed"], "tags": []}]}',
            ": tags: is given twice",
        ),
        ({"version": 1, "experts": entries("public", "Math")}, "experts[1].name: "),
        ({"version": 1, "experts": entries("public", "a" * 64)}, "experts[1].name: "),
        ({"version": 1, "experts": entries("public", "math\n")}, "experts[1].name: "),
        ({"version": 1, "experts": entries("public", "a", "a")}, "two experts have the name 'a'"),
        ({"version": 1, "experts": entries("math", "public")}, "must be called 'public'"),
        ({"version": 1, "experts": [{"index": 1, "name": "public"}]}, "it must be 0"),
        ({"version": 1, "experts": [{"index": 64, "name": "x"}]}, "experts[0].index: "),
        (
            {"version": 1, "experts": [{"index": 0, "name": "public", "sha256": "zz"}]},
            "experts[0].sha256: ",
        ),
        # Many a catalogue comes with a stranger's model, and is shown on terminals.
        (
            {"experts": [{"index": 0, "name": "public", "owner": "ai2\nready"}]},
            "experts[0].owner: must be printable text, in one line",
        ),
        (
            {"experts": [{"index": 0, "name": "public", "tags": ["\x1b[2J"]}]},
            "experts[0].tags[0]: must be printable text, in one line",
        ),
        (
            {"version": 1, "experts": entries(*["public"], *[f"e{i}" for i in range(64)])},
            "experts[64].index: ",
        ),
    ],
)
def test_what_does_not_fit_is_named_in_one_line(tmp_path, content, said):
    path = write(tmp_path, content)
    with pytest.raises(CatalogueError) as caught:
        Catalogue.read(path)
    assert said in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(CatalogueError, match="No such file"):
        Catalogue.read(tmp_path / "absent.json")


def test_without_a_file_nothing_is_guessed(folder):
    catalogue = load(Checkpoint(folder))
    assert catalogue.names(catalogue.all) == ["public", "expert-1", "expert-2"]


def test_the_catalogue_of_another_model_is_refused(folder, tmp_path):
    path = write(tmp_path, {"version": 1, "experts": entries("public", "math")})
    with pytest.raises(CatalogueError, match=r"names 2 experts, but .* has 3"):
        load(Checkpoint(folder), path)


def test_stated_digests_are_compared_with_the_weights(folder, tmp_path):
    checkpoint = Checkpoint(folder)
    digests = checkpoint.expert_digests(range(3))
    right = [{**e, "sha256": digests[e["index"]]} for e in GOOD["experts"]]
    load(checkpoint, write(tmp_path, {"version": 1, "experts": right}))
    swapped = [{**e, "sha256": digests[2 - e["index"]]} for e in GOOD["experts"]]
    with pytest.raises(CatalogueError, match=r"expert 'public' \(index 0\).*SHA-256"):
        load(checkpoint, write(tmp_path, {"version": 1, "experts": swapped}))
