"""Ranged GETs of one bucket: signed and sent by parts of botocore, past its client.

The client spends about 1.1 ms of CPU on each GET beside the transfer, and copies the body twice; these parts half of it.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any
from urllib.parse import parse_qs, quote, urlsplit

import urllib3
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.httpsession import URLLib3Session
from botocore.session import Session
from botocore.utils import get_environ_proxies

from medjob.store.retry import Transient
from medjob.store.s3.errors import check_range, explained, first_line

_CHUNK = 256 << 10  # bytes; small enough to stay in the processor's cache between two copies


class RangedGets:
    """Reads ranges of the objects that `client` sees; endpoint, addressing and region are the client's."""

    def __init__(
        self,
        core: Session,
        client: Any,
        common: dict[str, str],
        timeout_s: tuple[float, float],
        connections: int,
    ) -> None:
        self._core, self._client, self._common = core, client, common
        self._timeout_s, self._connections = timeout_s, connections

    def fill(self, key: str, start: int, into: memoryview, where: str) -> None:
        """Fill `into` with the object's bytes from `start` on."""
        with explained(where):
            answer = self._http.send(self._signed(key, start, len(into))).raw
        try:
            check_range(answer, start, len(into), where)
            filled = 0
            while count := answer.readinto(into[filled : filled + _CHUNK]):
                filled += count
            answer.release_conn()
        except urllib3.exceptions.HTTPError as error:
            raise Transient(f"{where}: {first_line(error)}") from None
        finally:
            answer.close()
        if filled != len(into):
            raise Transient(f"{where}: {filled} of {len(into)} bytes came")

    def _signed(self, key: str, start: int, length: int) -> Any:
        root, region = self._place
        request = AWSRequest("GET", root + quote(key, safe="/~"), stream_output=True)
        request.headers["Range"] = f"bytes={start}-{start + length - 1}"
        if "RequestPayer" in self._common:
            request.headers["x-amz-request-payer"] = self._common["RequestPayer"]
        if region is not None:
            credentials = self._core.get_credentials()  # refreshes those that expire
            S3SigV4Auth(credentials.get_frozen_credentials(), "s3", region).add_auth(request)
        return request.prepare()

    @cached_property
    def _place(self) -> tuple[str, str | None]:
        """URL of the bucket and region of signatures (None: unsigned), as the client would have them."""
        url = urlsplit(
            self._client.generate_presigned_url("get_object", Params={"Key": "x", **self._common})
        )
        scope = parse_qs(url.query).get("X-Amz-Credential")
        return f"{url.scheme}://{url.netloc}{url.path.removesuffix('x')}", scope[0].split("/")[
            2
        ] if scope else None

    @cached_property
    def _http(self) -> URLLib3Session:
        return URLLib3Session(
            verify=self._core.get_config_variable("ca_bundle") or True,
            proxies=get_environ_proxies(self._place[0]),
            timeout=self._timeout_s,
            max_pool_connections=self._connections,
        )
