"""`promptmill gateway`. What needs the web framework is imported when the command runs."""

from typing import Any

import click

from producer.gateway.settings import GatewaySettings
from producer.logs import configure_logging
from producer.settings import load_settings, settings_options


@click.command()
@settings_options(GatewaySettings)
def gateway(**flags: Any) -> None:
    """Serve OpenAI's API on top of the queues, until SIGTERM or Ctrl-C."""
    settings = load_settings(GatewaySettings, flags)
    configure_logging(settings.log_level, settings.log_format)
    from producer.gateway.server import run_gateway

    run_gateway(settings)
