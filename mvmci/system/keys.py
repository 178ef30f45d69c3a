"""Keys: the Ed25519 ones of NATS (nkeys), and the private CA with its certificates.

The only module that imports cryptography. An nkey is written as NATS writes it: base32 of a letter's
prefix, the 32 bytes and a checksum; the seed of a user begins with `SU`, its public key with `U`.
A certificate names whom it is for, and the addresses at which others find it; its key is made where it is
used, and only the public part of that is sent to where the CA signs.
"""

from __future__ import annotations

import base64
import binascii
import datetime
import functools
import hmac
import ipaddress
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

if TYPE_CHECKING:  # certificates are made once in a cluster's life, and their module takes a while to load
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec

KeyKind = Literal["operator", "account", "user"]
CERTIFICATE_DAYS = 20 * 365  # nobody renews it: who holds the CA's key can make the broker's again
SIGNER_DAYS = 2 * 365  # of a CA below, which `up` renews
SKEW_DAYS = 2  # a machine whose clock is behind can use it at once
_PREFIXES: dict[KeyKind, int] = {"operator": 14 << 3, "account": 0 << 3, "user": 20 << 3}
_SEED_PREFIX = 18 << 3
_KEY_BYTES = 32
_DAY_S = 24 * 3600
_P256_ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551


class BadKey(ValueError):
    """Text that is no key of the kind that is needed. The text is not part of the message."""


def new_seed(kind: KeyKind) -> str:
    """A new key: its seed, from which all else follows. Secret."""
    return _seed(kind, os.urandom(_KEY_BYTES))


def derived_seed(seed: str, label: str, kind: KeyKind) -> str:
    """The seed of another key, which follows from `seed` and tells nothing of it. Secret. Raises BadKey."""
    key = hmac.digest(_private(seed)[1].private_bytes_raw(), label.encode(), "sha256")
    return _seed(kind, key)


def public(seed: str) -> str:
    """The public key of `seed`. Raises BadKey."""
    prefix, key = _private(seed)
    return _encode(bytes([prefix]) + key.public_key().public_bytes_raw())


def sign(seed: str, data: bytes) -> bytes:
    """The 64 bytes that only who holds `seed` can make of `data`. Raises BadKey."""
    return _private(seed)[1].sign(data)


def verify(public_key: str, data: bytes, signature: bytes) -> bool:
    """Whether the holder of `public_key` signed `data`. A key that is none signed nothing."""
    try:
        Ed25519PublicKey.from_public_bytes(_decode(public_key)[1:]).verify(signature, data)
    except (BadKey, ValueError, InvalidSignature):
        return False
    return True


def is_public_key(text: str, kind: KeyKind) -> bool:
    """Whether `text` is a public key of `kind`."""
    try:
        raw = _decode(text)
    except BadKey:
        return False
    return len(raw) == 1 + _KEY_BYTES and raw[0] == _PREFIXES[kind]


def _seed(kind: KeyKind, key: bytes) -> str:
    prefix = _PREFIXES[kind]
    return _encode(bytes([_SEED_PREFIX | prefix >> 5, (prefix & 31) << 3]) + key)


@functools.lru_cache(maxsize=64)
def _private(seed: str) -> tuple[int, Ed25519PrivateKey]:
    """The prefix of its public key, and the key."""
    raw = _decode(seed)
    if len(raw) != 2 + _KEY_BYTES or raw[0] & 0b1111_1000 != _SEED_PREFIX:
        raise BadKey("this is no seed")
    prefix = (raw[0] & 7) << 5 | raw[1] >> 3
    if prefix not in _PREFIXES.values():
        raise BadKey("this is a seed of a kind that is not used here")
    return prefix, Ed25519PrivateKey.from_private_bytes(raw[2:])


def _encode(raw: bytes) -> str:
    checksum = binascii.crc_hqx(raw, 0).to_bytes(2, "little")
    return base64.b32encode(raw + checksum).decode().rstrip("=")


def _decode(text: str) -> bytes:
    """The bytes of a key, without their checksum. Raises BadKey for whatever we would not write so."""
    try:
        body = base64.b32decode(text + "=" * (-len(text) % 8))[:-2]
    except ValueError:
        raise BadKey("this is no key") from None
    if _encode(body) != text:
        raise BadKey("this key is damaged")
    return body


def new_ca(cluster: str, now: float) -> tuple[str, str]:
    """The key and the certificate of a new CA, in PEM. It signs certificates and nothing else."""
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, f"mvmci {cluster}")])
    return _private_pem(key), _self_signed(key, name, now)


def widened_ca(ca_key: str, ca: str, now: float) -> str:
    """The CA's certificate, under which another CA may be: one that was made before says that none may."""
    from cryptography import x509

    there = x509.load_pem_x509_certificate(ca.encode())
    if there.extensions.get_extension_for_class(x509.BasicConstraints).value.path_length:
        return ca
    return _self_signed(_tls_key(ca_key), there.subject, now)


def _self_signed(key: ec.EllipticCurvePrivateKey, name: x509.Name, now: float) -> str:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes

    certificate = (
        _certificate(name, name, key.public_key(), now, CERTIFICATE_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=1), critical=True)
        .add_extension(_usage(key_cert_sign=True, crl_sign=True), critical=True)
        .sign(key, hashes.SHA256())
    )
    return _certificate_pem(certificate)


def sign_ca(ca_key: str, ca: str, public_key: str, name: str, *, never: str, now: float) -> str:
    """A certificate of the CA for another one below it, `name`, all in PEM. Whom that one signs for may serve
    and not dial, and under no name that ends in `never`. Raises BadKey.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.x509.oid import ExtendedKeyUsageOID

    signer = _tls_key(ca_key)
    certificate = (
        _certificate(_common_name(name), _subject(ca), _tls_public(public_key), now, SIGNER_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(key_cert_sign=True), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(
            x509.NameConstraints(permitted_subtrees=None, excluded_subtrees=[x509.DNSName(never)]),
            critical=True,
        )
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False
        )
        .sign(signer, hashes.SHA256())
    )
    return _certificate_pem(certificate)


def new_tls_key() -> str:
    """A new private key for TLS, in PEM. Secret: it is made where it is used, and stays there."""
    from cryptography.hazmat.primitives.asymmetric import ec

    return _private_pem(ec.generate_private_key(ec.SECP256R1()))


def derived_tls_key(seed: str, label: str) -> str:
    """The private key for TLS, in PEM, that follows from a seed and tells nothing of it. Secret. Raises
    BadKey."""
    from cryptography.hazmat.primitives.asymmetric import ec

    key = int.from_bytes(hmac.digest(_private(seed)[1].private_bytes_raw(), label.encode(), "sha512"), "big")
    return _private_pem(ec.derive_private_key(key % (_P256_ORDER - 1) + 1, ec.SECP256R1()))


def public_tls_key(private: str) -> str:
    """The public part of a private key, both in PEM. Raises BadKey."""
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    key = _tls_key(private).public_key()
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()


def sign_certificate(
    ca_key: str,
    ca: str,
    public_key: str,
    *,
    names: Sequence[str],
    addresses: Sequence[str],
    now: float,
    dials: bool = False,
    days: float = CERTIFICATE_DAYS,
) -> str:
    """A certificate of the CA for who has `public_key`, all in PEM: it may serve as `names` (DNS) and at
    `addresses` (IP), and if it `dials`, show itself to whom it dials. It ends with the CA's at the latest.
    Raises BadKey for what is no key, ValueError for what is no name or address.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.x509.oid import ExtendedKeyUsageOID

    signer = _tls_key(ca_key)
    left = x509.load_pem_x509_certificate(ca.encode()).not_valid_after_utc.timestamp() - now
    served = [
        *(x509.DNSName(name) for name in dict.fromkeys(names)),
        *(x509.IPAddress(ipaddress.ip_address(one)) for one in dict.fromkeys(addresses)),
    ]
    uses = [ExtendedKeyUsageOID.SERVER_AUTH, *([ExtendedKeyUsageOID.CLIENT_AUTH] if dials else [])]
    public = _tls_public(public_key)
    certificate = (
        _certificate(_common_name(names[0]), _subject(ca), public, now, min(days, left / _DAY_S))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(digital_signature=True), critical=True)
        .add_extension(x509.ExtendedKeyUsage(uses), critical=False)
        .add_extension(x509.SubjectAlternativeName(served), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False
        )
        .sign(signer, hashes.SHA256())
    )
    return _certificate_pem(certificate)


def is_signed(certificate: str, ca: str) -> bool:
    """Whether the CA signed `certificate`, both in PEM."""
    from cryptography import x509

    try:
        found = x509.load_pem_x509_certificate(certificate.encode())
        found.verify_directly_issued_by(x509.load_pem_x509_certificate(ca.encode()))
    except (ValueError, TypeError, x509.InvalidVersion, InvalidSignature, UnsupportedAlgorithm):
        return False
    return True


def is_certificate_for(
    certificate: str, public_key: str, *, names: Sequence[str], addresses: Sequence[str], now: float
) -> bool:
    """Whether `certificate`, which somebody signed whom we believe, is for just that, and half of its life is
    not over. One of a CA has no names."""
    from cryptography import x509

    try:
        found = x509.load_pem_x509_certificate(certificate.encode())
        same = found.public_key() == _tls_public(public_key)
        wanted = {str(ipaddress.ip_address(one)) for one in addresses}
    except ValueError:
        return False
    try:
        served = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        told = {str(one) for one in served.get_values_for_type(x509.IPAddress)}
        same &= (set(served.get_values_for_type(x509.DNSName)), told) == ({*names}, wanted)
    except x509.ExtensionNotFound:
        same &= not names and not addresses
    begin, end = found.not_valid_before_utc.timestamp(), found.not_valid_after_utc.timestamp()
    return same and begin <= now < (begin + end) / 2


def _subject(certificate: str) -> x509.Name:
    from cryptography import x509

    return x509.load_pem_x509_certificate(certificate.encode()).subject


def _common_name(name: str) -> x509.Name:
    from cryptography import x509

    return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name[:64])])


def _certificate(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, now: float, days: float
) -> x509.CertificateBuilder:
    from cryptography import x509

    at = datetime.datetime.fromtimestamp(now, datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(at - datetime.timedelta(days=SKEW_DAYS))
        .not_valid_after(at + datetime.timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _usage(**used: bool) -> x509.KeyUsage:
    from cryptography import x509

    unused = dict.fromkeys(
        (
            "digital_signature", "content_commitment", "key_encipherment", "data_encipherment",
            "key_agreement", "key_cert_sign", "crl_sign", "encipher_only", "decipher_only",
        ),
        False,
    )  # fmt: skip
    return x509.KeyUsage(**(unused | used))


def _tls_key(private: str) -> ec.EllipticCurvePrivateKey:
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        key = load_pem_private_key(private.encode(), password=None)
    except (ValueError, TypeError):
        raise BadKey("this is no private key in PEM") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise BadKey("this is a private key of a kind that is not used here")
    return key


def _tls_public(public_key: str) -> ec.EllipticCurvePublicKey:
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    try:
        key = load_pem_public_key(public_key.encode())
    except (ValueError, UnsupportedAlgorithm):
        raise BadKey("this is no public key in PEM") from None
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise BadKey("this is a public key of a kind that is not used here")
    return key


def _private_pem(key: ec.EllipticCurvePrivateKey) -> str:
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()


def _certificate_pem(certificate: x509.Certificate) -> str:
    from cryptography.hazmat.primitives.serialization import Encoding

    return certificate.public_bytes(Encoding.PEM).decode()
