"""The configuration of a build: presets, and a user's file on top of them."""

import dataclasses
import functools
import json
import math
import tomllib
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

from model.locating import REFERENCE_TOKENS, SHIPPED_MODEL
from model.tokenizing import load_tokenizer
from pipelines.chunking import ChunkingConfig
from pipelines.clustering import DeduplicationConfig
from pipelines.decontaminating import DecontaminationConfig
from pipelines.filter_presets import FILTER_PRESETS
from pipelines.filtering import FilterConfig
from pipelines.records import ReadingConfig
from pipelines.running import EngineConfig
from schemas.codec_names import DEFAULT_CODEC, is_trained, parse_codec
from schemas.errors import InputError
from schemas.protocols import EmbedderFactory, ScorerFactory, TokenizerFactory, WriterFactory

T = TypeVar("T")

CODEC_SUFFIX = ".safetensors"
"""How the name of a trained codec's file ends, by which it is told from the name of a codec."""

NO_SETTING = {"is_setting": False}
"""Marks a field that no user sets and that determines nothing."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    """The model and how it writes.

    Attributes:
        model: ``memory3-tiny`` or the folder of a transformers checkpoint.
        device: where to compute.
        compute_dtype: the type to compute in.
        dtype: the type in which key-values are stored.
        codec: how vectors are stored: a name of :mod:`schemas.codec_names`, or the path of a trained codec's file.
        num_slots: tokens kept a KV head; null, as for the two below, is what the model was trained with, and for one
            that does not say the paper's 8, ``softmax`` and false.
        score: ``softmax``, ``exp`` or ``residual``, see the selection rule.
        refit: true fits the kept values so that the slots answer as all tokens would.
        cold: True leaves memories to be encoded when they are first retrieved.
        references_per_shard: memories in a payload shard, which is also the unit of encoding, progress and resume.
    """

    model: str = SHIPPED_MODEL
    device: str = "cpu"
    compute_dtype: str = "float32"
    dtype: str = "bfloat16"
    codec: str = DEFAULT_CODEC
    num_slots: int | None = None
    score: str | None = None
    refit: bool | None = None
    cold: bool = False
    references_per_shard: int = 512

    def __post_init__(self) -> None:
        """Checks what can be checked without loading the model.

        Raises:
            InputError: an unknown type, an empty shard, or a codec that there is not or that has to be trained.
        """
        if not self.codec.endswith(CODEC_SUFFIX):
            codec = parse_codec(self.codec)
            if (is_trained(codec.keys) or is_trained(codec.values)) and not codec.digest:
                raise InputError(
                    f"memory: codec is {self.codec!r}, which has to be trained; give the file that this makes: "
                    f"memory3 codec train --name {self.codec} --bank BANK --out FILE{CODEC_SUFFIX}"
                )
        if self.references_per_shard < 1:
            raise InputError(f"memory: references_per_shard is {self.references_per_shard}, must be at least 1")
        for name in ("compute_dtype", "dtype"):
            if getattr(self, name) not in ("float32", "bfloat16", "float16"):
                raise InputError(f"memory: {name} is {getattr(self, name)!r}, must be float32, bfloat16 or float16")


@dataclasses.dataclass(frozen=True, kw_only=True)
class QualityConfig:
    """The model that scores documents, and which scores are kept; both bounds may be given.

    Attributes:
        model: folder of a transformers sequence-classification checkpoint; empty for none.
        threshold: the least score that is kept.
        top_share: the share of documents with the best scores that is kept, above 0 and up to 1.
    """

    model: str = ""
    threshold: float | None = None
    top_share: float | None = None

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            InputError: a bound without a model, a model without a bound, or a share out of bounds.
        """
        if bool(self.model) != (self.threshold is not None or self.top_share is not None):
            raise InputError(
                f"quality: model is {self.model!r}, threshold {self.threshold} and top_share {self.top_share}; "
                "a model and at least one bound must be given together"
            )
        if self.threshold is not None and not math.isfinite(self.threshold):
            raise InputError(f"quality: threshold is {self.threshold}, must be a number")
        if self.top_share is not None and not 0 < self.top_share <= 1:
            raise InputError(f"quality: top_share is {self.top_share}, must be above 0 and at most 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EmbeddingConfig:
    """The embedding model.

    Attributes:
        embedder: ``static``, ``minilm``, a folder, or a name on the Hugging Face hub.
    """

    embedder: str = "static"


@dataclasses.dataclass(frozen=True, kw_only=True)
class BuildConfig:
    """Everything that determines a bank besides its corpus, and the engine that runs the build.

    Attributes:
        codec_file: no setting, but where the parameters of a codec that ``memory`` names with its digest are now.
    """

    reading: ReadingConfig = dataclasses.field(default_factory=ReadingConfig)
    filtering: FilterConfig = dataclasses.field(default_factory=FilterConfig)
    quality: QualityConfig = dataclasses.field(default_factory=QualityConfig)
    document_deduplication: DeduplicationConfig = dataclasses.field(
        default_factory=lambda: DeduplicationConfig(enabled=False)
    )
    chunking: ChunkingConfig = dataclasses.field(default_factory=ChunkingConfig)
    decontamination: DecontaminationConfig = dataclasses.field(default_factory=DecontaminationConfig)
    deduplication: DeduplicationConfig = dataclasses.field(default_factory=DeduplicationConfig)
    embedding: EmbeddingConfig = dataclasses.field(default_factory=EmbeddingConfig)
    memory: MemoryConfig = dataclasses.field(default_factory=MemoryConfig)
    engine: EngineConfig = dataclasses.field(default_factory=EngineConfig)
    codec_file: Path | None = dataclasses.field(default=None, metadata=NO_SETTING)

    def __post_init__(self) -> None:
        """Checks what no section can check alone.

        Raises:
            InputError: references longer than memories can be written for.
        """
        if self.chunking.max_tokens > REFERENCE_TOKENS:
            raise InputError(f"chunking: max_tokens is {self.chunking.max_tokens}, must be at most {REFERENCE_TOKENS}")
        if self.chunking.title_prefix and not self.reading.title_column:
            raise InputError("chunking: title_prefix is on but reading.title_column names no column; give it")

    def make_tokenizer_factory(self) -> TokenizerFactory:
        """Returns what workers call for the model's tokenizer."""
        return functools.partial(load_tokenizer, self.memory.model)

    def make_scorer_factory(self) -> ScorerFactory:
        """Returns what workers call for the model that scores documents."""
        from model.quality import load_scorer

        return functools.partial(load_scorer, self.quality.model, device=self.memory.device)

    def make_embedder_factory(self) -> EmbedderFactory:
        """Returns what workers call for the embedding model."""
        from model.embedding import load_embedder

        return functools.partial(load_embedder, self.embedding.embedder, device=self.memory.device)

    def make_writer_factory(self) -> WriterFactory:
        """Returns what workers call for the writer of memories.

        Threads that write share the cores by units; PyTorch's own threads would wait for each other, and their number
        could show in the last bits of a memory.
        """
        from model.loading import load_writer

        return functools.partial(
            load_writer,
            self.memory.model,
            device=self.memory.device,
            compute_dtype=self.memory.compute_dtype,
            dtype=self.memory.dtype,
            num_slots=self.memory.num_slots,
            score=self.memory.score,
            refit=self.memory.refit,
            codec=self.memory.codec,
            codec_file=self.codec_file,
            num_threads=1,
        )

    def to_json(self) -> dict[str, Any]:
        """Returns the settings as JSON values."""
        values = dataclasses.asdict(dataclasses.replace(self, codec_file=None))
        del values["codec_file"]
        return json.loads(json.dumps(values))  # type: ignore[no-any-return]


def preset_tiny() -> BuildConfig:
    """The shipped model and embedder on the embedded engine: no server, no download, no GPU."""
    return BuildConfig()


def preset_paper() -> BuildConfig:
    """``tiny`` with the paper's treatment of a web corpus: its filters, and near-duplicate documents dropped."""
    return BuildConfig(filtering=FILTER_PRESETS["paper"](), document_deduplication=DeduplicationConfig())


PRESETS = {"tiny": preset_tiny, "paper": preset_paper}


def apply_changes(config: T, changes: dict[str, Any], where: str = "config") -> T:
    """Returns a configuration with some fields changed, nested ones included.

    Raises:
        InputError: an unknown key, a value of the wrong type or out of bounds.
    """
    assert dataclasses.is_dataclass(config)
    assert not isinstance(config, type)
    names = {field.name for field in dataclasses.fields(config) if field.metadata != NO_SETTING}
    hints = {name: hint for name, hint in typing.get_type_hints(type(config)).items() if name in names}
    values: dict[str, Any] = {}
    for key, value in changes.items():
        if key not in hints:
            raise InputError(f"{where} has no key {key!r}; it has {', '.join(sorted(hints))}")
        current = getattr(config, key)
        if dataclasses.is_dataclass(current):
            if not isinstance(value, dict):
                raise InputError(f"{where}.{key} is {value!r}, must be a table of settings")
            values[key] = apply_changes(current, value, f"{where}.{key}")
        else:
            values[key] = _convert(value, hints[key], f"{where}.{key}")
    return dataclasses.replace(config, **values)


def _convert(value: Any, hint: Any, where: str) -> Any:
    """Returns a value of a user's file as a field's type has it."""
    allowed = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for kind in allowed:
        if typing.get_origin(kind) is tuple and isinstance(value, list | tuple):
            return tuple(_convert(item, typing.get_args(kind)[0], f"{where}[{n}]") for n, item in enumerate(value))
        if typing.get_origin(kind) is dict and isinstance(value, dict):
            return value
    if isinstance(value, int) and not isinstance(value, bool) and float in allowed and int not in allowed:
        return float(value)
    if type(value) not in allowed:
        names = " or ".join("nothing" if kind is types.NoneType else getattr(kind, "__name__", "") for kind in allowed)
        raise InputError(f"{where} is {value!r}, must be of type {names}")
    return value


def load_config(preset: str, file: Path | None, changes: dict[str, Any], filters: str | None = None) -> BuildConfig:
    """Returns a preset with named filters, changed by a user's file (YAML or TOML), changed by further options.

    Raises:
        InputError: no such preset, the file cannot be read, or it says something unknown.
    """
    if preset not in PRESETS:
        raise InputError(f"there is no preset {preset!r}; there is {', '.join(PRESETS)}")
    config = PRESETS[preset]()
    if filters is not None:
        if filters not in FILTER_PRESETS:
            raise InputError(f"there are no filters {filters!r}; there are {', '.join(FILTER_PRESETS)}")
        config = dataclasses.replace(config, filtering=FILTER_PRESETS[filters]())
    if file is not None:
        config = apply_changes(config, read_settings(file), str(file))
    return apply_changes(config, changes)


def read_settings(file: Path) -> dict[str, Any]:
    """Returns the settings of a user's file, YAML or TOML by its name.

    Raises:
        InputError: it cannot be read, or holds no settings.
    """
    import yaml

    try:
        text = file.read_text(encoding="utf-8")
        if file.suffix == ".toml":
            value: Any = tomllib.loads(text)
        elif file.suffix in (".yaml", ".yml"):
            value = yaml.safe_load(text) or {}
        else:
            raise InputError(f"{file} is neither .yaml nor .toml; give the configuration in one of these")
    except yaml.YAMLError as error:
        raise InputError(f"{file} is not valid YAML: {str(error).splitlines()[0]}") from error
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{file} is not valid TOML: {error}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"{file} holds no settings; write for instance 'memory: {{dtype: float32}}'")
    return value
