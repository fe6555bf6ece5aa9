"""Addresses and credentials: off loopback, both sides show a certificate (mutual TLS)."""

import ipaddress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import grpc

from edgert.errors import OptionError

OPTIONS: Final = [
    # A dead link is noticed by pings, also while nothing is said.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.http2.max_pings_without_data", 0),
]
FRAMING: Final = 1 << 16
"""Bytes that gRPC takes above our own limit of a message: those between are refused, and counted, by us."""


@dataclass(frozen=True, slots=True)
class Address:
    """HOST:PORT; an IPv6 host in brackets."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> "Address":
        """Raises OptionError for anything else."""
        host, colon, port = text.rpartition(":")
        host = host.strip("[]")
        if not colon or not host or not port.isdecimal() or int(port) > 65535:
            raise OptionError(f"an address of {text!r}; expected HOST:PORT, such as 127.0.0.1:7411")
        return cls(host, int(port))

    @property
    def loopback(self) -> bool:
        """Whether no other machine can be meant."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Certificates:
    """PEM bytes: who is trusted, and who one is oneself."""

    authority: bytes
    certificate: bytes
    key: bytes

    @classmethod
    def read(cls, folder: Path, name: str) -> "Certificates":
        """ca.pem, NAME.pem and NAME.key of a folder of `edgert certs`; OptionError where one is missing."""
        found = []
        for file in ("ca.pem", f"{name}.pem", f"{name}.key"):
            try:
                found.append((folder / file).read_bytes())
            except OSError as error:
                raise OptionError(
                    f"{folder / file}: cannot be read ({error.strerror}); make it with "
                    f"`edgert certs {folder}`"
                ) from None
        return cls(*found)

    def server(self) -> grpc.ServerCredentials:
        """Credentials that demand a certificate of the same authority from every client."""
        return grpc.ssl_server_credentials(
            [(self.key, self.certificate)], root_certificates=self.authority, require_client_auth=True
        )

    def channel(self) -> grpc.ChannelCredentials:
        """Credentials of a client."""
        return grpc.ssl_channel_credentials(self.authority, self.key, self.certificate)


def check_secure(address: Address, certificates: Certificates | None) -> None:
    """Hidden values are as good as the text: raise OptionError where they would travel in the open."""
    if certificates is None and not address.loopback:
        raise OptionError(
            f"{address} is not this machine, and there are no certificates; hidden values reveal the text, "
            "so give --tls FOLDER (make one with `edgert certs`)"
        )


_REASONS: Final = (
    ("Connection refused", "nothing listens there"),
    ("DNS resolution failed", "no such host"),
    ("address lookup failed", "no such host"),
    ("Hostname Verification", "its certificate was not made for this name; see `edgert certs --host`"),
    ("WRONG_VERSION_NUMBER", "it speaks no TLS; leave --tls out"),
    (
        "SSL_ERROR",
        "its certificate and ours are not of one authority; give both sides the same --tls",
    ),
    ("handshake failed", "its certificate and ours are not of one authority, or it speaks no TLS"),
)
"""What gRPC says of a connection that failed, and what that means to a user."""


def plain_reason(details: str, secure: bool) -> str:
    """One short line for what gRPC has to say of a stream's end."""
    for sign, reason in _REASONS:
        if sign in details:
            return reason
    if any(sign in details for sign in ("Socket closed", "Connection reset", "Broken pipe")):
        return "the connection was closed" + (
            "" if secure else "; where the server has --tls, give --tls too"
        )
    return details.removeprefix("failed to connect to all addresses; last error: ")
