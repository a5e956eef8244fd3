"""`expertgate policy` and `expertgate experts`, as a user types them."""

import json

import pytest

from expertgate.model.catalogue import FILE_NAME, Catalogue
from expertgate.server import claim_options
from expertgate.server.cli import main
from expertgate.server.demo import DEMO
from tests.server.running import EXPERTS
from tests.server.sites import ALICE, NEWS, PUBLIC, RESEARCH

CONFIG = (
    "identity: {api_keys: keys.yaml}\n"
    "policies: policies\n"
    "catalogue: experts.json\n"
    "claims: {department: string, level: integer}\n"
)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "experts.json").write_text(json.dumps({"version": 1, "experts": EXPERTS}))
    (tmp_path / "expertgate.yaml").write_text(CONFIG)
    write(tmp_path / "policies", PUBLIC + ALICE + RESEARCH + NEWS)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(folder, rules):
    folder.mkdir(exist_ok=True)
    (folder / "all.cedar").write_text(rules)


@pytest.fixture
def run(folder, capsys):
    def _run(*arguments: str) -> tuple[int, str, str]:
        try:
            status = main(list(arguments)) or 0
        except SystemExit as stop:
            status = stop.code
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return _run


def cases(folder, text: str) -> str:
    (folder / "cases.yaml").write_text(text)
    return "cases.yaml"


def test_check(run, folder):
    status, out, _ = run("policy", "check")
    assert status == 0
    assert out.startswith("no fault found; policies: 4; experts: 4; version ")
    write(folder / "policies", PUBLIC + "\npermit(principal, action, resource == User::1);")
    status, _, err = run("policy", "check")
    assert status == 2
    assert err.startswith("expertgate: ")
    assert "all.cedar:3: " in err
    assert err.count("\n") == 1


def test_where_policies_and_experts_come_from(run, folder):
    given = ("--policies", "policies", "--catalogue", "experts.json")
    (folder / "expertgate.yaml").unlink()
    assert run("policy", "check", *given)[0] == 0
    assert "name their folder with --policies" in run("policy", "check", *given[2:])[2]
    for lacking in ((), given[:2]):
        err = run("policy", "check", *lacking)[2]
        assert err.startswith("expertgate: expertgate.yaml: No such file")
        assert "or give --catalogue and, for policies, --policies" in err
    (folder / "expertgate.yaml").write_text("policies: p\nidentity: {api_keys: k}\nmodel: a/b\n")
    assert "a/b is no folder here; name its experts.json" in run("policy", "check")[2]
    (folder / "expertgate.yaml").write_text(
        f"policies: policies\nidentity: {{api_keys: k}}\nmodel: {DEMO / 'model'}\n"
    )
    assert "the experts are public, formulary, cases" in run("policy", "check")[2]


def test_a_configuration_that_is_named_must_be_there(run, folder):
    given = ("--policies", "policies", "--catalogue", "experts.json", "--config", "typo.yaml")
    # Its claims and suspensions would be missing, and nobody told.
    assert run("policy", "check", *given) == (
        2,
        "",
        "expertgate: typo.yaml: No such file or directory\n",
    )


def test_cases_that_hold(run, folder):
    table = cases(
        folder,
        "- {principal: alice, granted: [public, math, code]}\n"
        "- {principal: dave, groups: [research], granted: [code, math, public], denied: [news]}\n"
        "- {principal: eve, denied: [math]}\n"
        "- {principal: eve, claims: {department: law}, granted: [public]}\n",
    )
    assert run("policy", "test", table) == (0, "4 of 4 cases hold\n", "")


def test_cases_in_one_line_are_all_decided(run, folder):
    table = cases(
        folder, '[{"principal": "eve", "granted": ["news"]}, {"principal": "eve", "denied": []}]'
    )
    assert "says neither" in run("policy", "test", table)[2]
    table = cases(
        folder,
        '[{"principal": "eve", "granted": ["news"]}, {"principal": "eve", "granted": ["public"]}]',
    )
    status, out, _ = run("policy", "test", table)
    assert (status, out.splitlines()[-1]) == (1, "1 of 2 cases hold")
    table = cases(folder, '[{"principal": "alice"}, {"principal": "eve"}]')
    write(folder / "new", PUBLIC)
    out = run("policy", "diff", "policies", "new", "--principals", table)[1]
    assert "- alice: loses math; no policy permits it" in out.splitlines()


def test_cases_that_do_not(run, folder):
    table = cases(
        folder,
        "- {principal: eve, granted: [public]}\n"
        "- case: an editor\n"
        "  principal: alice\n"
        "  granted: [public, math, news]\n"
        "- {principal: dave, groups: [research], denied: [math]}\n",
    )
    status, out, _ = run("policy", "test", table)
    assert status == 1
    assert out.splitlines() == [
        "cases.yaml:2: an editor",
        "  expected: math, news, public",
        "  got:      code, math, public",
        "  code is allowed: alice",
        "  news is denied: no-news",
        "cases.yaml:5: dave (research)",
        "  denied:   math",
        "  got:      code, math, public",
        "  math is allowed: research",
        "1 of 3 cases hold",
    ]


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "cases.yaml:1: is empty"),
        ("[]", "cases.yaml:1: is empty"),
        ("a: 1", "cases.yaml:1: must be a list, as [a, b]"),
        ("- {granted: [public]}", "cases.yaml:1: [0].principal: is missing"),
        ("- {principal: a}", "cases.yaml:1: says neither"),
        (
            "- {principal: a, granted: []}\n- {principal: a, denied: [nws]}",
            "cases.yaml:2: [1].denied: there is no expert 'nws', only public, math",
        ),
        ("- {principal: a, granted: [], grants: []}", "cases.yaml:1: [0].grants: unknown key"),
        (
            "- {principal: a, granted: [], claims: {departmnt: x}}",
            "cases.yaml:1: [0].claims.departmnt: is not declared under `claims:`",
        ),
        ("- {principal: a, granted: [], purpose: ''}", "cases.yaml:1: [0].purpose: has 1 to 256 "),
        ("- {principal: '', granted: []}", "cases.yaml:1: [0].principal: must have at least 1 "),
        ("- {principal: a, granted: [], address: 10}", "cases.yaml:1: [0].address: "),
        ("- {principal: a, granted: [], address: 1.2.3.4.5}", "cases.yaml:1: [0].address: "),
        ("- {principal: a, granted: [], time: 2026}", "cases.yaml:1: [0].time: "),
        ("- {principal: a, granted: [], time: noon}", "cases.yaml:1: [0].time: "),
        (
            "- {principal: a, granted: [], time: 0001-01-01T00:00:00+14:00}",
            "cases.yaml:1: [0].time: is no time in UTC",
        ),
        ("- {principal: a, granted: [], time: 2026-01-01T00:00:00}", "cases.yaml:1: [0].time: "),
        ("- {principal: 1, granted: []}", "cases.yaml:1: [0].principal: "),
        ("- {principal: a, granted: [}", "cases.yaml:1: "),
    ],
)
def test_a_malformed_table_has_its_place(run, folder, text, fault):
    status, out, err = run("policy", "test", cases(folder, text))
    assert (status, out) == (2, "")
    assert err.startswith(f"expertgate: {fault}")
    assert err.count("\n") == 1


def test_a_table_that_is_not_there(run):
    assert run("policy", "test", "none.yaml") == (
        2,
        "",
        "expertgate: none.yaml: No such file or directory\n",
    )


def test_a_case_has_a_time_where_policies_read_it(run, folder):
    rules = 'permit(principal, action, resource) when { context.time < datetime("2026-01-01") };'
    write(folder / "policies", rules)
    line = "- {principal: a, granted: [%s]%s}\n"
    every = "public, math, news, code"
    _, _, err = run("policy", "test", cases(folder, line % (every, "")))
    assert err == "expertgate: cases.yaml:1: [0]: a policy reads the clock, so say a `time:`\n"
    table = cases(
        folder,
        line % (every, ", time: 2025-12-31T23:59:59Z")
        + line % ("", ", time: 2026-01-01T00:00:00+00:00"),
    )
    assert run("policy", "test", table)[0] == 0


def test_explain(run):
    status, out, _ = run("policy", "explain", "--as", "dave", "--group", "research")
    assert status == 0
    assert out.splitlines() == [
        "public  allowed  public",
        "math    allowed  research",
        "news    denied   no-news",
        "code    allowed  research",
    ]
    _, out, _ = run("policy", "explain", "--as", "eve", "--experts", "math, public")
    assert out == "math    denied   no policy permits it\npublic  allowed  public\n"


CLAIMS = (
    PUBLIC + "permit(principal, action, resource) when {\n"
    '  context.claims has department && context.claims.department == "care" &&\n'
    "  context.claims has level && context.claims.level > 2 };\n"
)


def test_explain_with_claims(run, folder):
    write(folder / "policies", CLAIMS)
    asked = ("policy", "explain", "--as", "x", "--experts", "math", "--claim", "department=care")
    assert "allowed" in run(*asked, "--claim", "level=3")[1]
    assert "denied" in run(*asked, "--claim", "level=2")[1]
    assert "denied" in run(*asked)[1]
    for wrong, words in (
        ("level=high", "'level=high' is not of the type integer"),
        ("lvl=3", "the claim 'lvl' is not declared, only department, level"),
        ("level", "'level' is not NAME=VALUE"),
    ):
        status, _, err = run(*asked, "--claim", wrong)
        assert (status, err) == (2, f"expertgate: Invalid value for '--claim': {words}\n")


def test_claims_of_every_type():
    kinds = claim_options.declared(
        ["a:string", "b:integer", "c:boolean", "d:strings", "https://acme.example/d:string"]
    )
    assert kinds["https://acme.example/d"] == "string"
    texts = ["a=x=y", "b=-1", "c=true", "d=p,q", "https://acme.example/d=z"]
    assert claim_options.given(texts, kinds) == {
        "a": "x=y",
        "b": -1,
        "c": True,
        "d": ["p", "q"],
        "https://acme.example/d": "z",
    }


def test_claims_are_declared_where_there_is_no_configuration(run, folder):
    (folder / "expertgate.yaml").unlink()
    write(folder / "policies", CLAIMS)
    given = ("--policies", "policies", "--catalogue", "experts.json")
    given += ("--claims", "department:string", "--claims", "level:integer")
    assert run("policy", "check", *given)[0] == 0
    table = cases(
        folder,
        "- {principal: a, claims: {department: care, level: 3}, granted: [public, math,"
        " news, code]}\n- {principal: a, claims: {department: care}, granted: [public]}\n",
    )
    assert run("policy", "test", table, *given)[1] == "2 of 2 cases hold\n"
    for wrong in ("level", "level:number", ":string"):
        status, _, err = run("policy", "check", *given, "--claims", wrong)
        assert status == 2
        words = f"{wrong!r} is not NAME:TYPE, of string, integer, boolean, strings"
        assert err == f"expertgate: Invalid value for '--claims': {words}\n"


def test_a_claim_has_one_type_and_one_value(run, folder):
    # What is tried would be decided otherwise than by the server.
    status, _, err = run("policy", "check", "--claims", "level:string")
    assert status == 2
    assert err == (
        "expertgate: --claims level:string: expertgate.yaml declares that claim as integer\n"
    )
    assert run("policy", "check", "--claims", "level:integer", "--claims", "new:string")[0] == 0
    twice = ("--claims", "new:string", "--claims", "new:strings")
    assert "the claim 'new' is declared twice, as string too" in run("policy", "check", *twice)[2]
    asked = ("policy", "explain", "--as", "x", "--claim", "level=1", "--claim", "level=3")
    assert "the claim 'level' is given twice" in run(*asked)[2]


def test_a_claim_that_is_null_is_none_as_in_a_token(run, folder):
    write(folder / "policies", CLAIMS)
    table = cases(folder, "- {principal: a, claims: {department: null}, granted: [public]}\n")
    assert run("policy", "test", table)[1] == "1 of 1 cases hold\n"


def test_explain_in_a_context(run, folder):
    write(
        folder / "policies",
        "permit(principal, action, resource) when {\n"
        '  context has purpose && context.purpose == "care" && context has address &&\n'
        '  context.address.isInRange(ip("10.0.0.0/8")) && context.weekday == 1 };\n',
    )
    asked = ["policy", "explain", "--as", "x", "--experts", "math"]
    context = ["--purpose", "care", "--address", "10.1.1.1", "--time", "2026-11-23T10:00:00Z"]
    assert "allowed" in run(*asked, *context)[1]
    assert "denied" in run(*asked, *context[:-1], "2026-11-24T10:00:00Z")[1]
    for wrong in (
        ["--address", "ten"],
        ["--time", "noon"],
        ["--time", "2026-11-23T10:00:00"],
        ["--time", "0001-01-01T00:00:00+14:00"],
    ):
        status, _, err = run(*asked, *wrong)
        assert status == 2
        assert f"Invalid value for '{wrong[0]}': {wrong[1]!r} " in err
    assert "write 2026-11-23T00:00:00Z if UTC" in run(*asked, "--time", "2026-11-23")[2]
    assert "for '--experts': there is no expert 'meth'" in run(*asked[:-1], "meth")[2]
    # No request could ask so.
    assert "--purpose has 1 to 256 printable" in run(*asked, "--purpose", "")[2]
    assert "--as is empty" in run("policy", "explain", "--as", "")[2]


def test_diff_lists_who_gains_and_who_loses(run, folder):
    write(
        folder / "new",
        PUBLIC + RESEARCH.replace('"stem"', '"press"') + NEWS.replace("news", "code"),
    )
    table = cases(
        folder,
        "- {principal: alice, granted: [public]}\n"
        "- {principal: dave, groups: [research]}\n"
        "- {principal: eve}\n",
    )
    status, out, _ = run("policy", "diff", "policies", "new", "--principals", table)
    assert status == 3
    assert out.splitlines() == [
        "- alice: loses math; no policy permits it",
        "- alice: loses code; no-code",
        "+ dave (research): gains news, by research",
        "- dave (research): loses math; no policy permits it",
        "- dave (research): loses code; no-code",
    ]
    # Narrower is no alarm, nor is the same.
    write(folder / "new", PUBLIC)
    status, out, _ = run("policy", "diff", "policies", "new", "--principals", table)
    assert status == 0
    assert "+" not in out
    assert run("policy", "diff", "policies", "policies", "--principals", table) == (0, "", "")
    assert run("policy", "diff", "policies", "gone", "--principals", table)[0] == 2


def test_suspend_and_resume(run, folder):
    suspended = folder / "suspended.yaml"
    assert run("experts", "suspend", "news") == (0, "news is suspended\n", "")
    assert suspended.read_text() == "- news\n"
    assert run("experts", "suspend", "math")[0] == 0
    assert "was so before" in run("experts", "suspend", "news")[1]
    assert suspended.read_text() == "- math\n- news\n"
    assert run("experts", "resume", "news") == (0, "news is not suspended\n", "")
    assert "was not before" in run("experts", "resume", "news")[1]
    assert suspended.read_text() == "- math\n"
    asked = ("policy", "explain", "--as", "alice", "--experts", "public,math")
    assert run(*asked)[1] == "public  allowed  alice, public\nmath    denied   suspended\n"
    assert suspended.stat().st_mode & 0o777 == 0o644


def test_a_slip_suspends_nobody_and_says_so(run, folder):
    status, _, err = run("experts", "suspend", "nwes")
    assert status == 2
    assert "there is no expert 'nwes', only public, math, news, code" in err
    assert not (folder / "suspended.yaml").exists()
    (folder / "suspended.yaml").write_text("- [x]\n")
    status, _, err = run("experts", "suspend", "news")
    assert status == 2
    assert "suspended.yaml:1: [0]: " in err
    assert (folder / "suspended.yaml").read_text() == "- [x]\n"


def test_digests_are_those_that_a_catalogue_states(run):
    stated = Catalogue.read(DEMO / "model" / FILE_NAME).experts
    status, out, _ = run("experts", "digest", str(DEMO / "model"))
    assert status == 0
    assert out.splitlines() == [f"{expert.index}  {expert.sha256}" for expert in stated]
    status, _, err = run("experts", "digest", "nowhere")
    assert (status, err.count("\n")) == (2, 1)
    assert "nowhere" in err


def test_experts_are_listed_with_owner_and_state(run, folder):
    run("experts", "suspend", "news")
    assert run("experts", "list")[1].splitlines() == [
        "NAME    OWNER    STATE",
        "public  ai2      active",
        "math    acme     active",
        "news    courier  suspended",
        "code    quillon  active",
    ]
    catalogue = str(DEMO / "model" / FILE_NAME)
    assert "formulary" in run("experts", "list", "--catalogue", catalogue)[1]


def test_experts_are_listed_without_a_configuration_where_their_file_is_named(run, folder):
    listed = run("experts", "list")
    (folder / "expertgate.yaml").unlink()
    assert run("experts", "list", "--catalogue", "experts.json") == listed
    status, _, err = run("experts", "list")
    assert (status, err.count("\n")) == (2, 1)
    assert "or give --catalogue" in err
    # A switch must know which list the server reads.
    status, _, err = run("experts", "suspend", "news", "--catalogue", "experts.json")
    assert (status, err) == (2, "expertgate: expertgate.yaml: No such file or directory\n")


def test_a_claim_where_none_is_declared(run, folder):
    write(folder / "policies", PUBLIC)
    (folder / "expertgate.yaml").write_text(
        "identity: {api_keys: keys.yaml}\npolicies: policies\ncatalogue: experts.json\n"
    )
    _, _, err = run("policy", "explain", "--as", "x", "--claim", "level=3")
    assert err == (
        "expertgate: Invalid value for '--claim': the claim 'level' is not declared, and no other "
        "is; --claims declares one\n"
    )
