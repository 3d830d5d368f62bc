"""The gateway's settings. Read once at the edge; nothing below reads the environment."""

import ipaddress
import re

from pydantic import Field, field_validator

from producer.settings import S3_URL_PATTERN, ProducerSettings, ServerSettings, split_list


class WebhookSettings(ProducerSettings):
    """What those need who call webhooks."""

    webhook_private_targets: bool = Field(
        default=False, description="Allow webhooks to loopback and private addresses."
    )


class GatewaySettings(WebhookSettings, ServerSettings):
    """What `promptmill gateway` needs beside a producer's settings."""

    http_host: str = Field(default="127.0.0.1", description="Address to listen on; any but loopback needs API keys.")
    http_port: int = Field(default=8000, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    http_fd: int | None = Field(
        default=None, ge=3, description="Inherited socket, bound to --http-host, to serve on instead of --http-port."
    )
    allow_anonymous: bool = Field(default=False, description="Serve requests without an API key, on any address.")
    tls_certfile: str | None = Field(default=None, description="Certificate chain (PEM): serve HTTPS.")
    tls_keyfile: str | None = Field(default=None, description="The certificate's private key (PEM).")
    cors_origins: str = Field(default="", description="Origins that browsers may call from, comma separated, or *.")
    console: bool = Field(default=True, description="Serve the console, a page about queues, workers and jobs, at /.")
    max_body_bytes: int = Field(
        default=4 << 20, ge=1024, description="Maximum size of a request body in bytes; larger ones get 413."
    )
    files: str = Field(
        default="~/.local/share/promptmill/files",
        min_length=1,
        description="Where /v1/files are kept: a folder that all gateways share, or s3://BUCKET/PREFIX.",
    )
    max_file_bytes: int = Field(
        default=200_000_000, ge=1024, description="Maximum size of a file in bytes; larger ones get 413."
    )
    max_queue_depth: int = Field(
        default=10_000, ge=1, description="Requests get 429 while this many jobs wait in their queue."
    )
    batch_max_in_flight: int = Field(
        default=2000, ge=1, description="Maximum number of a batch's jobs on the queues at once."
    )
    batch_lease_seconds: float = Field(
        default=15.0, ge=3.0, description="A gateway that does not report for this long loses its batches to another."
    )
    request_timeout_seconds: float = Field(
        default=600.0,
        gt=0,
        description="A response that takes longer than this ends with 408, and its job is cancelled.",
    )
    keep_alive_seconds: float = Field(
        default=15.0, gt=0, description="A stream without events gets a comment this often."
    )
    http_drain_seconds: float = Field(
        default=20.0,
        ge=0,
        description="After SIGTERM responses may go on for this long; then streams end, and clients can resume them.",
    )

    @field_validator("cors_origins")
    @classmethod
    def _origins_are_whole(cls, value: str) -> str:
        """As browsers send them; any other would never be met."""
        for origin in split_list(value):
            if origin != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/?#\s*]+", origin):
                raise ValueError(f"an origin is a scheme and a host, as https://app.example, or *; {origin!r} is none")
        return value

    @field_validator("files")
    @classmethod
    def _bucket_has_a_name(cls, value: str) -> str:
        if value.startswith("s3:") and not re.fullmatch(S3_URL_PATTERN, value):
            raise ValueError("a bucket is given as s3://BUCKET/PREFIX, its name in small letters, digits, . and -")
        return value

    @property
    def is_loopback(self) -> bool:
        """Whether nobody but this machine can reach us."""
        return is_loopback(self.http_host)

    @property
    def allowed_origins(self) -> list[str]:
        return split_list(self.cors_origins)


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False  # a name, which may be any address
