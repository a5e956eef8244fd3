"""`expertgate audit`, as an operator calls it."""

import errno
import json
import os

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from expertgate.server.audit.chain import digest, line_of
from expertgate.server.cli import main
from tests.server.audit.logs import write_log


@pytest.fixture
def call(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        status = main(["audit", *map(str, arguments)])
        out, err = capsys.readouterr()
        return status or 0, out, err

    return call


@pytest.fixture
def folder(tmp_path):
    return write_log(tmp_path, 12)


@pytest.fixture
def key(call, tmp_path, folder):
    path = tmp_path / "keys.json"
    path.write_text(call("public-key", tmp_path / "key.pem")[1])
    return path


def test_a_log_that_holds(call, folder, key):
    status, out, err = call("verify", folder, "--key", key, "--head", folder / "head.json")
    assert (status, err) == (0, "")
    assert "15 records in 1 file: 1 to 15" in out
    assert "3 signatures hold; 0 records since the last head" in out


def test_a_log_that_does_not_hold_has_a_line_for_each_fault(call, folder, key):
    (path,) = folder.glob("*.jsonl")
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:3] + lines[5:14]))
    status, out, err = call("verify", folder, "--key", key)
    assert (status, out) == (1, "")
    cut = "record 15 was signed, but the log ends at record 14: its end was cut off"
    assert err.splitlines() == [
        f"expertgate: {path}:4: records 4 to 5 are missing before this one",
        f"expertgate: {folder}/head.json: {cut}",
    ]


@pytest.mark.parametrize("kind", ["request", "recovered", "gap", "head"])
def test_what_a_record_says_stays_within_its_line(call, folder, key, kind):
    """Behind the last head anybody may have written it, for whoever reads what is told of it."""
    last = max(folder.glob("*.jsonl"))
    raw = last.read_bytes()
    lies = "\x1b[2K\n9 signatures hold; 0 records since the last head"
    names = ("time", "after", "torn_bytes", "kept_as", "lost", "key")
    before = raw.splitlines()[-1]
    place = {"seq": json.loads(before)["seq"] + 1, "prev": digest(before)}
    record = {**dict.fromkeys(names, lies), "kind": kind, "v": 1, **place}
    last.write_bytes(raw + line_of(record) + b"\n")
    status, out, err = call("verify", folder, "--key", key)
    assert status == (kind == "head")
    lines = (out + err).strip("\n").split("\n")
    assert all(map(str.isprintable, lines))
    assert not any(line.startswith("9 signatures") for line in lines)


def test_without_a_key_it_says_that_signatures_were_not_checked(call, folder):
    status, out, err = call("verify", folder)
    assert (status, err) == (0, "")
    assert "NO SIGNATURE WAS CHECKED" in out
    assert "hold" not in out


def test_a_key_is_made_once_and_shown_alike(call, tmp_path):
    status, out, _ = call("keygen", "new.pem")
    assert status == 0
    (jwk,) = json.loads(out)["keys"]
    assert (jwk["kty"], jwk["crv"]) == ("OKP", "Ed25519")
    assert "d" not in jwk
    assert call("public-key", "new.pem")[1] == out
    status, _, err = call("keygen", "new.pem")
    assert (status, err) == (2, "expertgate: new.pem: File exists\n")


def test_half_a_key_is_not_left_behind(call, tmp_path, monkeypatch):
    """A server would make none where there is one, and could not use it."""

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as context:
        context.setattr(os, "fsync", full)
        status, _, err = call("keygen", "new.pem")
    assert (status, err) == (2, "expertgate: new.pem: No space left on device\n")
    assert call("keygen", "new.pem")[0] == 0


def test_a_public_key_in_pem_serves_as_well(call, folder, tmp_path):
    from tests.server.audit.logs import signing_key

    pem = (
        signing_key(tmp_path)
        .private.public_key()
        .public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    )
    (tmp_path / "pub.pem").write_bytes(pem)
    assert call("verify", folder, "--key", "pub.pem")[0] == 0


_ED25519 = Ed25519PrivateKey.generate()
_SEALED = _ED25519.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"x"))
_EC = generate_private_key(SECP256R1())


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is neither PEM nor JSON"),
        (b"\xff\xfe", "is neither PEM nor JSON"),
        (b"[]", "is neither a JSON Web Key nor a set of them"),
        (b'{"keys": []}', "is neither a JSON Web Key nor a set of them"),
        (b'{"keys": [7]}', "keys[0] is not an Ed25519 JSON Web Key"),
        (b'{"kty": "oct", "k": "x"}', "keys[0] is not an Ed25519 JSON Web Key"),
        (b'{"kty": "OKP", "crv": "Ed25519", "x": "short"}', "keys[0] is not an Ed25519"),
        (b'{"kty": "OKP", "crv": "Ed25519", "x": 7}', "keys[0] is not an Ed25519"),
        (b"-----BEGIN NONSENSE-----\n", "is not a public key in PEM"),
        (
            _EC.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo),
            "is not an Ed25519 key",
        ),
        (b"[" * 70_000, "a key has fewer"),
        (b"[" * 60_000, "is neither PEM nor JSON"),
    ],
)
def test_a_file_that_is_no_public_key(call, folder, tmp_path, content, words):
    (tmp_path / "bad").write_bytes(content)
    status, out, err = call("verify", folder, "--key", "bad")
    assert (status, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert err.startswith("expertgate: bad: ")
    assert words in err


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not an unencrypted private key"),
        (b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n", "not an unencrypted"),
        (_SEALED, "not an unencrypted"),
        (_EC.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()), "not an Ed25519"),
    ],
)
def test_a_file_that_is_no_signing_key(call, tmp_path, content, words):
    (tmp_path / "bad").write_bytes(content)
    status, _, err = call("public-key", "bad")
    assert status == 2
    assert len(err.splitlines()) == 1
    assert words in err


_HEAD = b'{"key":"x","kind":"head","prev":"","seq":1,"signature":"","time":"","v":1,"z":%s}'


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{}",
        b"[]",
        b'{"kind":"request"}',
        b"\xff",
        _HEAD % b"9999999999999999",
        _HEAD % b"NaN",
        _HEAD % b'"\\ud800"',
        _HEAD % (b"[" * 200_000 + b"]" * 200_000),
        *(_HEAD % (b"[" * depth + b"]" * depth) for depth in (700, 900)),
        b'{"kind":"request","prev":"","seq":1,"time":"","v":1}',
    ],
)
def test_a_head_that_is_none(call, folder, tmp_path, content):
    (tmp_path / "bad").write_bytes(content)
    status, _, err = call("verify", folder, "--head", "bad")
    assert status == 2
    assert err.startswith("expertgate: bad: ")
    (folder / "head.json").write_bytes(content)
    assert call("verify", folder)[0] == 2


def test_nothing_there(call, tmp_path):
    for arguments in (("verify", "none"), ("verify", "."), ("public-key", "none.pem")):
        status, _, err = call(*arguments)
        assert status == 2
        assert len(err.splitlines()) == 1
