"""Who can reach whom: names of interfaces, trial connections, the hub."""

import os
import socket
from collections.abc import Mapping, Sequence
from urllib.parse import urlsplit

from grpo.config.text import first_line

CONNECT_SECONDS = 3.0
PROXIES = ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")


def connection_error(host: str, port: int) -> str:
    """ "" if a TCP connection comes about, else why not."""
    try:
        socket.create_connection((host, port), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        return first_line(error)
    return ""


def hub_error() -> str:
    """ "" if the hub can be reached, or if only a proxy knows; else why not."""
    if any(os.environ.get(proxy) for proxy in PROXIES):
        return ""
    return site_error(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")


def bucket_error() -> str:
    """The same for the place where buckets are."""
    if any(os.environ.get(proxy) for proxy in PROXIES):
        return ""
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    default = f"https://s3.{region}.amazonaws.com" if region else "https://s3.amazonaws.com"
    return site_error(os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or default)


def site_error(url: str) -> str:
    """ "" if the host of the url takes connections, else why not."""
    site = urlsplit(url)
    error = connection_error(site.hostname or "", site.port or (80 if site.scheme == "http" else 443))
    return f"{site.hostname} cannot be reached ({error})" if error else ""


def chosen(variable: str, value: str, names: Sequence[str]) -> list[str]:
    """Interfaces that NCCL or gloo would use for the value of its variable.

    NCCL takes beginnings of names; `=` in front asks for whole names, `^` for all others. Gloo takes whole names.
    """
    other, exact = value.startswith("^"), variable.startswith("GLOO") or value.lstrip("^").startswith("=")
    parts = [part for part in value.lstrip("^=").split(",") if part]
    hit = {name for name in names if any(name == part if exact else name.startswith(part) for part in parts)}
    return [name for name in names if (name in hit) != other]


def interface_of(address: str, interfaces: Mapping[str, Sequence[str]]) -> str:
    """Name of the interface that has this address; "" if none has."""
    return next((name for name, addresses in interfaces.items() if address in addresses), "")
