"""A small private authority, to try mutual TLS with: its certificate, one for a server, some for clients.

For a real deployment use the certificates of your own authority; the files have the same names.
"""

import datetime
import ipaddress
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from edgert.errors import OptionError

AUTHORITY: Final = "ca"
SERVER: Final = "server"
_CLOCK_SKEW: Final = datetime.timedelta(hours=1)  # boards without a clock battery start a little behind


def write_certificates(folder: Path, hosts: Sequence[str], clients: Sequence[str], days: int) -> list[Path]:
    """Write ca, server and each client as NAME.pem and NAME.key (readable by the owner alone).

    An authority that is there is used again, and no certificate is replaced; gives the files written.
    hosts: the names and addresses under which clients reach the server.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if any(name in (AUTHORITY, SERVER) or not name.isprintable() or "/" in name for name in clients):
        raise OptionError(f"clients are {', '.join(clients)}; expected other names than ca and server")
    written: list[Path] = []
    if not (folder / f"{AUTHORITY}.key").exists():
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = _sign(_builder("edgert authority", key, days), "edgert authority", key, ca=True)
        written += _save(folder, AUTHORITY, key, certificate)
    issuer_key, issuer = _authority(folder)
    for name in (SERVER, *clients):
        if (folder / f"{name}.pem").exists():
            continue
        key = ec.generate_private_key(ec.SECP256R1())
        builder = _builder(name, key, days)
        usage = ExtendedKeyUsageOID.CLIENT_AUTH
        if name == SERVER:
            usage = ExtendedKeyUsageOID.SERVER_AUTH
            names = x509.SubjectAlternativeName([_host(host) for host in hosts])
            builder = builder.add_extension(names, critical=False)
        builder = builder.add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        issuer_name = issuer.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value
        written += _save(folder, name, key, _sign(builder, str(issuer_name), issuer_key, ca=False))
    return written


def _authority(folder: Path) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
    try:
        key = serialization.load_pem_private_key((folder / f"{AUTHORITY}.key").read_bytes(), None)
        certificate = x509.load_pem_x509_certificate((folder / f"{AUTHORITY}.pem").read_bytes())
    except (OSError, ValueError) as error:
        raise OptionError(
            f"{folder}: found no authority that can be used ({error}); give an empty folder"
        ) from None
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    return key, certificate


def _builder(name: str, key: ec.EllipticCurvePrivateKey, days: int) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.timezone.utc)
    return (
        x509.CertificateBuilder()
        .subject_name(_name(name))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCK_SKEW)
        .not_valid_after(now + datetime.timedelta(days=days))
    )


def _sign(
    builder: x509.CertificateBuilder, issuer: str, key: ec.EllipticCurvePrivateKey, *, ca: bool
) -> x509.Certificate:
    constraints = x509.BasicConstraints(ca=ca, path_length=0 if ca else None)
    return (
        builder.issuer_name(_name(issuer))
        .add_extension(constraints, critical=True)
        .sign(key, hashes.SHA256())
    )


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _host(text: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(text))
    except ValueError:
        return x509.DNSName(text)


def _save(
    folder: Path, name: str, key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate
) -> list[Path]:
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    paths = [folder / f"{name}.key", folder / f"{name}.pem"]
    descriptor = os.open(paths[0], os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(private)
    paths[1].write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    return paths
