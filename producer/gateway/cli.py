"""`promptmill gateway` and `promptmill keys`. What needs the web framework is imported when a command runs."""

import json
import ssl
from typing import Any

import click
from pydantic import ValidationError

from producer.contract.problems import rule_of
from producer.errors import SettingsError
from producer.gateway.api_keys import add_key, has_keys, list_keys, make_key, revoke_key
from producer.gateway.settings import GatewaySettings
from producer.logs import configure_logging
from producer.settings import ProducerSettings, load_settings, settings_options, split_list, warn_of_misspelt_variables
from producer.transport import run_once


@click.command()
@settings_options(GatewaySettings)
def gateway(**flags: Any) -> None:
    """Serve OpenAI's API on top of the queues. Ends at SIGTERM or Ctrl-C."""
    settings = load_settings(GatewaySettings, flags)
    configure_logging(settings.log_level, settings.log_format)
    warn_of_misspelt_variables(GatewaySettings)
    _check_exposure(settings)
    _check_tls(settings)
    from producer.gateway.server import run_gateway

    run_gateway(settings)


@click.group()
def keys() -> None:
    """Make, list and revoke the API keys that gateways accept."""


@keys.command("add")
@click.argument("name")
@click.option("--tenant", metavar="TENANT", help="Tenant that the key's jobs belong to.")
@click.option("--requests-per-minute", type=int, metavar="N", help="Requests a minute; default: no limit.")
@click.option(
    "--tokens-per-minute", type=int, metavar="N", help="Tokens a minute, of prompts and answers; default: no limit."
)
@click.option("--models", metavar="NAMES", help="The only models that it may use, comma separated; default: all.")
@click.option("--operator", "is_operator", is_flag=True, help="The key may see /stats, /metrics and everybody's jobs.")
@settings_options(ProducerSettings)
def add(name: str, models: str | None, **options: Any) -> None:
    """Make a key, and print it: it is shown only once."""
    flags = {field: options.pop(field) for field in ProducerSettings.model_fields}
    try:
        key, text = make_key(name=name, models=split_list(models), **options)
    except ValidationError as error:
        wrong = error.errors()[0]
        flag = "NAME" if wrong["loc"][0] == "name" else f"--{str(wrong['loc'][0]).replace('_', '-')}"
        raise SettingsError(f"{flag}: {rule_of(wrong)}") from error
    run_once(load_settings(ProducerSettings, flags), add_key(key))
    click.echo(text)


@keys.command("list")
@click.option("--json", "is_json", is_flag=True, help="Print them as JSON.")
@settings_options(ProducerSettings)
def show(is_json: bool, **flags: Any) -> None:
    """Show the keys, without their secrets."""
    listed = run_once(load_settings(ProducerSettings, flags), list_keys())
    found = [key.model_dump(mode="json", exclude={"secret_sha256"}) for key in listed]
    if is_json:
        click.echo(json.dumps(found, indent=2))
        return
    for key in found:
        given = {field: value for field, value in key.items() if value and field not in ("id", "name", "created_at")}
        click.echo("  ".join([key["id"], key["name"], *(f"{field}={value}" for field, value in given.items())]))
    if not found:
        click.echo("there is no key")


@keys.command("revoke")
@click.argument("key_id")
@settings_options(ProducerSettings)
def revoke(key_id: str, **flags: Any) -> None:
    """Revoke a key, by its id. Gateways accept it for up to five seconds more."""
    if not run_once(load_settings(ProducerSettings, flags), revoke_key(key_id)):
        raise SettingsError(f"there is no key {key_id!r}; promptmill keys list shows the existing ones")
    click.echo(f"{key_id} is revoked")


def _check_exposure(settings: GatewaySettings) -> None:
    """Nobody's machine is opened to everybody by mistake. Raises SettingsError."""
    if settings.is_loopback or settings.allow_anonymous:
        return
    if not run_once(settings, has_keys()):
        raise SettingsError(
            f"--http-host {settings.http_host}: others could use it without a key; make one with "
            "`promptmill keys add NAME`, listen on 127.0.0.1, or pass --allow-anonymous"
        )


def _check_tls(settings: GatewaySettings) -> None:
    """Raises SettingsError for files that cannot be served with."""
    certificate, key = settings.tls_certfile, settings.tls_keyfile
    if certificate is None:
        if key is not None:
            raise SettingsError("--tls-keyfile is of no use alone; give --tls-certfile, too")
        return
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password=lambda: "")
    except OSError as error:  # of files, and of what is in them
        named = f"--tls-certfile {certificate}" + (f", --tls-keyfile {key}" if key else "")
        raise SettingsError(f"{named}: {error}; give a certificate and its own key, PEM and not encrypted") from error
