"""What happens to running requests when what they were permitted upon changes."""

import asyncio
import contextlib
import errno
import json
import logging
import os
import threading
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from starlette.requests import HTTPConnection

from expertgate.model.catalogue import Catalogue
from expertgate.policies import cedar
from expertgate.policies.cedar import PolicySet
from expertgate.policies.context import Context
from expertgate.policies.expert_set import ExpertSet
from expertgate.policies.principal import Principal
from expertgate.server import answers, service, suspensions
from expertgate.server.changes import (
    CredentialsChanged,
    PoliciesLoaded,
    PoliciesRefused,
    Resumed,
    Suspended,
    Withdrawn,
)
from expertgate.server.errors import ApiError
from expertgate.server.file_edit import locked
from expertgate.server.grants import WithdrawnError
from expertgate.server.identity import Anonymous
from expertgate.server.key_edits import create_key, expire_key, revoke_key, rotate_key
from expertgate.server.namespaces import Namespaces
from expertgate.server.oversight import LOOK_EVERY_S, Oversight
from expertgate.server.plain_file import MAX_BYTES
from expertgate.server.policy_files import PolicyFiles
from expertgate.server.routes.generate import _GrantedStream
from expertgate.server.service import SUSPENDED
from expertgate.server.suspensions import SuspensionError
from expertgate.server.watched import WatchedFile
from tests.server.running import EXPERTS
from tests.server.sites import ALICE, NEWS, PUBLIC, REQUEST, RESEARCH, Site


@pytest.fixture
def site(tmp_path):
    return Site(tmp_path)


def test_a_grant_ends_when_policies_take_one_of_its_experts(site):
    async def story():
        wide, narrow = await site.ask("alice"), await site.ask("alice", "public", "math")
        other = await site.ask("dave")
        site.write(PUBLIC + ALICE + RESEARCH + NEWS)
        await site.look()
        assert [grant.withdrawn for grant in (wide, narrow, other)] == [True, False, False]
        with pytest.raises(WithdrawnError):
            wide.check()
        with pytest.raises(ApiError) as error:
            await site.ask("alice", "news")
        assert error.value.code == "expert_not_permitted"

    asyncio.run(story())
    assert Withdrawn(REQUEST, "alice", ("news",)) in site.changes
    assert any(isinstance(change, PoliciesLoaded) for change in site.changes)


def test_the_grant_is_asked_for_with_what_it_was_asked_with(tmp_path):
    rules = PUBLIC + ALICE.replace("resource)", 'resource) when { context.purpose == "care" }')
    rules = rules.replace("{ context.purpose", "{ context has purpose && context.purpose")
    site = Site(tmp_path, rules)
    connection = site.connection("alice")

    async def story():
        early = Context(datetime(2020, 1, 1, tzinfo=UTC), "care")
        grant = await site.service.permit(connection, early, None)
        site.write(f"// the same again\n{rules}")
        await site.look()
        assert not grant.withdrawn
        # As at the time when it was asked: time that passes is no change.
        site.write(
            f"{rules} forbid(principal, action, resource) "
            'when { context.time > datetime("2021-01-01") };'
        )
        await site.look()
        assert not grant.withdrawn
        site.write(rules.replace("care", "cure"))
        await site.look()
        assert grant.withdrawn

    asyncio.run(story())


def test_a_suspension_waits_for_no_policy(site, monkeypatch):
    """There may be more requests than decisions that are remembered, and each takes its time."""

    async def story():
        wide, narrow = await site.ask("alice"), await site.ask("dave")
        monkeypatch.setattr(PolicySet, "decide", None)
        await site.oversight.suspend("news")
        assert [grant.withdrawn for grant in (wide, narrow)] == [True, False]

    asyncio.run(story())


def test_a_change_of_policies_is_decided_beside_the_loop_for_however_many(site, monkeypatch):
    monkeypatch.setattr(cedar, "_CACHED_DECISIONS", 1)
    real, threads = PolicySet._decide, []

    def decide(*asked):
        threads.append(threading.current_thread())
        return real(*asked)

    async def story():
        wide, narrow = await site.ask("alice"), await site.ask("dave")
        monkeypatch.setattr(PolicySet, "_decide", decide)
        monkeypatch.setattr(Namespaces, "losses", lambda *_: ExpertSet(0))
        site.write(PUBLIC + ALICE + RESEARCH + NEWS)
        await site.look()
        assert [grant.withdrawn for grant in (wide, narrow)] == [True, False]

    asyncio.run(story())
    assert len(threads) == 2
    assert threading.main_thread() not in threads


def test_whatever_a_request_waits_for_it_ends_at_once(site):
    async def story():
        grant = await site.ask("alice")
        ended = []

        async def forever():
            try:
                await asyncio.Event().wait()
            finally:
                ended.append(True)

        async def request():
            async with grant.while_given():
                await forever()

        running = asyncio.create_task(request())
        await asyncio.sleep(0)
        site.write(PUBLIC)
        await site.look()
        with pytest.raises(WithdrawnError):
            await asyncio.wait_for(running, 20)
        assert ended
        with pytest.raises(WithdrawnError):  # nor does anything more begin on it
            async with grant.while_given():
                raise AssertionError

    asyncio.run(story())


@pytest.mark.parametrize("made", ["an answer", RuntimeError("of its own")])
def test_what_a_request_makes_of_being_ended_is_not_told(site, made):
    async def story():
        grant = await site.ask("alice")

        async def request():
            async with grant.while_given():
                try:
                    await asyncio.Event().wait()
                except asyncio.CancelledError:
                    if isinstance(made, Exception):
                        raise made from None
                return made

        running = asyncio.create_task(request())
        await asyncio.sleep(0)
        grant.withdraw()
        grant.withdraw()
        with pytest.raises(WithdrawnError):
            await asyncio.wait_for(running, 20)

    asyncio.run(story())


def test_nor_is_what_a_stream_makes_of_it(site):
    sent = []

    async def story():
        grant = await site.ask("alice")

        async def events():
            yield "data: before\n\n"
            grant.withdraw()
            yield "data: after\n\n"

        async def send(message):
            sent.append(message.get("body", b""))

        run = SimpleNamespace(
            grant=grant, headers={}, streamed=lambda code: sent.append(code.encode())
        )
        await _GrantedStream(events(), answers.ending, run, None).stream_response(send)

    asyncio.run(story())
    _, before, code, last = sent
    assert (before, code) == (b"data: before\n\n", b"expert_withdrawn")
    assert b'"code":"expert_withdrawn"' in last


def test_what_was_asked_before_and_granted_after_does_not_slip_through(site):
    """The body of a request may take long to come; its key is then another's, or nobody's."""

    async def story():
        connection = site.connection("alice")
        # As routes do before they read a body.
        connection.state.principal = await site.service.identity.identify(connection)
        context = Context.now()
        (site.folder / "keys.yaml").write_text("[]")
        await site.look()
        with pytest.raises(ApiError) as error:
            await site.service.permit(connection, context, None)
        assert error.value.status == 401

    asyncio.run(story())
    assert len(site.service.grants) == 0


def test_no_grant_outlives_its_key(site):
    async def story():
        alice, dave = await site.ask("alice"), await site.ask("dave")
        keys = site.folder / "keys.yaml"
        kept = keys.read_text()
        keys.write_text(yaml.safe_dump(yaml.safe_load(kept)[1:]))
        await site.look()
        assert (alice.withdrawn, dave.withdrawn) == (True, False)
        # Another's groups: whoever held the key is somebody else now.
        keys.write_text(kept.replace("research", "search"))
        await site.look()
        assert dave.withdrawn

    asyncio.run(story())
    assert Withdrawn(REQUEST, "dave", ("math", "code")) in site.changes


def test_a_key_that_expires_ends_what_runs(site):
    soon = datetime.now(UTC) + timedelta(seconds=2)
    keys = site.folder / "keys.yaml"
    site.keys["erin"] = create_key(keys, "erin", [], soon)
    site.keys["frank"] = create_key(keys, "frank", [], None)
    old = site.keys["frank"]
    new = rotate_key(keys, "frank", timedelta(seconds=2), None)

    async def story():
        await site.look()
        erin, frank = await site.ask("erin"), await site.ask("frank")
        site.keys["frank"] = new
        rotated = await site.ask("frank")
        await site.look()
        assert (erin.withdrawn, frank.withdrawn) == (False, False)
        while datetime.now(UTC) <= soon + timedelta(seconds=0.5):
            await asyncio.sleep(0.1)
        await site.oversight.look_at_ends()
        assert (erin.withdrawn, frank.withdrawn, rotated.withdrawn) == (True, True, False)
        site.keys["frank"] = old
        with pytest.raises(ApiError):
            await site.ask("frank")

    asyncio.run(story())


def test_a_key_whose_end_is_put_off_goes_on(site, monkeypatch):
    soon = datetime.now(UTC) + timedelta(hours=1)
    keys = site.folder / "keys.yaml"
    site.keys["erin"] = create_key(keys, "erin", [], soon)

    async def story():
        await site.look()
        grant = await site.ask("erin")
        expire_key(keys, "erin", soon + timedelta(days=1))
        await site.look()
        monkeypatch.setattr("expertgate.server.oversight.datetime", InTwoHours)
        await site.look()
        assert not grant.withdrawn

    asyncio.run(story())


class InTwoHours(datetime):
    @classmethod
    def now(cls, tz=None):
        return datetime.now(tz) + timedelta(hours=2)


def test_a_key_that_becomes_anothers_ends_what_it_began(site):
    """Its answers, and what is cached of them, are the first one's."""

    async def story():
        grant = await site.ask("dave")
        keys = site.folder / "keys.yaml"
        keys.write_text(keys.read_text().replace("dave", "erin"))
        await site.look()
        assert grant.withdrawn

    asyncio.run(story())


@pytest.mark.parametrize("taken", ["the key", "its word"])
def test_whom_a_gateway_named_ends_with_its_key(site, taken):
    keys = site.folder / "keys.yaml"
    secret = create_key(keys, "portal", [], None, may_assert=True)
    headers = [(b"authorization", f"Bearer {secret}".encode()), (b"x-forwarded-user", b"ada")]
    named = HTTPConnection({"type": "http", "headers": headers, "state": {}})

    async def story():
        await site.look()
        grant = await site.service.permit(named, Context.now(), None)
        assert grant.tenant == "portal/ada"
        if taken == "the key":
            revoke_key(keys, "portal")
        else:
            keys.write_text(keys.read_text().replace("may_assert: true", "may_assert: false"))
        await site.look()
        assert grant.withdrawn

    asyncio.run(story())


def test_who_cannot_be_judged_now_is_let_be(site):
    async def story():
        grant = await site.ask("alice")

        async def answer(connection):
            raise ApiError(status, "identity_unavailable", "the issuer doesn't answer")

        grant.basis = replace(grant.basis, principal=Principal("alice", via="jwt:corp"))
        site.service.identity = SimpleNamespace(identify=answer)
        status = 503
        await site.oversight.look_at_tokens()
        assert not grant.withdrawn
        status = 401
        await site.oversight.look_at_tokens()
        assert grant.withdrawn

    asyncio.run(story())


def salts(site, *names, tenant="alice"):
    experts = ExpertSet.of(site.service.catalogue.index(name) for name in names)
    return site.salts.salt(experts, tenant, None)


def test_what_an_open_request_loses_is_forgotten_with_it(site):
    async def story():
        grant = await site.ask("dave")
        before = salts(site, "math", tenant="dave")
        site.write(PUBLIC + ALICE)
        for _ in range(2):
            await site.oversight.look_at_policies()
        assert grant.withdrawn
        assert salts(site, "math", tenant="dave") != before

    asyncio.run(story())


def test_what_is_cached_with_a_lost_expert_is_never_found_again(site):
    def salted():
        return salts(site, "public", "news"), salts(site, "public", "math")

    async def story():
        before = salted()
        async with asyncio.timeout(20):
            # Nobody is here when the policies change, but somebody was.
            (await site.ask("alice", "public", "news")).close()
            (await site.ask("alice", "public", "math")).close()
            site.write(PUBLIC + ALICE + NEWS)
            await site.look()
            site.write(PUBLIC + ALICE)
            await site.look()
            (await site.ask("alice", "public", "news")).close()
        after = salted()
        assert after[0] != before[0]
        assert after[1] == before[1]  # whose experts nobody lost

    asyncio.run(story())


@pytest.mark.parametrize(
    "taken",
    [
        lambda text: text.replace("research", "search"),
        lambda text: text[: text.index("- id: dave")],
        lambda text: text.rstrip() + "\n  revoked: 2020-01-01T00:00:00Z\n",
        lambda text: text.rstrip() + "\n  expires: 2020-01-01T00:00:00Z\n",
    ],
    ids=["narrowed", "removed", "revoked", "expired"],
)
def test_what_was_cached_by_a_key_that_changed_is_never_found_again(site, taken):
    """Nobody of that key is here when it changes, and later it has back what it had."""
    keys = site.folder / "keys.yaml"
    kept = keys.read_text()

    def salted(*names):
        return [salts(site, *names, tenant=tenant) for tenant in ("dave", "dave/ada", "alice")]

    async def story():
        grant = await site.ask("dave")
        before = salted("public", "math"), salted("public")
        grant.close()
        keys.write_text(taken(kept))
        assert taken(kept) != kept
        await site.look()
        keys.write_text(kept)
        await site.look()
        (await site.ask("dave", "public", "math")).close()
        for old, new in zip(before, (salted("public", "math"), salted("public")), strict=True):
            # Of whom the key may speak for as well; and nobody else's.
            assert (old[0] != new[0], old[1] != new[1], old[2] == new[2]) == (True, True, True)

    asyncio.run(story())
    changed = next(change for change in site.changes if isinstance(change, CredentialsChanged))
    assert changed.vouchers == {"dave"}


def test_what_is_cached_is_out_of_reach_before_a_changed_key_is_believed(site, monkeypatch):
    """Whoever asks while open requests, with tokens of slow signatures, are judged."""
    keys = site.folder / "keys.yaml"

    async def slowly(grant):
        await asyncio.sleep(0.01)

    monkeypatch.setattr(site.oversight, "_judge", slowly)

    async def story():
        before = salts(site, "public", tenant="dave")
        keys.write_text(keys.read_text().replace("research", "search"))
        seen = []

        async def ask_all_the_time():
            while True:
                principal = (await site.ask("dave")).basis.principal
                if principal.groups == {"search"}:
                    seen.append(salts(site, "public", tenant="dave"))
                await asyncio.sleep(0)

        asking = asyncio.create_task(ask_all_the_time())
        await site.look()
        await asyncio.sleep(0.01)
        asking.cancel()
        assert seen
        assert before not in seen

    asyncio.run(story())


def test_what_an_open_request_cached_while_its_key_was_judged_is_not_found(site, monkeypatch):
    keys = site.folder / "keys.yaml"

    async def story():
        grant = await site.ask("dave")
        judge, late = site.oversight._judge, []

        async def slowly(found):
            # It is not withdrawn yet, and another prompt of it begins.
            late.append(salts(site, "public", "math", tenant="dave"))
            await judge(found)

        monkeypatch.setattr(site.oversight, "_judge", slowly)
        keys.write_text(keys.read_text().replace("research", "search"))
        await site.look()
        assert grant.withdrawn
        assert late
        assert salts(site, "public", "math", tenant="dave") not in late

    asyncio.run(story())


def test_where_not_all_is_remembered_all_is_forgotten(site, monkeypatch):
    monkeypatch.setattr("expertgate.server.namespaces._MANY", 1)

    async def story():
        before = salts(site, "news"), salts(site, "public")
        (await site.ask("alice", "public", "news")).close()
        (await site.ask("alice", "public", "math")).close()
        site.write(PUBLIC + ALICE + NEWS)
        await site.look()
        assert salts(site, "news") != before[0]
        assert salts(site, "public") == before[1]

    asyncio.run(story())


def test_what_new_policies_speak_of_and_nobody_has_is_logged(site, caplog):
    async def story():
        site.write('forbid(principal in Group::"nobodys", action, resource);')
        await site.look()
        assert not site.oversight.policy_fault

    asyncio.run(story())
    assert caplog.text.count('nobody is in Group::"nobodys"') == 1


def test_what_is_in_doubt_is_asked_once_policies_are_in_force(site, monkeypatch):
    """It may take long, or fail, and nobody keeps what was taken for so long."""
    in_force = []

    def doubts(policies, groups):
        in_force.append(site.service.policies is policies)
        raise RuntimeError

    monkeypatch.setattr(PolicySet, "doubts", doubts)

    async def story():
        wide = await site.ask("alice")
        site.write(PUBLIC)
        with pytest.raises(RuntimeError):
            await site.look()
        assert wide.withdrawn

    asyncio.run(story())
    assert in_force == [True]


@pytest.mark.parametrize(
    ("rules", "fault"),
    [
        ("permit(principal, action, resource) when { resource.ownr == 1 };", "all.cedar:1: attrib"),
        (PUBLIC + "\nforbid(", "all.cedar:3: unexpected end of input"),
        ("", "there is no policy"),
        (PUBLIC + 'forbid(principal, action, resource == Expert::"nws");', "all.cedar:2: there is"),
    ],
)
def test_a_broken_policy_leaves_the_old_set_in_force_and_says_where(site, caplog, rules, fault):
    async def story():
        before = site.service.policies
        grant = await site.ask("alice")
        site.write(rules)
        for _ in range(2):
            await site.look()
        assert site.service.policies is before
        assert not grant.withdrawn
        (change,) = site.changes
        assert change == PoliciesRefused(site.oversight.policy_fault, before.version)
        assert fault in change.fault
        (record,) = [r for r in caplog.records if r.levelno == logging.ERROR]
        assert fault in record.getMessage()
        assert "\n" not in record.getMessage()

        site.write(PUBLIC)
        await site.look()
        assert site.oversight.policy_fault == ""
        assert site.service.policies.version != before.version
        assert grant.withdrawn

    asyncio.run(story())


def test_half_of_what_is_being_written_is_not_put_in_force(site):
    """A policy that stands further down may be the one that forbids."""

    async def story():
        before = site.service.policies
        site.write(PUBLIC)
        await site.oversight.look_at_policies()
        with site.rules.open("a") as file:
            file.write(ALICE)
        await site.oversight.look_at_policies()
        with site.rules.open("a") as file:
            file.write(NEWS)
        await site.oversight.look_at_policies()
        assert site.service.policies is before
        await site.oversight.look_at_policies()
        assert site.service.policies is not before
        with pytest.raises(ApiError):
            await site.ask("alice", "news")

    asyncio.run(story())
    assert len(site.changes) == 1


def test_a_change_while_the_files_are_read_is_not_lost(site, monkeypatch):
    real = PolicyFiles.load

    def slow(files, running):
        found = real(files, running)
        if NEWS not in site.rules.read_text():
            site.write(PUBLIC + ALICE + NEWS)
        return found

    monkeypatch.setattr(PolicyFiles, "load", slow)

    async def story():
        site.write(PUBLIC + ALICE)
        await site.look()
        assert site.changes == []
        await site.look()
        with pytest.raises(ApiError):
            await site.ask("alice", "news")

    asyncio.run(story())


def test_links_that_are_turned_are_seen(tmp_path):
    """As Kubernetes replaces a ConfigMap: the files are links into a folder that is one itself."""
    for name, rules in {"old": PUBLIC + ALICE, "new": PUBLIC}.items():
        (tmp_path / "policies" / name).mkdir(parents=True)
        (tmp_path / "policies" / name / "all.cedar").write_text(rules)
        os.utime(tmp_path / "policies" / name / "all.cedar", (1, 1))
    data = tmp_path / "policies" / "..data"
    data.symlink_to("old")
    (tmp_path / "policies" / "all.cedar").symlink_to("..data/all.cedar")

    site = Site.__new__(Site)
    site.folder, site.rules = tmp_path, tmp_path / "policies" / "all.cedar"
    site.experts, site.suspended = tmp_path / "experts.json", tmp_path / "suspended.yaml"
    site.experts.write_text(json.dumps({"version": 1, "experts": EXPERTS}))
    site.keys = {"alice": create_key(tmp_path / "keys.yaml", "alice", [], None)}
    site.start()

    async def story():
        grant = await site.ask("alice")
        (tmp_path / "policies" / "..data_tmp").symlink_to("new")
        os.replace(tmp_path / "policies" / "..data_tmp", data)
        await site.look()
        assert grant.withdrawn

    asyncio.run(story())


def test_told_to_reload_it_does_changed_or_not(site):
    async def story():
        site.oversight.reload()
        await site.look()

    asyncio.run(story())
    (change,) = site.changes
    assert change == PoliciesLoaded(site.service.policies.version, site.service.policies.version)


def catalogue(**news):
    changed = [{**e, **news} if e["name"] == "news" else e for e in EXPERTS]
    return json.dumps({"version": 1, "experts": changed})


def test_a_catalogue_that_changes_is_a_change_of_policy(site):
    async def story():
        dave = await site.ask("dave")
        site.experts.write_text(catalogue(tags=["stem"]))
        await site.look()
        assert site.service.catalogue.experts == Catalogue.read(site.experts).experts
        assert not dave.withdrawn
        wider = await site.ask("dave")
        assert len(wider.experts) == 4
        site.experts.write_text(catalogue(tags=["press"]))
        await site.look()
        assert (dave.withdrawn, wider.withdrawn) == (False, True)
        before = site.service.policies.version
        # What an index stands for is the model's affair.
        site.experts.write_text(catalogue(name="novel"))
        await site.look()
        assert site.service.policies.version == before
        assert "restart the server" in site.oversight.policy_fault
        site.experts.unlink()
        await site.look()
        assert site.service.policies.version == before
        assert "experts.json: No such file" in site.oversight.policy_fault

    asyncio.run(story())


def test_a_suspended_expert_is_nobodys_and_its_cache_never_found(site):
    async def story():
        wide, narrow = await site.ask("alice"), await site.ask("alice", "public", "math")
        before = salts(site, "public", "news"), salts(site, "public", "math")
        assert await site.oversight.suspend("news")
        assert not await site.oversight.suspend("news")
        assert (wide.withdrawn, narrow.withdrawn) == (True, False)
        decision = site.service.decide(Principal("alice"), Context.now())
        assert decision.reasons["news"] == (SUSPENDED,)
        with pytest.raises(ApiError) as suspended:
            await site.ask("alice", "news")
        with pytest.raises(ApiError) as unknown:
            await site.ask("alice", "nwes")
        assert suspended.value.body() == json.loads(
            json.dumps(unknown.value.body()).replace("nwes", "news")
        )
        assert await site.oversight.resume("news")
        assert not await site.oversight.resume("news")
        (await site.ask("alice", "public", "news")).close()
        assert salts(site, "public", "news") != before[0]
        assert salts(site, "public", "math") == before[1]

    asyncio.run(story())
    assert site.changes == [
        Withdrawn(REQUEST, "alice", ("news",)),
        Suspended("news"),
        Resumed("news"),
    ]


def test_a_suspension_forgets_what_is_cached_where_nobody_uses_it_now(site):
    async def story():
        before = salts(site, "public", "news"), salts(site, "public", "math")
        await site.oversight.suspend("news")
        await site.oversight.resume("news")
        assert salts(site, "public", "news") != before[0]
        assert salts(site, "public", "math") == before[1]

    asyncio.run(story())


def test_public_can_be_suspended_as_any_other(site):
    async def story():
        await site.oversight.suspend("public")
        assert len((await site.ask("alice")).experts) == 3

    asyncio.run(story())


def test_suspensions_outlast_a_restart_and_are_seen_when_others_write_them(site):
    async def story():
        grant = await site.ask("alice")
        site.suspended.write_text("- news\n")
        await site.look()
        assert grant.withdrawn
        site.start()
        assert list(site.service.suspended) == [2]
        site.suspended.write_text("[]\n")
        await site.look()
        assert not site.service.suspended

    asyncio.run(story())


@pytest.mark.parametrize("broken", ["", "news", "- [news]\n", "- News\n", "a: [", None])
def test_a_broken_file_of_suspensions_resumes_nothing(site, caplog, broken):
    async def story():
        await site.oversight.suspend("news")
        await site.look()
        site.suspended.unlink()
        if broken is not None:
            site.suspended.write_text(broken)
        await site.look()
        assert list(site.service.suspended) == [2]
        assert "what was suspended stays so" in caplog.text

    asyncio.run(story())
    if broken is not None:
        with pytest.raises(SuspensionError, match=r"suspended\.yaml"):
            site.start()


def failing(monkeypatch, owner, name, times, error=None):
    """Makes a function fail so many times, as where a crowd has every file descriptor."""
    real, left = (
        getattr(owner, name),
        [error or OSError(errno.EMFILE, "Too many open files")] * times,
    )

    def sometimes(*arguments, **named):
        if left:
            raise left.pop()
        return real(*arguments, **named)

    monkeypatch.setattr(owner, name, sometimes)


def test_suspensions_that_cannot_be_read_are_read_again_until_they_can(site, monkeypatch, caplog):
    async def story():
        site.suspended.write_text("- news\n")
        failing(monkeypatch, Path, "read_bytes", 3)
        for _ in range(3):
            await site.oversight.look_at_suspensions()
        assert not site.service.suspended
        for _ in range(2):
            await site.oversight.look_at_suspensions()
        assert list(site.service.suspended) == [2]

    asyncio.run(story())
    assert caplog.text.count("what was suspended stays so") == 1
    assert "suspended.yaml: Too many open files" in caplog.text


@pytest.mark.parametrize(
    ("what", "expert", "changed", "left"),
    [
        ("suspend", "news", True, ["math", "news"]),
        ("suspend", "math", False, ["math"]),
        ("resume", "news", False, ["math"]),
        ("resume", "math", True, []),
    ],
)
def test_where_the_file_is_gone_a_switch_moves_one_expert_and_no_other(
    site, what, expert, changed, left
):
    """What is written anew must say as well what is held though its file is gone."""

    async def story():
        await site.oversight.suspend("math")
        site.suspended.unlink()
        await site.look()
        site.changes.clear()
        assert await getattr(site.oversight, what)(expert) == changed
        assert site.service.catalogue.names(site.service.suspended) == left

    asyncio.run(story())
    assert yaml.safe_load(site.suspended.read_text()) == left
    wanted = {"suspend": Suspended, "resume": Resumed}[what](expert)
    assert site.changes == ([wanted] if changed else [])


@pytest.mark.parametrize("what", ["suspend", "resume"])
def test_an_operator_is_not_told_what_is_not_in_force(site, monkeypatch, what):
    read = suspensions.read

    async def story():
        before = ["news"] if what == "resume" else []
        site.suspended.write_text(yaml.safe_dump(before))
        await site.look()
        # It is read once to be changed, and once more to be obeyed.
        answers = [read, unreadable]
        monkeypatch.setattr(suspensions, "read", lambda path: (answers or [read]).pop(0)(path))
        with pytest.raises(SuspensionError, match=r"suspended\.yaml: Too many open files"):
            await getattr(site.oversight, what)("news")
        assert site.service.catalogue.names(site.service.suspended) == before
        await site.look()
        assert site.service.catalogue.names(site.service.suspended) != before

    def unreadable(path):
        raise SuspensionError(f"{path}: Too many open files")

    asyncio.run(story())


@pytest.mark.parametrize("what", ["suspend", "resume"])
def test_an_operator_is_told_where_another_undid_it_at_once(site, monkeypatch, what):
    async def story():
        site.suspended.write_text("- news\n" if what == "resume" else "[]\n")
        await site.look()
        monkeypatch.setattr(suspensions, what, lambda path, expert, held: True)
        with pytest.raises(SuspensionError, match=r"suspended\.yaml: another has changed"):
            await getattr(site.oversight, what)("news")

    asyncio.run(story())


@pytest.mark.parametrize(
    ("owner", "name", "error"),
    [
        (Path, "read_text", None),
        (Path, "read_bytes", None),  # of the catalogue
        (PolicyFiles, "load", None),  # as where the folder can't be listed
        (threading.Thread, "start", RuntimeError("can't start new thread")),
    ],
)
def test_policies_that_cannot_be_read_are_read_again_until_they_can(
    site, monkeypatch, caplog, owner, name, error
):
    async def story():
        grant = await site.ask("alice")
        site.write(PUBLIC)
        failing(monkeypatch, owner, name, 3, error)
        for _ in range(5):
            with contextlib.suppress(OSError, RuntimeError):  # which the watch logs, and goes on
                await site.oversight.look_at_policies()
        assert grant.withdrawn
        assert site.oversight.policy_fault == ""
        assert sum(isinstance(change, PoliciesRefused) for change in site.changes) <= 1

    asyncio.run(story())


def test_where_nobody_can_tell_who_lost_what_all_is_forgotten(site, monkeypatch):
    async def story():
        before = salts(site, "public", "news")
        (await site.ask("alice", "public", "news")).close()
        failing(monkeypatch, Namespaces, "losses", 1)
        site.write(PUBLIC)
        await site.look()
        assert salts(site, "public", "news") != before

    asyncio.run(story())


def test_an_unknown_name_does_not_keep_the_others_from_being_suspended(site, caplog):
    site.suspended.write_text("- nwes\n- math\n")

    async def story():
        await site.look()
        assert list(site.service.suspended) == [1]
        assert "there is no expert 'nwes'" in caplog.text
        with pytest.raises(SuspensionError, match="there is no expert 'nwes', only public"):
            await site.oversight.suspend("nwes")

    asyncio.run(story())
    with pytest.raises(SuspensionError, match="there is no expert 'nwes'"):
        site.start()


def test_a_listener_that_fails_keeps_nothing_in_force(site):
    def fail(change):
        raise OSError("disk full")

    async def story():
        grants = [await site.ask("alice") for _ in range(3)]
        site.oversight.listeners.insert(0, fail)
        site.write(PUBLIC)
        await site.look()
        assert all(grant.withdrawn for grant in grants)

    asyncio.run(story())
    assert len(site.changes) == 4


def test_the_watch_looks_at_everything(site, monkeypatch):
    looks = {name for name in dir(Oversight) if name.startswith("look_at")}
    seen = set()

    async def story():
        every = asyncio.Event()

        async def look(name, *_):
            seen.add(name)
            if seen == looks:
                every.set()

        for name in looks:
            monkeypatch.setattr(site.oversight, name, partial(look, name))
        watching = asyncio.create_task(site.oversight.watch())
        await asyncio.wait_for(every.wait(), 60)
        watching.cancel()

    asyncio.run(story())


def test_the_watch_goes_on_after_a_look_that_fails(site, monkeypatch, caplog):
    async def story():
        grant = await site.ask("alice")
        real, failures = PolicyFiles.load, []

        def sometimes(files, running):
            if not failures:
                failures.append(True)
                raise ZeroDivisionError
            return real(files, running)

        monkeypatch.setattr(PolicyFiles, "load", sometimes)
        watching = asyncio.create_task(site.oversight.watch())
        site.write(PUBLIC + ALICE)
        while not failures:
            await asyncio.sleep(LOOK_EVERY_S)
        site.write(PUBLIC)
        began = time.monotonic()
        async with asyncio.timeout(60):
            while not grant.withdrawn:
                await asyncio.sleep(0.001)
        print(f"withdrawn {1000 * (time.monotonic() - began):.0f} ms after the file was written")
        watching.cancel()

    asyncio.run(story())
    assert "could not be looked at" in caplog.text


def test_a_suspension_does_not_wait_for_policies_that_take_long(site, monkeypatch):
    reached, go_on = threading.Event(), threading.Event()

    def slow(*_):
        reached.set()
        go_on.wait(60)
        return ExpertSet(0)

    monkeypatch.setattr(Namespaces, "losses", slow)

    async def story():
        alice, narrow = await site.ask("alice"), await site.ask("alice", "public", "code")
        dave = await site.ask("dave")
        watching = asyncio.create_task(site.oversight.watch())
        try:
            async with asyncio.timeout(60):
                site.write(PUBLIC + ALICE + RESEARCH + NEWS)
                while not reached.is_set():
                    await asyncio.sleep(LOOK_EVERY_S)
                assert (alice.withdrawn, narrow.withdrawn, dave.withdrawn) == (True, False, False)
                site.suspended.write_text("- math\n")
                while not site.service.suspended:
                    await asyncio.sleep(LOOK_EVERY_S)
                assert (narrow.withdrawn, dave.withdrawn) == (False, True)
        finally:
            go_on.set()
            watching.cancel()

    asyncio.run(story())


def test_nor_does_another_change_of_policies(site, monkeypatch):
    """Who lost what by the first is not known yet, and somebody may have it back by the second."""
    go_on = threading.Event()

    def slow(*_):
        go_on.wait(60)
        return ExpertSet(0)

    monkeypatch.setattr(Namespaces, "losses", slow)

    async def story():
        grant, before = await site.ask("dave"), salts(site, "public", "news")
        watching = asyncio.create_task(site.oversight.watch())
        try:
            async with asyncio.timeout(60):
                for loads, rules in ((1, PUBLIC + RESEARCH), (2, PUBLIC + ALICE)):
                    assert not grant.withdrawn
                    site.write(rules)
                    while site.loads < loads:
                        await asyncio.sleep(LOOK_EVERY_S)
                assert grant.withdrawn
                assert salts(site, "public", "news") != before
        finally:
            go_on.set()
            watching.cancel()

    asyncio.run(story())


def test_a_revoked_key_does_not_wait_for_an_issuer(site):
    """Whose keys, and all tokens that rest on them, take as long as they like to be judged."""
    reached = asyncio.Event()

    class Slow(Anonymous):
        async def refresh(self):
            reached.set()
            await asyncio.Event().wait()

    site.service.identity.sources = (Slow(), *site.service.identity.sources)

    async def story():
        grant = await site.ask("alice")
        watching = asyncio.create_task(site.oversight.watch())
        try:
            async with asyncio.timeout(60):
                await reached.wait()
                revoke_key(site.folder / "keys.yaml", "alice")
                while not grant.withdrawn:
                    await asyncio.sleep(LOOK_EVERY_S)
        finally:
            watching.cancel()

    asyncio.run(story())


def test_changes_are_seen_whatever_hangs_in_the_loops_own_threads(site):
    """Names of hosts are looked up there, such as an issuer's, and a resolver may hang."""
    go_on = threading.Event()

    async def story():
        loop = asyncio.get_running_loop()
        hanging = [loop.run_in_executor(None, go_on.wait) for _ in range(64)]
        alice, dave = await site.ask("alice"), await site.ask("dave")
        watching = asyncio.create_task(site.oversight.watch())
        try:
            async with asyncio.timeout(60):
                revoke_key(site.folder / "keys.yaml", "alice")
                while not alice.withdrawn:
                    await asyncio.sleep(LOOK_EVERY_S)
                site.write(PUBLIC)
                while not dave.withdrawn or site.oversight._lost_by is not None:
                    await asyncio.sleep(LOOK_EVERY_S)
                assert await site.oversight.suspend("math")
                assert await site.oversight.resume("math")
        finally:
            go_on.set()
            watching.cancel()
            await asyncio.gather(*hanging)

    asyncio.run(story())


@pytest.mark.parametrize(
    ("owner", "method", "what", "change"),
    [
        (PolicyFiles, "load", "policies", lambda site: site.write(PUBLIC)),
        (
            WatchedFile,
            "_read",
            "credentials",
            lambda site: revoke_key(site.folder / "keys.yaml", "alice"),
        ),
    ],
)
def test_what_takes_too_long_to_read_again_is_told_as_long_as_it_lasts(
    site, monkeypatch, owner, method, what, change
):
    """As from a network's disk whose server is gone; the rest is still seen."""
    reached, go_on, real = threading.Event(), threading.Event(), getattr(owner, method)

    def hang(*arguments):
        reached.set()
        go_on.wait(60)
        return real(*arguments)

    monkeypatch.setattr(owner, method, hang)
    monkeypatch.setattr(service, "_LATE_S", 0.1)
    site.service.handlers = object()

    async def story():
        watching = asyncio.create_task(site.oversight.watch())
        try:
            async with asyncio.timeout(60):
                change(site)
                while not reached.is_set():
                    await asyncio.sleep(LOOK_EVERY_S)
                while site.service.unready is None:
                    await asyncio.sleep(LOOK_EVERY_S)
                assert (
                    site.service.unready == f"{what} have changed, and can't be read to their end"
                )
                site.suspended.write_text("- math\n")
                while not site.service.suspended:
                    await asyncio.sleep(LOOK_EVERY_S)
                go_on.set()
                while site.service.unready is not None:
                    await asyncio.sleep(LOOK_EVERY_S)
        finally:
            go_on.set()
            watching.cancel()

    asyncio.run(story())


def test_a_switch_that_waits_for_anothers_edit_does_not_hold_up_the_end(site):
    async def story():
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.1):
                await site.oversight.suspend("math")

    ending = threading.Thread(target=asyncio.run, args=(story(),), daemon=True)
    with locked(site.suspended):
        ending.start()
        ending.join(30)
        assert not ending.is_alive()


def test_a_suspension_holds_though_policies_that_were_read_before_it_come_after(site, monkeypatch):
    """Policies are read while the expert is suspended, and permit it to more people."""
    reached, go_on = threading.Event(), threading.Event()
    real = PolicyFiles.load

    def slow(files, running):
        found = real(files, running)
        reached.set()
        go_on.wait(60)
        return found

    monkeypatch.setattr(PolicyFiles, "load", slow)

    async def story():
        watching = asyncio.create_task(site.oversight.watch())
        try:
            async with asyncio.timeout(60):
                site.write("permit(principal, action, resource);")
                while not reached.is_set():
                    await asyncio.sleep(LOOK_EVERY_S)
                site.suspended.write_text("- math\n")
                while not site.service.suspended:
                    await asyncio.sleep(LOOK_EVERY_S)
                go_on.set()
                while not site.loads:
                    await asyncio.sleep(LOOK_EVERY_S)
            assert list((await site.ask("dave")).experts) == [0, 2, 3]
        finally:
            go_on.set()
            watching.cancel()

    asyncio.run(story())


def test_a_grant_given_while_policies_are_read_is_judged_by_them(site, monkeypatch):
    real, given = PolicySet.decide, []

    async def story():
        loop = asyncio.get_running_loop()
        early = await site.ask("alice")

        def decide(policies, principal, context):
            found = real(policies, principal, context)
            if threading.current_thread() is not threading.main_thread() and not given:
                # Of the grants that there were; this one comes behind them, by the old policies.
                asking = asyncio.run_coroutine_threadsafe(site.ask("alice"), loop)
                given.append(asking.result(60))
            return found

        monkeypatch.setattr(PolicySet, "decide", decide)
        site.write(PUBLIC + ALICE + RESEARCH + NEWS)
        await site.look()
        assert [grant.withdrawn for grant in (early, *given)] == [True, True]

    asyncio.run(story())


def test_a_key_that_gets_an_end_while_policies_are_read_keeps_it(site, monkeypatch):
    real, soon = PolicyFiles.load, datetime.now(UTC) + timedelta(hours=1)
    keys = site.folder / "keys.yaml"

    async def story():
        loop = asyncio.get_running_loop()
        (source,) = site.service.identity.sources
        before = site.service.policies
        grant = await site.ask("dave")

        async def look_at_keys():
            for _ in range(2):
                await site.oversight.look_at(source)

        def load(files, running):
            found = real(files, running)
            expire_key(keys, "dave", soon)
            asyncio.run_coroutine_threadsafe(look_at_keys(), loop).result(60)
            return found

        monkeypatch.setattr(PolicyFiles, "load", load)
        site.write(PUBLIC + RESEARCH)
        for _ in range(2):
            await site.oversight.look_at_policies()
        assert site.service.policies is not before
        assert not grant.withdrawn
        monkeypatch.setattr("expertgate.server.oversight.datetime", InTwoHours)
        await site.oversight.look_at_ends()
        assert grant.withdrawn

    asyncio.run(story())


def test_a_grant_that_cannot_be_judged_is_withdrawn_and_the_others_are_judged(
    site, monkeypatch, caplog
):
    async def story():
        dave, wide = await site.ask("dave"), await site.ask("alice")
        narrow = await site.ask("alice", "public", "math")
        real = PolicySet.decide

        def decide(policies, principal, context):
            if principal.id == "dave":
                raise ZeroDivisionError
            return real(policies, principal, context)

        monkeypatch.setattr(PolicySet, "decide", decide)
        site.write(PUBLIC + ALICE + RESEARCH + NEWS)
        await site.look()
        assert [grant.withdrawn for grant in (dave, wide, narrow)] == [True, True, False]

    asyncio.run(story())
    assert Withdrawn(REQUEST, "dave", ("public", "math", "code")) in site.changes
    assert "ZeroDivisionError" in caplog.text


def test_one_whose_credential_cannot_be_judged_is_withdrawn_too(site, monkeypatch, caplog):
    async def story():
        dave, alice = await site.ask("dave"), await site.ask("alice")
        real = site.service.identity.identify

        async def identify(connection):
            if connection is dave.basis.connection:
                raise ZeroDivisionError
            return await real(connection)

        keys = site.folder / "keys.yaml"
        keys.write_text(keys.read_text().replace("research", "search") + "\n")
        monkeypatch.setattr(site.service.identity, "identify", identify)
        await site.look()
        assert (dave.withdrawn, alice.withdrawn) == (True, False)

    asyncio.run(story())
    assert "ZeroDivisionError" in caplog.text


@pytest.mark.parametrize("what", ["suspended", "rules", "experts"])
def test_a_pipe_in_the_place_of_a_file_holds_up_nothing(site, caplog, what):
    """Whoever opens one waits for somebody who writes."""
    path = getattr(site, what)

    async def story():
        await site.oversight.suspend("news")
        path.unlink()
        os.mkfifo(path)
        freeing = threading.Timer(10, lambda: os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK)))
        freeing.start()
        await site.look()
        freeing.cancel()
        assert list(site.service.suspended) == [2]
        assert f"{path}: must be a file" in caplog.text

    asyncio.run(story())


@pytest.mark.parametrize("what", ["suspended", "rules", "experts"])
def test_nor_does_one_that_is_far_too_large(site, caplog, what):
    path = getattr(site, what)

    async def story():
        await site.oversight.suspend("news")
        os.truncate(path, MAX_BYTES + 1)
        await site.look()
        assert list(site.service.suspended) == [2]
        assert f"{path}: has {MAX_BYTES + 1} bytes, and must have" in caplog.text

    asyncio.run(story())


def test_told_to_reload_while_it_does_it_still_puts_in_force_what_it_read(site, monkeypatch):
    """Whoever says it ever again, before the files are read, would keep a change from counting."""
    real = PolicyFiles.load

    def told_again(files, running):
        found = real(files, running)
        site.oversight.reload()
        return found

    monkeypatch.setattr(PolicyFiles, "load", told_again)

    async def story():
        grant = await site.ask("alice")
        site.write(PUBLIC)
        await site.look()
        assert grant.withdrawn
        loads = site.loads
        await site.look()  # as it was told to
        assert site.loads > loads

    asyncio.run(story())


@pytest.mark.parametrize("what", ["suspend", "resume"])
def test_a_link_that_leads_to_itself_is_told(site, what):
    site.suspended.symlink_to(site.suspended)

    async def story():
        with pytest.raises(SuspensionError, match=r"suspended\.yaml: Too many levels"):
            await getattr(site.oversight, what)("news")

    asyncio.run(story())
