"""Who asks, and whether they may: keys and rates, as dependencies of the routes."""

from __future__ import annotations

from http import HTTPStatus
from typing import Annotated, Any

from fastapi import Request, Security
from fastapi.security import HTTPBearer

from gateway.keys import KeyName, Keys
from gateway.rates import Rate, RateLimits, network_of
from gateway.refusals import Refused

# Only for the document: it says of each route that depends on a key that it does.
Described = Annotated[Any, Security(HTTPBearer(scheme_name="key", auto_error=False))]


class Callers:
    """Knows the keys. Without any, everybody may come in, and is counted by address."""

    def __init__(self, keys: Keys, rate: Rate | None) -> None:
        self._keys = keys
        self._rates = RateLimits(rate) if rate else None

    @property
    def need_key(self) -> bool:
        return len(self._keys) > 0

    def known(self, request: Request) -> KeyName | None:
        """The name of the key that the request carries; None without one, or with a wrong one."""
        return self._keys.find(request.headers.get("authorization"))

    def may_see(self, request: Request) -> bool:
        return not self.need_key or self.known(request) is not None

    def seal(self, text: str) -> str:
        """Shows, when it comes back, that this text was told to somebody who had a key."""
        return self._keys.seal(text)

    async def enter(self, request: Request, _: Described = None) -> KeyName | None:
        """A dependency: the caller's name, None where no keys are needed. Raises Refused (401)."""
        if not self.need_key:
            return None
        caller = self.known(request)
        if caller is None:
            given = request.headers.get("authorization")
            raise Refused(
                HTTPStatus.UNAUTHORIZED,
                "this key is not known here"
                if given
                else "a key is needed: send it as `Authorization: Bearer KEY`",
                reason="no_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        return caller

    async def spend(self, request: Request, _: Described = None) -> KeyName | None:
        """A dependency of what costs the card: `enter`, and a token of the caller's. Raises Refused (401, 429)."""
        caller = await self.enter(request)
        if self._rates is not None:
            who = caller or network_of(request.client.host if request.client else "")
            wait = self._rates.take(who)
            if wait:
                raise Refused(
                    HTTPStatus.TOO_MANY_REQUESTS,
                    "you have asked for more predictions than RATE_LIMIT_PER_MINUTE allows: wait, and ask again",
                    reason="rate_limit",
                    retry_after_s=wait,
                )
        return caller
