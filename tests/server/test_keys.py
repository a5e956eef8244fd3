import asyncio
import base64
import hashlib
import logging
import os
import stat
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from expertgate.server.key_edits import create_key, expire_key, revoke_key, rotate_key
from expertgate.server.keys import BadCredential, KeysError, KeyStore

SOON = datetime.now(UTC) + timedelta(days=1)
PAST = datetime.now(UTC) - timedelta(seconds=1)
HASH = "a" * 64
OTHER = "b" * 64


@pytest.fixture
def path(tmp_path):
    return tmp_path / "keys.yaml"


def fault(path, text: str) -> str:
    path.write_text(text)
    with pytest.raises(KeysError) as error:
        KeyStore(path)
    return str(error.value).removeprefix(f"{path}")


def look(store):
    """What has changed by the second look: the first only sees that something does."""
    return asyncio.run(store.refresh()) + asyncio.run(store.refresh())


def test_a_key_is_256_random_bits_and_only_its_hash_is_kept(path):
    secret = create_key(path, "alice", ["research", "staff"], SOON)
    assert secret.startswith("eg-")
    assert len(base64.urlsafe_b64decode(secret[3:] + "=")) == 32
    assert secret not in path.read_text()
    (entry,) = yaml.safe_load(path.read_text())
    assert entry["sha256"] == hashlib.sha256(secret.encode()).hexdigest()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert os.listdir(path.parent) == ["keys.yaml"]
    key = KeyStore(path).find(secret).key
    assert (key.id, key.groups) == ("alice", {"research", "staff"})


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
    assert KeyStore(path).find(secret).key.id == "alice"


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
    assert [store.find(secret).key.id for secret in secrets] == [f"user-{n}" for n in range(24)]


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
        KeyStore(path).find(secret)
    assert str(error.value) == ""


def test_the_hash_is_not_the_key(path):
    create_key(path, "alice", [], None)
    (entry,) = yaml.safe_load(path.read_text())
    with pytest.raises(BadCredential):
        KeyStore(path).find(entry["sha256"])


def test_an_expired_key_is_as_bad_as_a_wrong_one_and_the_log_knows_why(path, caplog):
    secret = create_key(path, "alice", [], PAST)
    with caplog.at_level(logging.INFO), pytest.raises(BadCredential) as error:
        KeyStore(path).find(secret)
    assert str(error.value) == ""
    assert "key alice, which is expired" in caplog.text
    assert secret not in caplog.text
    assert secret[3:10] not in caplog.text


def test_a_key_made_removed_or_changed_while_the_server_runs(path):
    alice = create_key(path, "alice", [], None)
    store = KeyStore(path)
    assert store.find(alice).key.groups == frozenset()

    bob = create_key(path, "bob", [], None)
    look(store)
    assert store.find(bob).key.id == "bob"

    entries = yaml.safe_load(path.read_text())
    entries[1]["groups"] = ["staff"]
    path.write_text(yaml.safe_dump(entries[1:]))
    look(store)
    assert store.find(bob).key.groups == {"staff"}
    with pytest.raises(BadCredential):
        store.find(alice)


def test_a_change_is_told_by_id_and_without_secrets(path):
    for user in ("alice", "bob", "carol"):
        create_key(path, user, ["staff"], None)
    store = KeyStore(path)
    assert look(store) == ()
    path.write_text(path.read_text() + "# nothing\n")
    assert look(store) == ()

    secret = rotate_key(path, "alice", timedelta(hours=1), None)
    entries = yaml.safe_load(path.read_text())
    entries[1]["groups"] = []
    path.write_text(yaml.safe_dump(entries[:2]))
    create_key(path, "dave", [], SOON)
    changes = look(store)
    assert [(change.id, change.secret) for change in changes] == [
        ("alice", True),
        ("bob", False),
        ("carol", True),
        ("dave", True),
    ]
    alice, bob, carol, dave = changes
    # A second may have begun between the two secrets.
    assert {**alice.before, "created": None} == {**alice.after, "created": None}
    assert (bob.before["groups"], bob.after["groups"]) == (["staff"], [])
    assert carol.before["groups"] == ["staff"]
    assert (carol.after, dave.before) == (None, None)
    assert datetime.fromisoformat(dave.after["expires"]) == SOON
    shown = str(changes)
    assert secret not in shown
    assert not any(entry["sha256"] in shown for entry in entries)
    path.write_text("broken: [")
    assert look(store) == ()


def test_what_is_being_written_is_not_read(path):
    """An empty file has no keys, and would end every request."""
    secret = create_key(path, "alice", [], None)
    store = KeyStore(path)
    text = path.read_text()
    for part in ("", text[:20], text):
        path.write_text(part)
        assert asyncio.run(store.refresh()) == ()
    assert asyncio.run(store.refresh()) == ()
    assert store.find(secret).key.id == "alice"


def test_a_large_file_stops_nobody_while_it_is_read(path):
    create_key(path, "alice", [], None)
    store = KeyStore(path)
    here, readers = threading.get_ident(), []
    parse = store._file._parse

    def noting(raw, at):
        readers.append(threading.get_ident())
        return parse(raw, at)

    store._file._parse = noting
    path.write_text("[]")
    assert [change.id for change in look(store)] == ["alice"]
    assert readers
    assert here not in readers


@pytest.mark.parametrize("broken", ["- id: [\n", "- id: alice\n", None])
def test_a_broken_or_missing_file_leaves_the_old_keys_in_force(path, caplog, broken):
    secret = create_key(path, "alice", [], None)
    store = KeyStore(path)
    good = path.read_text()
    path.unlink()
    if broken is not None:
        path.write_text(broken)
    for _ in range(2):
        look(store)
        assert store.find(secret).key.id == "alice"
    errors = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert len(errors) == 1  # once, not at every look
    assert "\n" not in errors[0].getMessage()

    path.write_text(good.replace("alice", "carol"))
    look(store)
    assert store.find(secret).key.id == "carol"


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
            look(store)
            assert store.find(alice).key.id == "alice"
    errors = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert len(errors) == 1
    look(store)
    with pytest.raises(BadCredential):
        store.find(alice)


def test_a_change_that_sets_time_and_size_back_is_seen(path):
    alice = create_key(path, "alice", [], None)
    store = KeyStore(path)
    before = path.stat()
    path.write_text("#" * (before.st_size - 1) + "\n")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_ino == before.st_ino
    look(store)
    with pytest.raises(BadCredential):
        store.find(alice)


# --- changed by command -----------------------------------------------------------------------

SPELLINGS = [
    pytest.param(
        f"# ours\n- id: bob  # é\n  sha256: {OTHER}  # his\n\n  # and hers\n"
        "- id: alice\n  sha256: {hash}  # new in May\n  groups: [staff]\n# the end\n",
        id="block",
    ),
    pytest.param("- {{id: alice, sha256: {hash}, groups: [staff]}}  # é\n", id="flow"),
    pytest.param('[{{"id": "alice", "sha256": "{hash}", "groups": ["staff"]}}]', id="json"),
    pytest.param(
        "-   sha256: '{hash}'\n    id: alice\n    groups:\n    - staff\n", id="hash first"
    ),
    pytest.param("- id: alice\r\n  groups: [staff]\r\n  sha256: {hash}\r\n", id="CRLF"),
    pytest.param("\ufeff- id: alice\n  groups: [staff]\n  sha256: {hash}\n", id="mark"),
    pytest.param("- id: alice\n  groups: [staff]\n  sha256: {hash}", id="no newline at the end"),
    pytest.param(
        "- id: alice\n  sha256: {hash}\n  groups: [staff]\n  previous:  # old ones\n"
        f"  - sha256: {OTHER.replace('b', 'c')}\n    expires: 2020-01-01T00:00:00Z  # long ago\n"
        "# kept\n- id: bob\n"
        f"  sha256: {OTHER}\n",
        id="with previous ones",
    ),
]


@pytest.fixture(params=SPELLINGS)
def spelt(request, path):
    """A file that someone wrote by hand, and alice's secret in it."""
    secret = "eg-" + "s" * 43
    text = request.param.format(hash=hashlib.sha256(secret.encode()).hexdigest())
    path.write_bytes(text.encode())
    return secret


def comments(path):
    return [line.split("#", 1)[1].strip() for line in path.read_text().splitlines() if "#" in line]


def others(path):
    return [entry for entry in yaml.safe_load(path.read_bytes()) if entry["id"] != "alice"]


def test_a_rotated_key_has_two_secrets_until_the_grace_ends(path, spelt):
    before = comments(path), others(path)
    new = rotate_key(path, "alice", timedelta(hours=24), None)
    store = KeyStore(path)
    for secret in (spelt, new):
        assert (store.find(secret).key.id, store.find(secret).key.groups) == ("alice", {"staff"})
    assert new not in path.read_text()
    said, kept = comments(path), others(path)
    assert kept == before[1]
    # What was said of a hash that is gone may go with it, and nothing else.
    assert set(before[0]) - set(said) <= {"long ago"}


def test_a_revoked_key_ends_with_all_its_secrets(path, spelt):
    before = comments(path), others(path)
    new = rotate_key(path, "alice", timedelta(hours=24), None)
    revoke_key(path, "alice")
    assert (set(before[0]) - set(comments(path)), others(path)) in [
        (set(), before[1]),
        ({"long ago"}, before[1]),
    ]
    store = KeyStore(path)
    for secret in (spelt, new):
        with pytest.raises(BadCredential):
            store.find(secret)
    # Its id is nobody else's, and it does not come back.
    for edit in (
        lambda: create_key(path, "alice", [], None),
        lambda: rotate_key(path, "alice", timedelta(), None),
        lambda: expire_key(path, "alice", SOON),
        lambda: revoke_key(path, "alice"),
    ):
        with pytest.raises(KeysError):
            edit()


def test_an_expiry_is_set_and_set_again(path, spelt):
    for when in (SOON, SOON + timedelta(days=1)):
        expire_key(path, "alice", when)
        assert KeyStore(path).find(spelt).key.expires == when
    expire_key(path, "alice", PAST)
    with pytest.raises(BadCredential):
        KeyStore(path).find(spelt)


def test_the_old_secret_ends_with_the_grace(path):
    old = create_key(path, "alice", [], None)
    new = rotate_key(path, "alice", timedelta(), None)
    with pytest.raises(BadCredential):
        KeyStore(path).find(old)
    assert KeyStore(path).find(new).key.id == "alice"
    # One that is at its end is no longer in the file; one that isn't goes on for as long as it had.
    newer = rotate_key(path, "alice", timedelta(hours=1), None)
    newest = rotate_key(path, "alice", timedelta(hours=2), None)
    store = KeyStore(path)
    assert {store.find(secret).key.id for secret in (new, newer, newest)} == {"alice"}
    (entry,) = yaml.safe_load(path.read_text())
    assert len(entry["previous"]) == 2
    ended = path.read_text().replace(str(entry["previous"][0]["expires"]), "2020-01-01T00:00:00Z")
    path.write_text(ended)
    store = KeyStore(path)
    with pytest.raises(BadCredential):
        store.find(new)
    assert {store.find(secret).key.id for secret in (newer, newest)} == {"alice"}


def test_without_a_grace_no_old_secret_goes_on(path):
    """As where one of them has leaked, whichever."""
    olds = [create_key(path, "alice", [], None), rotate_key(path, "alice", timedelta(days=7), None)]
    new = rotate_key(path, "alice", timedelta(), None)
    store = KeyStore(path)
    assert store.find(new).key.id == "alice"
    for old in olds:
        with pytest.raises(BadCredential):
            store.find(old)


def test_a_grace_is_not_longer_than_the_key_had_anyway(path):
    soon = datetime.now(UTC).replace(microsecond=0) + timedelta(hours=1)
    old = create_key(path, "alice", [], soon)
    rotate_key(path, "alice", timedelta(days=7), SOON)
    (entry,) = yaml.safe_load(path.read_text())
    assert datetime.fromisoformat(str(entry["previous"][0]["expires"])) == soon
    assert KeyStore(path).find(old).key.expires == SOON


def test_an_expired_key_is_rotated_only_to_a_new_end(path):
    old = create_key(path, "alice", [], PAST)
    with pytest.raises(KeysError, match="is expired"):
        rotate_key(path, "alice", timedelta(hours=24), None)
    new = rotate_key(path, "alice", timedelta(hours=24), SOON)
    assert KeyStore(path).find(new).key.id == "alice"
    with pytest.raises(BadCredential):  # an expired secret is not woken by the grace
        KeyStore(path).find(old)


def test_an_ended_key_that_is_rotated_wakes_none_of_its_old_secrets(path):
    oldest = create_key(path, "alice", [], None)
    old = rotate_key(path, "alice", timedelta(days=7), None)
    expire_key(path, "alice", PAST)
    new = rotate_key(path, "alice", timedelta(hours=24), SOON)
    assert KeyStore(path).find(new).key.id == "alice"
    for secret in (oldest, old):
        with pytest.raises(BadCredential):
            KeyStore(path).find(secret)


@pytest.mark.parametrize(
    "text",
    [
        f"- id: bob\n  sha256: {HASH}\n",
        "- id: alice\n",
        "",
    ],
)
def test_what_cannot_be_changed_is_left_alone(path, text):
    path.write_text(text)
    for edit in (
        lambda: rotate_key(path, "alice", timedelta(), None),
        lambda: expire_key(path, "alice", SOON),
        lambda: revoke_key(path, "alice"),
    ):
        with pytest.raises(KeysError, match=r"keys\.yaml"):
            edit()
        assert path.read_text() == text


def test_a_file_keeps_its_mode(path):
    create_key(path, "alice", [], None)
    path.chmod(0o640)
    rotate_key(path, "alice", timedelta(), None)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_a_file_keeps_its_owner_and_its_name_is_on_disk_before_the_key_is_told(path, monkeypatch):
    """A server of another user's could no longer read it, or a revoked key come back."""
    create_key(path, "alice", [], None)
    found, given, synced = path.stat(), [], []
    monkeypatch.setattr(os, "fchown", lambda _, *owner: given.append(owner))
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(os.fstat(file).st_ino))
    revoke_key(path, "alice")
    assert given == [(found.st_uid, found.st_gid)]
    assert synced == [path.stat().st_ino, path.parent.stat().st_ino]


def test_two_who_change_a_file_undo_nothing(path):
    users = [f"user-{n}" for n in range(8)]
    for user in users:
        create_key(path, user, [], None)
    with ThreadPoolExecutor(8) as pool:
        secrets = list(pool.map(lambda u: rotate_key(path, u, timedelta(), None), users))
    assert [KeyStore(path).find(secret).key.id for secret in secrets] == users


ENTRY = f"- id: a\n  sha256: {HASH}\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("keys: []\n", ":1: must be a list, as [a, b]"),
        ("- a\n", ":1: [0]: must be a mapping of id, sha256, groups, created, "),
        ("- id: a\n", ":1: [0].sha256: is missing"),
        (f"{ENTRY}  group: [x]\n", ":3: [0].group: unknown key; did you mean groups?"),
        (f"{ENTRY}- id: a\n  sha256: {'b' * 64}\n", ":3: [1].id: is that of entry [0] as well"),
        (f"{ENTRY}- id: b\n  sha256: {HASH}\n", ":4: [1].sha256: is that of entry [0] as well"),
        (f"- id: a\n  sha256: {HASH[:-1]}\n", ":2: [0].sha256: must match"),
        (f"- id: a\n  sha256: {HASH.upper()}\n", ":2: [0].sha256: must match"),
        (f'- id: a\n  sha256: "{HASH}\\n"\n', ":2: [0].sha256: must match"),
        (
            f"- id: 7\n  sha256: {HASH}\n",
            ":1: [0].id: must be text; quote what looks like a number",
        ),
        (f'- id: "a\\nb"\n  sha256: {HASH}\n', ":1: [0].id: must be printable text"),
        (f"{ENTRY}  groups: staff\n", ":3: [0].groups: must be a list, as [a, b]"),
        (
            f"{ENTRY}  groups: [1]\n",
            ":3: [0].groups[0]: must be text; quote what looks like a number",
        ),
        (f"{ENTRY}  expires: 2027-01-01T00:00:00\n", ":3: [0].expires: has no time zone; write "),
        (f"{ENTRY}  expires: 2027-01-01\n", ":3: [0].expires: has no time zone; write "),
        (f"{ENTRY}  expires: 9999-12-31T23:59:59-01:00\n", ":3: [0].expires: is no time in UTC"),
        (f"{ENTRY}  expires: soon\n", ":3: [0].expires: must be an ISO 8601 time"),
        # A number would be seconds since 1970 to a parser that guesses.
        (f"{ENTRY}  expires: 2027\n", ":3: [0].expires: must be an ISO 8601 time"),
        # Nothing at all could be read as "never", and as the opposite by the next reader.
        (f"{ENTRY}  expires:\n", ":3: [0].expires: must be an ISO 8601 time"),
        (f"{ENTRY}  revoked:\n", ":3: [0].revoked: must be an ISO 8601 time"),
        (f"{ENTRY}  revoked: true\n", ":3: [0].revoked: must be an ISO 8601 time"),
        (f"{ENTRY}  may_assert: 1\n", ":3: [0].may_assert: must be true or false"),
        (f"{ENTRY}  previous: [{{sha256: {OTHER}}}]\n", ":3: [0].previous[0].expires: is missing"),
        (
            f"{ENTRY}  previous: [{{sha256: {HASH}, expires: 2027-01-01T00:00:00Z}}]\n",
            ":3: [0].previous[0].sha256: is that of entry [0] as well",
        ),
        (f"- id: corp:a\n  sha256: {HASH}\n", ":1: [0].id: must not contain ':' or '/'"),
        (f"- id: portal/a\n  sha256: {HASH}\n", ":1: [0].id: must not contain ':' or '/'"),
        (f"- id: anonymous\n  sha256: {HASH}\n", ":1: [0].id: is what callers without"),
    ],
)
def test_a_fault_has_its_place(path, text, words):
    assert fault(path, text).startswith(words)


def test_a_missing_file_ends_the_start(path):
    with pytest.raises(KeysError, match=r"keys\.yaml: No such file"):
        KeyStore(path)


def fits_an_id(text):
    return text.isprintable() and text != "anonymous" and not set(text) & set(":/")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
@given(st.text(min_size=1, max_size=20).filter(fits_an_id), st.text(max_size=40))
def test_only_the_secret_opens(path, user, guess):
    path.unlink(missing_ok=True)
    secret = create_key(path, user, [user], None)
    store = KeyStore(path)
    assert (store.find(secret).key.id, store.find(secret).key.groups) == (user, {user})
    for wrong in (guess, secret + guess[:1] + "A", secret[:-1], secret.swapcase(), secret + " "):
        with pytest.raises(BadCredential):
            store.find(wrong)
