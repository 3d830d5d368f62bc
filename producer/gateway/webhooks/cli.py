"""`promptmill webhooks`: endpoints and deliveries for operators. Owns what is printed; Redis is asked by protocols."""

import asyncio
import json
import time
from typing import Any

import click
from pydantic import ValidationError

from producer.contract.problems import rule_of
from producer.deliveries import JOBS, PendingDelivery, list_deliveries, revive_deliveries
from producer.errors import SettingsError
from producer.gateway.api_keys import read_key
from producer.gateway.settings import WebhookSettings
from producer.gateway.webhooks.endpoints import (
    WebhookEndpoint,
    add_endpoint,
    enable_endpoint,
    list_disabled,
    list_endpoints,
    read_endpoint,
    remove_endpoint,
    replace_endpoint,
)
from producer.gateway.webhooks.outbox import EVENT_TYPES, Event
from producer.job_webhooks import JobWebhook
from producer.settings import ProducerSettings, load_settings, settings_options, split_list
from producer.transport import run_once


@click.group()
def webhooks() -> None:
    """Endpoints that are told when a batch ends, and failed deliveries.

    `deliveries` and `retry` cover the webhooks of RQ jobs as well.

    Requests to endpoints are signed as Standard Webhooks specifies; OpenAI's clients verify them with
    `client.webhooks.unwrap`.
    """


@webhooks.command("add")
@click.argument("url")
@click.option("--name", default="webhook", metavar="NAME", show_default=True, help="Name that lists show.")
@click.option(
    "--events",
    default=",".join(EVENT_TYPES),
    metavar="EVENTS",
    show_default=True,
    help="Events to send, comma separated.",
)
@click.option("--key", "key_id", metavar="KEY_ID", help="Only for batches of this API key; default: for all.")
@settings_options(WebhookSettings)
def add(url: str, name: str, events: str, key_id: str | None, **flags: Any) -> None:
    """Notify URL when batches end. Prints the endpoint's id and the signing secret, which is shown only once."""
    settings = load_settings(WebhookSettings, flags)
    _check_url(settings, url)
    if key_id is not None and run_once(settings, read_key(key_id)) is None:
        raise SettingsError(f"--key: there is no key {key_id!r}; promptmill keys list shows the existing ones")
    names = tuple(dict.fromkeys(split_list(events)))
    try:
        endpoint = WebhookEndpoint.create(name=name, url=url, key_id=key_id, event_types=names)
    except ValidationError as error:
        wrong = error.errors()[0]
        flag = "--events" if wrong["loc"][0] == "event_types" else f"--{wrong['loc'][0]}"
        raise SettingsError(f"{flag}: {rule_of(wrong)}") from error
    run_once(settings, add_endpoint(endpoint))
    click.echo(f"{endpoint.id}  {endpoint.secret}")


@webhooks.command("list")
@click.option("--json", "is_json", is_flag=True, help="Print them as JSON.")
@settings_options(ProducerSettings)
def show(is_json: bool, **flags: Any) -> None:
    """Show the endpoints, without their secrets."""
    settings = load_settings(ProducerSettings, flags)
    disabled = run_once(settings, list_disabled())
    found = [
        {**endpoint.model_dump(mode="json", exclude={"secrets"}), "is_disabled": endpoint.id in disabled}
        for endpoint in run_once(settings, list_endpoints())
    ]
    if is_json:
        click.echo(json.dumps(found, indent=2))
        return
    for endpoint in found:
        state = "  disabled (answered 410; promptmill webhooks enable)" if endpoint["is_disabled"] else ""
        whose = f"  key={endpoint['key_id']}" if endpoint["key_id"] is not None else ""
        names = ",".join(endpoint["event_types"])
        click.echo(f"{endpoint['id']}  {endpoint['name']}  {endpoint['url']}  {names}{whose}{state}")
    if not found:
        click.echo("there is no endpoint")


@webhooks.command("remove")
@click.argument("endpoint_id")
@settings_options(ProducerSettings)
def remove(endpoint_id: str, **flags: Any) -> None:
    """Remove an endpoint. Its waiting deliveries are dropped."""
    if not run_once(load_settings(ProducerSettings, flags), remove_endpoint(endpoint_id)):
        raise _unknown(endpoint_id)
    click.echo(f"{endpoint_id} is removed")


@webhooks.command("enable")
@click.argument("endpoint_id")
@settings_options(ProducerSettings)
def enable(endpoint_id: str, **flags: Any) -> None:
    """Enable an endpoint that was disabled because it answered 410."""
    settings = load_settings(ProducerSettings, flags)
    _find(settings, endpoint_id)
    was_disabled = run_once(settings, enable_endpoint(endpoint_id))
    click.echo(f"{endpoint_id} is called again" if was_disabled else f"{endpoint_id} was not disabled")


@webhooks.command("rotate")
@click.argument("endpoint_id")
@click.option("--keep-old", is_flag=True, help="For 24 hours the old secret signs as well as the new one.")
@settings_options(ProducerSettings)
def rotate(endpoint_id: str, keep_old: bool, **flags: Any) -> None:
    """Give an endpoint a new secret, and print it."""
    settings = load_settings(ProducerSettings, flags)
    old = _find(settings, endpoint_id)
    new = old.rotated(keeps_old=keep_old)
    if not run_once(settings, replace_endpoint(old, new)):
        raise SettingsError(f"the endpoint {endpoint_id} was changed by somebody else at the same time; try again")
    click.echo(new.secret)


@webhooks.command("test")
@click.argument("endpoint_id")
@click.option(
    "--event",
    type=click.Choice(EVENT_TYPES, case_sensitive=False),
    default=EVENT_TYPES[0],
    show_default=True,
    help="Event to send.",
)
@settings_options(WebhookSettings)
def test(endpoint_id: str, event: Any, **flags: Any) -> None:
    """Send a sample event from this machine, once, and print the status of the answer."""
    from producer.gateway.webhooks.sender import WebhookSender
    from producer.gateway.webhooks.targets import TargetRules

    settings = load_settings(WebhookSettings, flags)
    endpoint = _find(settings, endpoint_id)
    sender, sample = WebhookSender(TargetRules(allows_private=settings.webhook_private_targets)), Event.sample(event)
    answer = asyncio.run(
        sender.send(endpoint.url, message_id=sample.id, body=sample.to_body(), secrets=endpoint.valid_secrets())
    )
    if answer.status is None:
        raise SettingsError(f"{endpoint.url} could not be reached: {answer.problem}")
    click.echo(f"{endpoint.url} answered {answer.status}")


@webhooks.command("deliveries")
@click.option("--json", "is_json", is_flag=True, help="Print them as JSON.")
@settings_options(ProducerSettings)
def deliveries(is_json: bool, **flags: Any) -> None:
    """Show deliveries of the last seven days that wait for another attempt or were given up."""
    found = [_describe(delivery) for delivery in run_once(load_settings(ProducerSettings, flags), list_deliveries())]
    if is_json:
        click.echo(json.dumps(found, indent=2))
        return
    for one in found:
        when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(float(str(one["at"]))))
        job = f"  job={one['job_id']}" if "job_id" in one else ""
        what = f"{one['id']}  {one['status']}{job}  attempts={one['attempts']}  {when}  {one['error'] or ''}"
        click.echo(what.rstrip())
    if not found:
        click.echo("no delivery waits, and none was given up")


@webhooks.command("retry")
@click.argument("delivery_ids", nargs=-1, metavar="[DELIVERY_ID]...")
@click.option("--all", "is_all", is_flag=True, help="All dead deliveries.")
@settings_options(ProducerSettings)
def retry(delivery_ids: tuple[str, ...], is_all: bool, **flags: Any) -> None:
    """Try dead deliveries again, by their ids."""
    settings = load_settings(ProducerSettings, flags)
    if bool(delivery_ids) == is_all:
        raise click.UsageError("name deliveries, or give --all")
    dead = [delivery.id for delivery in run_once(settings, list_deliveries()) if delivery.is_dead]
    revived = run_once(settings, revive_deliveries(dead if is_all else list(delivery_ids)))
    for delivery_id in revived:
        click.echo(f"{delivery_id} is tried again")
    unknown = [delivery_id for delivery_id in delivery_ids if delivery_id not in revived]
    if unknown:
        raise SettingsError(f"not dead: {', '.join(unknown)}; promptmill webhooks deliveries shows those that are")


def _describe(delivery: PendingDelivery) -> dict[str, object]:
    what: dict[str, object] = {"id": delivery.id, "status": "dead" if delivery.is_dead else "waiting"}
    if delivery.ledger is JOBS:
        what |= JobWebhook.describe(delivery.event)
    else:
        event = Event.model_validate_json(delivery.event)
        what |= {"event": json.loads(event.to_body()), "endpoint_id": delivery.endpoint}
    return {**what, "attempts": delivery.num_attempts, "error": delivery.error or None, "at": delivery.at}


def _check_url(settings: WebhookSettings, url: str) -> None:
    """Raises SettingsError."""
    from producer.gateway.webhooks.targets import TargetError, TargetRules

    try:
        asyncio.run(TargetRules(allows_private=settings.webhook_private_targets).check(url))
    except TargetError as error:
        raise SettingsError(str(error)) from error


def _find(settings: ProducerSettings, endpoint_id: str) -> WebhookEndpoint:
    endpoint = run_once(settings, read_endpoint(endpoint_id))
    if endpoint is None:
        raise _unknown(endpoint_id)
    return endpoint


def _unknown(endpoint_id: str) -> SettingsError:
    return SettingsError(f"there is no endpoint {endpoint_id!r}; promptmill webhooks list shows the existing ones")
