"""Which codec a version is made with, and where the parameters of a trained one are.

A user names a codec, or the file of a trained one. From then on it is known by its name with the digest of its
parameters, in the configuration of a version as in its layout, and the parameters stand in the bank: what works on a
bank takes them from there, whatever has become of the user's file.
"""

import dataclasses
from pathlib import Path

from flows.config import CODEC_SUFFIX, BuildConfig, apply_changes
from schemas.bank import Bank
from schemas.codec_names import parse_codec
from schemas.errors import InputError
from schemas.manifest import list_versions
from schemas.stores import BankStore


def resolve_codec(config: BuildConfig, store: BankStore) -> BuildConfig:
    """Returns a configuration that names its codec with the digest of its parameters, and knows where these are.

    Args:
        config: names a codec, or the file of a trained one.
        store: the bank; a codec that is named with its digest, but without a file, must be that of the newest version.

    Raises:
        InputError: the file is no codec, or the codec has parameters that are nowhere to be found.
        BankFormatError: the file is damaged.
    """
    codec = config.memory.codec
    if codec.endswith(CODEC_SUFFIX):
        from model.codec_files import read_codec_name

        path = Path(codec).absolute()
        named = apply_changes(config, {"memory": {"codec": read_codec_name(path)}})
        return dataclasses.replace(named, codec_file=path)
    if not parse_codec(codec).digest:
        return dataclasses.replace(config, codec_file=None)
    if config.codec_file is not None:
        return config
    newest = Bank.open(store) if list_versions(store) else None
    if newest is None or newest.manifest.layout.codec != codec:
        raise InputError(f"the parameters of the codec {codec} are not in {store.url}; give the file of the codec")
    return dataclasses.replace(config, codec_file=newest.locate_codec())
