"""Lists of objects that come in pages: check that nothing is missing from them.

A list that is cut off looks like missing objects: a training would start at step 0, and `gc` would
see no other files. Some S3-compatible stores truncate lists without a continuation token, or ignore
the token, the prefix or both.
"""

from __future__ import annotations

from collections.abc import Sequence

from medjob.store.errors import no_paging


class Paging:
    """Checks the pages of one list."""

    def __init__(self, uri: str, prefix: str) -> None:
        self._uri = uri
        self._prefix = prefix
        self._tokens: set[str] = set()
        self._last_page: Sequence[str] = ()

    def check(self, names: Sequence[str]) -> None:
        """Check the names of one page.

        Raises:
            ConfigError: they are those of the page before, or do not start with the prefix.
        """
        if names and list(names) == list(self._last_page):
            raise no_paging(self._uri, "it sends the same page again")
        if not all(name.startswith(self._prefix) for name in names):
            raise no_paging(
                self._uri, f"it lists objects outside of {self._prefix or 'the prefix'}"
            )
        self._last_page = names

    def more(self, token: str | None, truncated: bool) -> bool:
        """Whether there is another page.

        Raises:
            ConfigError: there is, and the token for it is missing or was used before.
        """
        if not token:
            if truncated:
                raise no_paging(self._uri, "its list is truncated and has no continuation token")
            return False
        if token in self._tokens:
            raise no_paging(self._uri, "it repeats a continuation token")
        self._tokens.add(token)
        return True
