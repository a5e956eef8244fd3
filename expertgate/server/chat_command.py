"""`expertgate chat`: a conversation in the terminal, for trying things."""

import re
import sys
from typing import Any

import click
import httpx
import openai

_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_TURNS = "An empty line ends it; /experts NAMES asks others from here on."


def _url(_: click.Context, __: click.Parameter, value: str) -> str:
    if not value.startswith(("http://", "https://")):
        raise click.BadParameter(f"{value!r} must begin with http:// or https://")
    return value.rstrip("/").removesuffix("/v1")  # OpenAI's clients are given it with this


def _header(_: click.Context, __: click.Parameter, value: str | None) -> str | None:
    if value is not None and not _fits_header(value):
        raise click.BadParameter("must be printable ASCII")
    return value


def _fits_header(text: str) -> bool:
    return text.isascii() and text.isprintable()


@click.command()
@click.option(
    "--url", default="http://127.0.0.1:8000", show_default=True, callback=_url, help="The server."
)
@click.option(
    "--key",
    envvar="EXPERTGATE_KEY",
    prompt="key",
    hide_input=True,
    callback=_header,
    help="Your credential. Default: the variable EXPERTGATE_KEY, else it is asked for.",
)
@click.option(
    "--experts",
    callback=_header,
    help="Who may speak: public,math or -news. Default: all you may ask.",
)
@click.option("--max-tokens", default=256, show_default=True, type=click.IntRange(1))
@click.option(
    "--temperature",
    default=0.0,
    show_default=True,
    type=click.FloatRange(0, 2),
    help="At 0 the likeliest answer, each time the same.",
)
def chat(url: str, key: str, experts: str | None, max_tokens: int, temperature: float) -> None:
    """Talk to the model of a running server.

    Exit status 1 where nothing that was said got an answer.
    """
    api = openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)
    try:
        model = api.models.list().data[0].id
    except openai.APIConnectionError:
        raise click.ClickException(f"nothing answers at {url}; is the server running?") from None
    except openai.APIStatusError as error:
        raise click.ClickException(_words(error)) from None
    # Of what isn't the answer that it awaits, the client makes errors of Python's own kinds.
    except (openai.APIError, AttributeError, LookupError, TypeError, ValueError):
        words = f"what answers at {url} serves no model; is it the server?"
        raise click.ClickException(words) from None
    click.echo(f"{model} at {url}. {_TURNS}")
    messages: list[Any] = []
    failed = False
    while said := _ask():
        if said.startswith("/"):
            command, _, names = said.partition(" ")
            if command == "/experts" and _fits_header(names):
                experts = names.strip() or None
            else:
                # A slip, sent as a message, would be answered by experts that weren't meant.
                click.echo("the only command is /experts NAMES, as in /experts public", err=True)
            continue
        messages.append({"role": "user", "content": said})
        try:
            answer = _answer(api, model, messages, experts, max_tokens, temperature)
        except openai.APIError as error:
            words = _words(error)
        except httpx.HTTPError as error:
            words = f"the connection broke: {error}"
        else:
            messages.append({"role": "assistant", "content": answer})
            continue
        click.echo(words, err=True)
        messages.pop()
        failed = True
    if failed and not messages:
        sys.exit(1)


def _ask() -> str:
    try:
        return input("> ").strip()
    except (EOFError, KeyboardInterrupt):
        return ""


def _answer(
    api: openai.OpenAI,
    model: str,
    messages: list[Any],
    experts: str | None,
    max_tokens: int,
    temperature: float,
) -> str:
    """Prints the answer as it comes, and who spoke. Raises openai.APIError."""
    text = ""
    used: dict[str, Any] = {}
    with api.chat.completions.create(
        model=model,
        messages=messages,
        max_tokens=max_tokens,
        temperature=temperature,
        stream=True,
        stream_options={"include_usage": True},
        extra_headers={} if experts is None else {"X-Experts": experts},
    ) as stream:
        for chunk in stream:
            part = chunk.choices[0].delta.content or "" if chunk.choices else ""
            text += part
            # An expert may have learnt what a terminal takes for orders.
            print(_CONTROLS.sub(lambda found: ascii(found[0])[1:-1], part), end="", flush=True)
            used = (chunk.model_extra or {}).get("experts", used)
    print(flush=True)  # whoever reads the answers alone has each in lines of its own
    print(f"[{', '.join(used.get('effective', []))}]", file=sys.stderr)
    return text


def _words(error: openai.APIError) -> str:
    body = error.body
    return str(body["message"]) if isinstance(body, dict) and "message" in body else str(error)
