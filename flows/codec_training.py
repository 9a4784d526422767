"""``memory3 codec train``: a codec fitted to the memories of a bank, and measured on others of the same bank.

A uniform sample of the live references is encoded by the model, as for a bank, but exactly. Some of them are set aside:
on these the codec is measured, the way they are read, each by the text of another that lies near it.

Shape letters: N references, C chunks, M memories a chunk, L memory layers, H KV heads, S slots, D head dimension.
"""

import dataclasses
import tempfile
import warnings
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from flows.building import build
from flows.config import CODEC_SUFFIX, BuildConfig, apply_changes
from flows.generation import open_writer
from flows.progress import show_stage
from flows.steps import Steps
from model.checkpoint import Checkpoint
from model.codec_error import Readings, collect_readings, measure_attention_error, measure_key_metric
from model.codec_files import TrainedCodec
from model.codec_training import train_codec
from model.coding import build_codec
from model.fetching import check_fingerprint
from model.reading import CHUNK_TOKENS
from model.writing import Memories, ReferenceWriter
from pipelines.running import LOOP_RUNNER, check_stop
from schemas.bank import Bank
from schemas.codec_names import NONE, count_code_bytes, is_trained, parse_codec, parse_vector_codec
from schemas.errors import InputError
from schemas.protocols import FloatArray, IntArray
from schemas.records import ITEM_SIZES_BYTES, RecordLayout
from schemas.stores import LocalStore

MEMORIES_PER_CHUNK = 5

MAX_HELD_OUT = 200
"""References that a codec is measured on; of a small bank it is a fifth."""

MAX_READ = 400
"""References whose reading says which errors of keys matter."""

MIN_REFERENCES = 20

REFERENCES_AT_ONCE = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class CodecRequest:
    """What is asked for.

    Attributes:
        name: the codec, without digest.
        out: the file to write.
        model: the model that writes; None for that of the bank.
        num_references: references to train on, fewer if the bank has not as many.
        seed: of the sample and of the training.
    """

    name: str
    out: Path
    model: str | None = None
    num_references: int = 2000
    seed: int = 0

    def __post_init__(self) -> None:
        """Checks what can be checked before anything is loaded.

        Raises:
            InputError: no such codec, nothing to train in it, no reference, or a file that cannot be written.
        """
        parsed = parse_codec(self.name)
        if parsed.digest or not (is_trained(parsed.keys) or is_trained(parsed.values)):
            raise InputError(f"codec: name is {self.name!r}, must be one that has parameters, without their digest")
        if self.num_references < 1 or self.seed < 0:
            raise InputError(
                f"codec: references is {self.num_references} and seed {self.seed}; must be at least 1 and 0"
            )
        if self.out.suffix != CODEC_SUFFIX or not self.out.absolute().parent.is_dir() or self.out.is_dir():
            raise InputError(
                f"codec: out is {self.out}, must be a file in a folder, with a name ending in {CODEC_SUFFIX}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class CodecReport:
    """What a trained codec takes and loses.

    Attributes:
        codec: its name with the digest of its parameters.
        num_references: references it was trained on.
        num_held_out: references it was measured on.
        key_bytes: bytes of a key.
        value_bytes: bytes of a value.
        memory_bytes: bytes of the key-values of one reference.
        factor: how many times as many bytes they have as they are.
        key_snr_db: power of the keys over that of their error, in decibels.
        value_snr_db: the same for values.
        attention_error: relative error of what is read from the memories.
        file_bytes: bytes of the codec's file.
        notes: what could make the codec better.
    """

    codec: str
    num_references: int
    num_held_out: int
    key_bytes: int
    value_bytes: int
    memory_bytes: int
    factor: float
    key_snr_db: float
    value_snr_db: float
    attention_error: float
    file_bytes: int
    notes: list[str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
    """References of a bank with their memories.

    Attributes:
        tokens: token ids of each.
        vectors: their embeddings, float32 (N, dimension).
        memories: their memories, exact.
    """

    tokens: list[IntArray]
    vectors: FloatArray
    memories: Memories


def sample_references(
    bank: Bank, num_references: int, seed: int, *, num_held_out: int = MAX_HELD_OUT
) -> tuple[list[str], list[str]]:
    """Draws live references uniformly: those to train on, and others to measure on; the same for the same seed.

    Args:
        bank: where they are from.
        num_references: references to train on at most.
        seed: of the sample.
        num_held_out: references to measure on at most; of a small bank it is a fifth.

    Raises:
        InputError: the bank has too few.
    """
    ids = bank.read_table("embeddings", ["ref_id"])["ref_id"].combine_chunks()
    live = ids.filter(pc.invert(pc.is_in(ids, value_set=bank.read_dropped_ids())))
    if len(live) < MIN_REFERENCES:
        raise InputError(
            f"{bank.url} has {len(live)} live references, a codec needs at least {MIN_REFERENCES} to be trained and "
            "measured on; give a larger corpus"
        )
    shuffled = live.sort().take(pa.array(np.random.default_rng(seed).permutation(len(live)))).to_pylist()
    num_held_out = min(num_held_out, len(live) // 5)
    return shuffled[num_held_out:][:num_references], shuffled[:num_held_out]


def encode_sample(bank: Bank, writer: ReferenceWriter, ref_ids: list[str], stage: str) -> Sample:
    """Encodes references of a bank again, under a progress bar named after the stage.

    Raises:
        StoppedError: a stop was asked for.
    """
    rows = bank.read_references(ref_ids, ["token_ids"])
    tokens: list[IntArray] = [np.asarray(ids, dtype=np.int32) for ids in rows["token_ids"].to_pylist()]
    stored = bank.read_rows("embeddings", "ref_id", ref_ids, ["ref_id", "vector"]).combine_chunks()
    order = pc.index_in(pa.array(ref_ids), value_set=stored["ref_id"].combine_chunks())
    vectors = stored["vector"].combine_chunks().take(order)
    payloads: list[torch.Tensor] = []
    offsets: list[torch.Tensor] = []
    with show_stage(stage, len(tokens), "references", lambda: sum(map(len, payloads))):
        for start in range(0, len(tokens), REFERENCES_AT_ONCE):
            check_stop()
            written = writer.write(tokens[start : start + REFERENCES_AT_ONCE])
            payloads.append(torch.from_numpy(written.payload))
            offsets.append(torch.from_numpy(written.offsets.astype(np.int64)))
    keys_NLHSD, values_NLHSD = writer.codec.decode(torch.cat(payloads), torch.float32)
    device = writer.checkpoint.device
    memories = Memories(
        keys_LBHSD=keys_NLHSD.transpose(0, 1).to(device),
        values_LBHSD=values_NLHSD.transpose(0, 1).to(device),
        offsets_LBHS=torch.cat(offsets).transpose(0, 1).to(device),
    )
    return Sample(tokens=tokens, vectors=vectors.flatten().to_numpy().reshape(len(ref_ids), -1), memories=memories)


def read_neighbours(checkpoint: Checkpoint, sample: Sample) -> Readings:
    """Reads the text of each reference of a sample with the memories of those that lie nearest to it.

    Raises:
        InputError: no reference has as many tokens as a chunk.
    """
    similarities_NN = sample.vectors @ sample.vectors.T
    np.fill_diagonal(similarities_NN, -np.inf)
    num_read = min(MEMORIES_PER_CHUNK, len(similarities_NN) - 1)
    nearest_NM = np.argsort(-similarities_NN, axis=1, kind="stable")[:, :num_read]
    passages, indexes_CM = [], []
    for tokens, nearest_M in zip(sample.tokens, nearest_NM, strict=True):
        passage = np.concatenate((np.array(checkpoint.bos_token_ids, np.int32), tokens))
        num_chunks = len(passage) // CHUNK_TOKENS
        if num_chunks:
            passages.append(passage[: num_chunks * CHUNK_TOKENS])
            indexes_CM.append(torch.from_numpy(nearest_M).expand(num_chunks, -1))
    if not passages:
        raise InputError(f"no reference has {CHUNK_TOKENS} tokens, so that nothing can be read; give longer texts")
    return collect_readings(checkpoint, passages, sample.memories, indexes_CM)


def _cut(sample: Sample, num_references: int) -> Sample:
    memories = {name: part[:, :num_references] for name, part in vars(sample.memories).items()}
    return Sample(
        tokens=sample.tokens[:num_references], vectors=sample.vectors[:num_references], memories=Memories(**memories)
    )


def compute_snr_db(right: torch.Tensor, found: torch.Tensor) -> float:
    """Returns the power of vectors over that of their error, in decibels."""
    error = (found - right).double().square().sum() / right.double().square().sum()
    return float(-10 * error.log10())


def _measure(
    trained: TrainedCodec, layout: RecordLayout, checkpoint: Checkpoint, held_out: Sample
) -> tuple[float, float, float]:
    """Returns the signal-to-noise ratios of keys and values in decibels, and the error of attention."""
    codec = build_codec(trained, num_slots=layout.num_slots, dtype=layout.dtype, device=checkpoint.device)
    keys_NLHSD = held_out.memories.keys_LBHSD.transpose(0, 1)
    values_NLHSD = held_out.memories.values_LBHSD.transpose(0, 1)
    found_keys, found_values = codec.decode(codec.encode(keys_NLHSD, values_NLHSD), torch.float32)
    error = measure_attention_error(checkpoint, read_neighbours(checkpoint, held_out), found_keys, found_values)
    return compute_snr_db(keys_NLHSD, found_keys), compute_snr_db(values_NLHSD, found_values), error


def train_on_bank(bank: Bank, wanted: CodecRequest) -> CodecReport:
    """Trains a codec on the memories of a version, writes its file and measures it.

    Raises:
        InputError: too few references, or the codec is not for vectors of the model's size.
        WrongModelError: the bank was written by another model.
        StoppedError: a stop was asked for; no file is written.
    """
    model = bank.manifest.config["memory"]["model"] if wanted.model is None else wanted.model
    with show_stage("models"):
        stored = open_writer(bank, model)
        check_fingerprint(bank.url, bank.manifest.fingerprint, stored)
    writer = ReferenceWriter(stored.checkpoint, stored.selection, dtype="float32")
    layout = bank.manifest.layout
    for name in (parse_codec(wanted.name).keys, parse_codec(wanted.name).values):
        count_code_bytes(name, layout.head_dim, ITEM_SIZES_BYTES[layout.dtype])
    chosen, set_aside = sample_references(bank, wanted.num_references, wanted.seed)
    sample = encode_sample(bank, writer, chosen, "encode")
    held_out = encode_sample(bank, writer, set_aside, "hold out")
    metric_LHDD = None
    if parse_vector_codec(parse_codec(wanted.name).keys).mapped:
        with show_stage("read"):
            read = read_neighbours(writer.checkpoint, _cut(sample, MAX_READ))
            metric_LHDD = measure_key_metric(writer.checkpoint, read)
    check_stop()
    with show_stage("train"), warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        trained = train_codec(
            wanted.name,
            sample.memories.keys_LBHSD.transpose(0, 1),
            sample.memories.values_LBHSD.transpose(0, 1),
            key_metric_LHDD=metric_LHDD,
            seed=wanted.seed,
        )
    check_stop()
    with show_stage("measure"):
        key_snr_db, value_snr_db, error = _measure(trained, layout, writer.checkpoint, held_out)
    check_stop()
    trained.save(wanted.out)
    coded, plain = (dataclasses.replace(layout, codec=codec) for codec in (trained.name, NONE))
    return CodecReport(
        codec=trained.name,
        num_references=int(trained.training["references"]),
        num_held_out=len(set_aside),
        key_bytes=coded.key_bytes,
        value_bytes=coded.value_bytes,
        memory_bytes=coded.payload_bytes,
        factor=round(plain.payload_bytes / coded.payload_bytes, 2),
        key_snr_db=round(key_snr_db, 2),
        value_snr_db=round(value_snr_db, 2),
        attention_error=round(error, 5),
        file_bytes=wanted.out.stat().st_size,
        notes=sorted({str(warning.message) for warning in warned}),
    )


def train_on_corpus(corpus: list[str], wanted: CodecRequest) -> CodecReport:
    """Trains a codec as :func:`train_on_bank` does, on the references of a corpus.

    Raises:
        CorpusError: the corpus cannot be read.
        BankError: see :func:`train_on_bank`.
    """
    changes = {} if wanted.model is None else {"model": wanted.model}
    settings = {"memory": {**changes, "cold": True}, "engine": {"runner": LOOP_RUNNER}}
    config = apply_changes(BuildConfig(), settings)
    with tempfile.TemporaryDirectory(prefix="memory3-codec-") as folder:
        store = LocalStore(Path(folder) / "bank")
        build(store, corpus, config, Steps())
        return train_on_bank(Bank.open(store), wanted)
