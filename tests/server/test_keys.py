import base64
import hashlib
import logging
import os
import stat
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from expertgate.policies.principal import Principal
from expertgate.server import keys
from expertgate.server.keys import BadCredential, KeysError, KeyStore, create_key

SOON = datetime.now(UTC) + timedelta(days=1)
PAST = datetime.now(UTC) - timedelta(seconds=1)
HASH = "a" * 64


@pytest.fixture
def path(tmp_path):
    return tmp_path / "keys.yaml"


def fault(path, text: str) -> str:
    path.write_text(text)
    with pytest.raises(KeysError) as error:
        KeyStore(path)
    return str(error.value).removeprefix(f"{path}")


def wait_for_a_look() -> None:
    time.sleep(keys._LOOK_EVERY_S)


def test_a_key_is_256_random_bits_and_only_its_hash_is_kept(path):
    secret = create_key(path, "alice", ["research", "staff"], SOON)
    assert secret.startswith("eg-")
    assert len(base64.urlsafe_b64decode(secret[3:] + "=")) == 32
    assert secret not in path.read_text()
    (entry,) = yaml.safe_load(path.read_text())
    assert entry["sha256"] == hashlib.sha256(secret.encode()).hexdigest()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert os.listdir(path.parent) == ["keys.yaml"]
    assert KeyStore(path).principal_for(secret) == Principal(
        "alice", frozenset({"research", "staff"}), via="key"
    )


@pytest.mark.parametrize(
    "old",
    [
        f"# ours\n- id: bob  # the first\n  sha256: {HASH}\n",
        f"-   id: bob\n    sha256: {HASH}",  # no newline at the end
        f"  - id: bob\n    sha256: {HASH}\n",  # indented
        "# nobody yet\n",
        "",
    ],
)
def test_what_is_in_the_file_stays_as_it_is(path, old):
    path.write_text(old)
    secret = create_key(path, "alice", ["g"], None)
    assert path.read_text().startswith(old)
    assert KeyStore(path).principal_for(secret).id == "alice"


@pytest.mark.parametrize("old", ["[]\n", f"[{{id: b, sha256: {HASH}}}]\n", "- id: b\n", "a: 1\n",
                                 f"- id: alice\n  sha256: {HASH}\n",
                                 f"- id: b\n  sha256: {HASH}\n...\n"])  # fmt: skip
def test_a_file_that_cannot_be_added_to_is_left_alone(path, old):
    path.write_text(old)
    with pytest.raises(KeysError):
        create_key(path, "alice", [], None)
    assert path.read_text() == old


@pytest.mark.parametrize(
    ("user", "groups"),
    [("", []), ("a\nb", []), ("x" * 257, []), ("a", ["\x1b"]), ("\ud800", [])],
    ids=["empty", "newline", "long", "group", "surrogate"],
)
def test_ids_and_groups_fit_a_log_line(path, user, groups):
    with pytest.raises(KeysError, match=r"^(id|groups): "):
        create_key(path, user, groups, None)
    assert not path.exists()


def test_two_creators_lose_no_key(path):
    with ThreadPoolExecutor(8) as pool:
        secrets = list(pool.map(lambda n: create_key(path, f"user-{n}", [], None), range(24)))
    store = KeyStore(path)
    assert [store.principal_for(secret).id for secret in secrets] == [
        f"user-{n}" for n in range(24)
    ]


def test_a_failed_write_leaves_the_old_file_and_no_other(path, monkeypatch):
    create_key(path, "alice", [], None)
    old = path.read_text()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(KeysError, match="No space left"):
        create_key(path, "bob", [], None)
    assert path.read_text() == old
    assert os.listdir(path.parent) == ["keys.yaml"]


def test_a_linked_file_is_written_where_it_lies(path):
    (path.parent / "real.yaml").write_text("")
    path.symlink_to("real.yaml")
    create_key(path, "alice", [], None)
    assert path.is_symlink()
    assert "alice" in (path.parent / "real.yaml").read_text()


@pytest.mark.parametrize("secret", ["", "eg-", "eg-" + "A" * 43, "é", "\ud800", "x" * 100_000])
def test_wrong_keys(path, secret):
    create_key(path, "alice", [], None)
    with pytest.raises(BadCredential) as error:
        KeyStore(path).principal_for(secret)
    assert str(error.value) == ""


def test_the_hash_is_not_the_key(path):
    create_key(path, "alice", [], None)
    (entry,) = yaml.safe_load(path.read_text())
    with pytest.raises(BadCredential):
        KeyStore(path).principal_for(entry["sha256"])


def test_an_expired_key_is_as_bad_as_a_wrong_one_and_the_log_knows_why(path, caplog):
    secret = create_key(path, "alice", [], PAST)
    with caplog.at_level(logging.INFO), pytest.raises(BadCredential) as error:
        KeyStore(path).principal_for(secret)
    assert str(error.value) == ""
    assert "key alice, which expired" in caplog.text
    assert secret not in caplog.text
    assert secret[3:10] not in caplog.text


def test_a_key_made_removed_or_changed_while_the_server_runs(path):
    alice = create_key(path, "alice", [], None)
    store = KeyStore(path)
    assert store.principal_for(alice).groups == frozenset()

    bob = create_key(path, "bob", [], None)
    wait_for_a_look()
    assert store.principal_for(bob).id == "bob"

    entries = yaml.safe_load(path.read_text())
    entries[1]["groups"] = ["staff"]
    path.write_text(yaml.safe_dump(entries[1:]))
    wait_for_a_look()
    assert store.principal_for(bob).groups == {"staff"}
    with pytest.raises(BadCredential):
        store.principal_for(alice)


def test_changes_are_counted_whoever_looks_first(path):
    secret = create_key(path, "a", [], None)
    store = KeyStore(path)
    assert store.refresh() == store.refresh()
    seen = store.refresh()
    path.write_text("[]")
    # A request may be the first to look; whoever watches must not miss the change.
    wait_for_a_look()
    with pytest.raises(BadCredential):
        store.principal_for(secret)
    assert store.refresh() > seen
    seen = store.refresh()
    path.write_text("broken: [")
    assert store.refresh() == seen


@pytest.mark.parametrize("broken", ["- id: [\n", "- id: alice\n", None])
def test_a_broken_or_missing_file_leaves_the_old_keys_in_force(path, caplog, broken):
    secret = create_key(path, "alice", [], None)
    store = KeyStore(path)
    good = path.read_text()
    path.unlink()
    if broken is not None:
        path.write_text(broken)
    for _ in range(2):
        wait_for_a_look()
        assert store.principal_for(secret).id == "alice"
    errors = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert len(errors) == 1  # once, not at every look
    assert "\n" not in errors[0].getMessage()

    path.write_text(good.replace("alice", "carol"))
    wait_for_a_look()
    assert store.principal_for(secret).id == "carol"


def test_what_could_not_be_read_is_read_as_soon_as_it_can(path, monkeypatch, caplog):
    """Else a key that was revoked meanwhile would stay valid: nothing changes the file again."""
    alice = create_key(path, "alice", [], None)
    store = KeyStore(path)
    path.write_text("[]\n")
    with monkeypatch.context() as unreadable:

        def refuse(_):
            raise PermissionError(13, "Permission denied")

        unreadable.setattr(type(path), "read_bytes", refuse)
        for _ in range(3):
            wait_for_a_look()
            assert store.principal_for(alice).id == "alice"
    errors = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert len(errors) == 1
    wait_for_a_look()
    with pytest.raises(BadCredential):
        store.principal_for(alice)


def test_a_change_that_sets_time_and_size_back_is_seen(path):
    alice = create_key(path, "alice", [], None)
    store = KeyStore(path)
    before = path.stat()
    path.write_text("#" * (before.st_size - 1) + "\n")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_ino == before.st_ino
    wait_for_a_look()
    with pytest.raises(BadCredential):
        store.principal_for(alice)


ENTRY = f"- id: a\n  sha256: {HASH}\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("keys: []\n", ":1: Input should be a valid list"),
        ("- a\n", ":1: [0]: must be a mapping of id, sha256, groups, expires"),
        ("- id: a\n", ":1: [0].sha256: is missing"),
        (f"{ENTRY}  group: [x]\n", ":3: [0].group: unknown key; did you mean groups?"),
        (f"{ENTRY}- id: a\n  sha256: {'b' * 64}\n", ":3: [1].id: is that of entry [0] as well"),
        (f"{ENTRY}- id: b\n  sha256: {HASH}\n", ":4: [1].sha256: is that of entry [0] as well"),
        (f"- id: a\n  sha256: {HASH[:-1]}\n", ":2: [0].sha256: String should match"),
        (f"- id: a\n  sha256: {HASH.upper()}\n", ":2: [0].sha256: String should match"),
        (f'- id: a\n  sha256: "{HASH}\\n"\n', ":2: [0].sha256: String should match"),
        (f"- id: 7\n  sha256: {HASH}\n", ":1: [0].id: Input should be a valid string"),
        (f'- id: "a\\nb"\n  sha256: {HASH}\n', ":1: [0].id: must be printable text"),
        (f"{ENTRY}  groups: staff\n", ":3: [0].groups: Input should be a valid"),
        (f"{ENTRY}  groups: [1]\n", ":3: [0].groups[0]: Input should be a valid string"),
        (f"{ENTRY}  expires: 2027-01-01T00:00:00\n", ":3: [0].expires: has no time zone; write "),
        (f"{ENTRY}  expires: 2027-01-01\n", ":3: [0].expires: has no time zone; write "),
        (f"{ENTRY}  expires: soon\n", ":3: [0].expires: must be an ISO 8601 time"),
        # A number would be seconds since 1970 to a parser that guesses.
        (f"{ENTRY}  expires: 2027\n", ":3: [0].expires: must be an ISO 8601 time"),
    ],
)
def test_a_fault_has_its_place(path, text, words):
    assert fault(path, text).startswith(words)


def test_a_missing_file_ends_the_start(path):
    with pytest.raises(KeysError, match=r"keys\.yaml: No such file"):
        KeyStore(path)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
@given(st.text(min_size=1, max_size=20).filter(str.isprintable), st.text(max_size=40))
def test_only_the_secret_opens(path, user, guess):
    path.unlink(missing_ok=True)
    secret = create_key(path, user, [user], None)
    store = KeyStore(path)
    assert store.principal_for(secret) == Principal(user, frozenset({user}), via="key")
    for wrong in (guess, secret + guess[:1] + "A", secret[:-1], secret.swapcase(), secret + " "):
        with pytest.raises(BadCredential):
            store.principal_for(wrong)
