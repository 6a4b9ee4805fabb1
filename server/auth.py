"""Named API keys from a file that holds only their hashes, with an optional quota of KV-token-seconds.

`python -m server.auth NAME` makes a key, prints it once on stderr, and prints the entry for the file on stdout.
"""

import hashlib
import hmac
import re
import secrets
import sys
import time
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ard_serve.errors import ArdError, UsageError
from ard_serve.settings import explain
from server.errors import ApiError

_NAME = r"^[A-Za-z0-9_.-]{1,64}$"


class KeyRecord(BaseModel):
    """One entry of the key file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    admin: bool = Field(False, description="may read /metrics")
    kv_token_seconds_per_minute: float | None = Field(None, gt=0, description="quota: KV tokens reserved x seconds held")


class KeyFile(BaseModel):
    """The file: a table `[keys.NAME]` for each key."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    keys: dict[Annotated[str, Field(pattern=_NAME)], KeyRecord] = Field(min_length=1)


@dataclass
class Caller:
    """Who asks. `balance` is what is left of the quota in KV-token-seconds; it may go below zero and then has to recover."""

    name: str
    record: KeyRecord | None
    cache_salt: str | None
    balance: float = 0.0
    updated_at: float = 0.0

    def renew(self, record: KeyRecord, cache_salt: str) -> None:
        """Take what the key file says now. The balance stays, and requests in flight go on charging it."""
        if self._quota:
            self._refill(self._quota)
        else:
            self.balance, self.updated_at = record.kv_token_seconds_per_minute or 0.0, time.monotonic()
        self.record, self.cache_salt = record, cache_salt

    @property
    def is_admin(self) -> bool:
        """Without keys everybody who can connect is."""
        return self.record is None or self.record.admin

    def check_quota(self) -> None:
        """Raises ApiError 429 with the time until the quota has recovered."""
        if (quota := self._quota) and self._refill(quota) < 0:
            raise ApiError(
                429,
                f"key '{self.name}' has used its quota of {quota:g} KV-token-seconds a minute; try again later",
                "quota_exceeded",
                retry_after_s=-self.balance / (quota / 60) + 1,
            )

    def charge(self, kv_token_seconds: float) -> None:
        """Subtract what a request has held, after it has ended."""
        if self._quota:
            self.balance = self._refill(self._quota) - kv_token_seconds

    @property
    def _quota(self) -> float | None:
        return self.record.kv_token_seconds_per_minute if self.record else None

    def _refill(self, quota: float) -> float:
        now = time.monotonic()
        self.balance = min(quota, self.balance + (now - self.updated_at) * quota / 60)
        self.updated_at = now
        return self.balance


ANONYMOUS = "anonymous"


class Keys:
    """All callers of a key file, or one anonymous caller where there is no file."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._salt_secret = secrets.token_bytes(16)
        self._callers: Mapping[str, Caller] = {}
        self.reload()

    def reload(self) -> None:
        """Read the file again; balances of keys that stay are kept.

        Raises:
            UsageError: the file cannot be read; the callers from before stay.
        """
        if self._path is None:
            self._callers = {"": Caller(ANONYMOUS, None, None)}
            return
        known = {caller.name: caller for caller in self._callers.values()}
        callers: dict[str, Caller] = {}
        for name, record in read_key_file(self._path).keys.items():
            callers[record.sha256] = caller = known.get(name) or Caller(name, None, None)
            caller.renew(record, self._salt(record))
        self._callers = callers

    @property
    def are_required(self) -> bool:
        """Whether a caller must bring a key."""
        return self._path is not None

    def identify(self, authorization: str | None) -> Caller:
        """The caller whose key the Authorization header carries.

        Every key is compared, each in constant time, so that a wrong key takes as long as a right one.

        Raises:
            ApiError: 401.
        """
        if self._path is None:
            return self._callers[""]
        scheme, _, key = (authorization or "").partition(" ")
        digest = hash_key(key.strip())
        found = [caller for known, caller in self._callers.items() if hmac.compare_digest(known, digest)]
        if scheme.lower() != "bearer" or not found:
            problem = "no API key was sent" if not authorization else "the API key is not known here"
            message = f"{problem}; send 'Authorization: Bearer KEY'"
            raise ApiError(401, message, "invalid_api_key", headers={"www-authenticate": "Bearer"})
        return found[0]

    def _salt(self, record: KeyRecord) -> str:
        """Keeps one key's cached prefixes out of every other key's reach; new with each start of the server."""
        return hmac.digest(self._salt_secret, record.sha256.encode(), "sha256").hex()[:32]


def hash_key(key: str) -> str:
    """Hex sha256 of a key. Keys are 256 random bits, so that no slow hash is needed."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def read_key_file(path: Path) -> KeyFile:
    """Parse and check a key file.

    Raises:
        UsageError: names the file and what is wrong; never a hash.
    """
    try:
        return KeyFile.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise UsageError(f"{path}: cannot read the key file ({error.strerror})") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"{path}: not valid TOML ({error})") from None
    except ValidationError as error:
        raise UsageError(f"{path}: {explain(error, KeyFile)}") from None


def main(name: str) -> None:
    """Make a key called `name`.

    Raises:
        UsageError: a name that no key file may hold.
    """
    if not re.fullmatch(_NAME, name):
        raise UsageError(f"{name!r} cannot name a key; use up to 64 letters, digits, '_', '.' and '-'")
    key = "ard-" + secrets.token_urlsafe(32)
    print(f"key, shown only now: {key}", file=sys.stderr)
    print(f'[keys."{name}"]\nsha256 = "{hash_key(key)}"')


if __name__ == "__main__":
    try:
        main(*sys.argv[1:2] or ["default"])
    except ArdError as error:
        print(f"server.auth: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
