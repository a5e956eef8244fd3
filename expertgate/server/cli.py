"""The command line. A user's mistake is one line on stderr and exit status 2."""

import sys
from pathlib import Path
from typing import Any

import click

import expertgate
from expertgate.model.catalogue import CatalogueError
from expertgate.model.checkpoint import CheckpointError
from expertgate.policies.statement import PolicyError
from expertgate.server.audit.chain import AuditError
from expertgate.server.audit.command import audit
from expertgate.server.audit.receipts_command import receipts
from expertgate.server.audit.usage_command import usage
from expertgate.server.beside import leave
from expertgate.server.cases import CasesError
from expertgate.server.chat_command import chat
from expertgate.server.config import CONFIG_FILE, Config, ConfigError
from expertgate.server.experts_command import experts
from expertgate.server.failures import EngineError, ProofError
from expertgate.server.jwks import JwksError
from expertgate.server.keys import KeysError
from expertgate.server.keys_command import keys
from expertgate.server.listening import ListenError
from expertgate.server.policy_command import policy
from expertgate.server.refusals import SettingError
from expertgate.server.suspensions import SuspensionError

_MISTAKES = (
    AuditError,
    ListenError,
    CasesError,
    CatalogueError,
    CheckpointError,
    ConfigError,
    JwksError,
    KeysError,
    PolicyError,
    SettingError,
    SuspensionError,
)


class _Mistake(click.ClickException):
    exit_code = 2


class _WithEngineFlags(click.Command):
    """Keeps what stands behind `--` for vLLM's own parser."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        split = args.index("--") if "--" in args else len(args)
        ctx.obj = args[split + 1 :]
        return super().parse_args(ctx, args[:split])


_config = click.option(
    "--config",
    "path",
    type=click.Path(path_type=Path),
    help=f"Who may ask, and what: a YAML file. Default: {CONFIG_FILE}.",
)


@click.group()
@click.version_option(expertgate.__version__)
def cli() -> None:
    """Serve FlexOlmo mixtures of experts, each request with the experts its user may consult."""


cli.add_command(experts)
cli.add_command(audit)
cli.add_command(chat)
cli.add_command(keys)
cli.add_command(policy)
cli.add_command(receipts)
cli.add_command(usage)


@cli.command(
    cls=_WithEngineFlags,
    options_metavar="[OPTIONS]",
    epilog="Behind `--`, vLLM's own flags: expertgate serve ./checkpoint -- --max-model-len 2048",
)
@click.argument("model", required=False)
@_config
@click.option("--host", help="Address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), help="Port to listen on.")
@click.pass_obj
def serve(
    flags: list[str], model: str | None, path: Path | None, host: str | None, port: int | None
) -> None:
    """Serve MODEL: a checkpoint folder, or a Hub id. The configuration may name it instead."""
    config = _load(path)
    from expertgate.server.serving import serve_config  # after --help, which needs none of it

    serve_config(config, model=model, host=host, port=port, flags=flags)
    leave()


@cli.command(
    cls=_WithEngineFlags,
    options_metavar="[OPTIONS]",
    epilog="Behind `--`, vLLM's own flags, as of `serve`.",
)
@click.argument("model", required=False)
@_config
@click.pass_obj
def check(flags: list[str], model: str | None, path: Path | None) -> None:
    """Check everything that `serve` would read, without serving.

    The configuration, the checkpoint and its catalogue, keys, policies, suspensions, certificates
    and the engine's arguments. A model of the Hub is fetched; weights whose hashes the catalogue
    states are read whole.
    """
    config = _load(path)
    from expertgate.server.serving import check_config

    check_config(config, model=model, flags=flags)
    click.echo("all of it holds")


def _load(path: Path | None) -> Config:
    path = path or Path(CONFIG_FILE)
    if not path.exists():
        raise _Mistake(
            f"no configuration at {path}: serving needs to know who may consult which expert. "
            "Write one that names `identity: {api_keys: keys.yaml}` and `policies: policies/`, "
            "make keys with `expertgate keys create`, and put *.cedar files into the folder"
        )
    return Config.load(path)


@cli.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port", default=8000, show_default=True, type=click.IntRange(0, 65535), help="Port."
)
def demo(host: str, port: int) -> None:
    """Serve the model that comes along, to three users.

    Each may consult other experts. Their keys are printed, and end with the server.
    """
    from expertgate.server.demo import serve_demo

    serve_demo(host, port)
    leave()


def main(arguments: list[str] | None = None) -> Any:
    """The entry point; returns or exits with its status.

    0; 1 where a server failed or something didn't pass its check; 2 for an operator's mistake;
    3 where `policy diff` finds a gain; 130 where it was interrupted.
    """
    try:
        return cli.main(arguments, standalone_mode=False)
    except _MISTAKES as error:
        return _fail(str(error), 2)
    except (EngineError, ProofError) as error:
        return _fail(str(error), 1)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return error.exit_code
    except click.UsageError as error:  # of several lines, where it has choices to list
        return _fail(" ".join(error.format_message().split()), error.exit_code)
    except click.ClickException as error:
        return _fail(error.format_message(), error.exit_code)
    except click.Abort:
        return 130


def _fail(message: str, status: int) -> int:
    for line in message.splitlines():  # a file with several faults has a line for each
        print(f"expertgate: {line}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
