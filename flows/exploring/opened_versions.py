"""The versions that the page looks into: the one that is served, and a few others, opened when they are asked for."""

from collections import OrderedDict

from flows.serving.editions import Edition
from flows.serving.errors import ApiError
from schemas.bank import Bank
from schemas.manifest import list_versions

MAX_OPENED = 4
"""Versions kept beside the one that is served: the two that are compared, and those looked at before."""


class OpenedVersions:
    """Opens versions of the bank that is served; used by one thread.

    An opened version remembers which of its tables it has checked, so it is worth keeping.
    """

    def __init__(self) -> None:
        """Begins with none."""
        self._banks: OrderedDict[int, Bank] = OrderedDict()

    def get(self, edition: Edition, version: int | None) -> Bank:
        """Returns a version.

        Args:
            edition: the version that is served.
            version: its number; None is the one that is served.

        Raises:
            ApiError: there is no such version.
            BankFormatError: its manifest is damaged.
        """
        if version is None or version == edition.version:
            return edition.bank
        store = edition.bank.store
        if version not in list_versions(store):
            self._banks.pop(version, None)
            raise ApiError(404, f"the bank has no version {version}; see /v1/explore/versions", param="version")
        bank = self._banks.pop(version, None) or Bank.open(store, version)
        self._banks[version] = bank
        if len(self._banks) > MAX_OPENED:
            self._banks.popitem(last=False)
        return bank
