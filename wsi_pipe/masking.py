"""Secrets of addresses, kept out of whatever is stored or shown: passwords, signatures and tokens of URLs."""

from __future__ import annotations

import re

__all__ = ["MASK", "has_secret", "mask_secrets", "same_address"]

MASK = "***"

# Keys of AWS may hold slashes; a port in front of a path is none.
_USER = re.compile(
    r"(?P<scheme>\b[A-Za-z][A-Za-z0-9+.-]*://)(?:[^/?#\s'\"<>]*|[^/?#\s'\"<>:@]+:(?!\d{1,5}/)[^?#\s'\"<>@]*)@"
)
_ASSIGNED = re.compile(r"(?P<start>[?&;#]|%3F|%26|\b)(?P<name>[A-Za-z][\w.%-]*)=(?P<value>[^&\s'\"<>#;,)\]}]+)")
_WORDS = re.compile(
    r"sig|token|secret|passw|passphrase|pwd|credential|auth|key|session|jwt|sas$|bearer|policy|signed|ticket|cookie",
    re.IGNORECASE,
)
_SECRET_NAME = re.compile(
    r"([\w.%-]*[_.-])?(sig|signature|token|secret|passw(or)?d|pwd|passphrase|credentials?|jwt|cookie|bearer)|"
    r"[\w.-]*(access|api|secret|account|auth|private|shared)[\w]*[_-]?(key|signature|token)(id)?|"
    r"session[_-]?(id|key|token)?",
    re.IGNORECASE,
)
"""What a name is called outside of a URL whose value is a secret: "signal" and "key" are words of every day."""
_HARMLESS = re.compile(
    r"version(id)?|generation|alt|format|id|page|file(name)?|path|name|level|region|size|w|h|x|y|z|dl|download|type|"
    r"series(uid)?|study(uid)?|response-content-(disposition|type)|expires|x-(amz|goog)-(date|expires|algorithm)|s[erptv]|"
    r"s[rk][a-z]?",
    re.IGNORECASE,
)
_BEARER = re.compile(r"(?P<what>\b(?:Bearer|Basic)\s+)[A-Za-z0-9+/_.=~-]{8,}")


def mask_secrets(text: str) -> str:
    """``text`` with the secrets of every URL in it replaced by ``***``.

    Of a URL's user part all goes, a token may stand in the name's place; of its query the values of all parameters but
    those that are known to tell what is asked for. Outside of URLs, values whose name says that they are secret.
    """
    if not any(sign in text for sign in ("=", "://", "Bearer ", "Basic ")):
        return text
    text = _USER.sub(lambda m: f"{m['scheme']}{MASK}@", text)
    if "=" in text:
        text = _ASSIGNED.sub(_assigned, text)
    return _BEARER.sub(lambda m: m["what"] + MASK, text)


def _assigned(match: re.Match[str]) -> str:
    start, name, value = match["start"], match["name"], match["value"]
    # Outside a query, "level=2" of a message is no secret, and neither is a name followed by nothing but a number.
    secret = not _HARMLESS.fullmatch(name) or bool(_WORDS.search(name))
    if not start:
        secret = bool(_SECRET_NAME.fullmatch(name))
    if start == ";":
        secret = bool(_WORDS.search(name))
    return f"{start}{name}={MASK}" if secret and not (not start and value.isdecimal()) else match[0]


def has_secret(path: str) -> bool:
    """Whether a URL holds what ``mask_secrets`` masks."""
    return "://" in path and mask_secrets(path) != path


_SIGNED = re.compile(
    r"(x-(amz|goog)-[\w-]+|awsaccesskeyid|googleaccessid|signature|sig|expires|policy|key-pair-id|(access_?|auth_?)?token|"
    r"s[etprv]|s[rk][a-z]{0,3}|sdd|spr|password|api_?key)=[^&#]*&?",
    re.IGNORECASE,
)


def same_address(url: str) -> str:
    """What is left of a URL without user, signature and time: equal for one file, whoever signed it and until when."""
    if "://" not in url:
        return url
    head, mark, query = _USER.sub(lambda m: m["scheme"], url).partition("?")
    parts = [part for part in query.split("&") if part and not _SIGNED.fullmatch(part)]
    return head + (mark + "&".join(parts) if parts else "")
