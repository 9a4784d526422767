"""Near-duplicate removal from bands to the table of duplicates, against brute force over all pairs."""

import hashlib
import itertools
import logging
import random
from collections import defaultdict
from pydoc_data.topics import topics

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.clustering import DeduplicationConfig, cluster_duplicates, find_duplicates
from pipelines.minhashing import sign
from pipelines.pairing import (
    find_equal_sets,
    hash_bands,
    hash_sets,
    list_candidate_pairs,
    partition_keys,
    unpack_keys,
    verify_pairs,
)
from pipelines.shingling import Hashes, Indices, shingle_texts
from schemas.errors import InputError
from schemas.tables import DUPLICATES

CONFIG = DeduplicationConfig()

SAMPLES = [
    "图书馆每天早上八点开门，晚上十点关门。读者可以凭证件借阅五本书，借期为三十天。逾期不还的，每天收取一角钱的费用，"
    "遗失图书的应当照价赔偿。馆内请保持安静，不得携带食物和饮料进入阅览室。",
    "这条河发源于北方的高山，流经三个省，最后注入东海。每年春天冰雪融化，河水上涨，两岸的农民便开始引水灌溉田地。"
    "到了冬天，河面结冰，孩子们在上面滑冰，老人们凿开冰洞钓鱼。",
    "駅の前に小さなパン屋があります。毎朝六時に店が開き、焼きたてのパンの匂いが通りに広がります。会社へ行く人も学校へ行く"
    "子供も、みんなここで朝ごはんを買います。日曜日だけは休みなので、その日は通りがとても静かです。",
    "冬の山に登るときは、天気の変わりやすさに気をつけなければなりません。朝は晴れていても、昼には雪になることがあります。"
    "暖かい服と十分な食べ物を持ち、無理だと思ったらすぐに引き返してください。",
    "ตลาดแห่งนี้เปิดทุกวันตั้งแต่ตีห้าจนถึงเที่ยง ชาวสวนนำผักและผลไม้สดมาขายในราคาถูก คนในเมืองจึงชอบมาซื้อของที่นี่ "
    "ในวันหยุดจะมีคนมากเป็นพิเศษ ควรมาแต่เช้าเพื่อจะได้เลือกของดี",
    "บ้านไม้หลังเก่าตั้งอยู่ริมแม่น้ำ คุณยายอาศัยอยู่กับแมวสามตัว ทุกเย็นท่านจะนั่งที่ระเบียงมองดูเรือแล่นผ่านไปมา และเล่าเรื่องสมัยก่อนให้หลานฟังจนดึก",
    "गाँव के बाहर एक पुराना कुआँ है जिसका पानी गर्मियों में भी ठंडा रहता है। सुबह औरतें वहाँ पानी भरने आती हैं और दिन भर की बातें करती हैं। "
    "शाम को बच्चे उसके पास खेलते हैं और बूढ़े लोग पेड़ की छाया में बैठकर कहानियाँ सुनाते हैं।",
    "रेलगाड़ी हर सोमवार को सुबह सात बजे चलती है और अगले दिन दोपहर में पहाड़ों तक पहुँचती है। "
    "रास्ते में वह बारह पुल और चार सुरंगें पार करती है। यात्री खिड़की से नदियाँ और खेत देखते हुए समय बिताते हैं।",
    "도서관 앞에는 오래된 은행나무 한 그루가 서 있다. 가을이 되면 노란 잎이 온 마당을 덮고 "
    "사람들은 그 아래에서 사진을 찍는다. 겨울에는 눈이 가지마다 쌓여서 밤에도 마당이 환하게 보인다고 한다.",
]
"""Two paragraphs a language, one for Korean."""


def make_id(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def edit(text: str, num_edits: int, generator: random.Random) -> str:
    units = text.split(" ") if " " in text and ord(max(text)) < 0x0E00 else list(text)
    joint = " " if len(units) != len(text) else ""
    for _ in range(num_edits):
        place = generator.randrange(len(units))
        units[place : place + generator.choice((0, 1, 1))] = [generator.choice(units)]
    return joint.join(units)


def make_corpus() -> list[str]:
    generator = random.Random(3)
    paragraphs = {paragraph.strip() for text in topics.values() for paragraph in text.split("\n\n")}
    chosen = generator.sample(sorted(paragraph for paragraph in paragraphs if len(paragraph) > 250), 160) + SAMPLES
    copies = [edit(text, generator.choice((1, 1, 1, 2, 3, 5)), generator) for text in chosen * 2]
    spaced = [text.replace(" ", "\n").upper() for text in chosen[:20]]
    return list(dict.fromkeys(chosen + copies + spaced + [copies[0] + " and more of it", "---", "+++", "a", "b"]))


def list_sets(texts: list[str]) -> list[set[int]]:
    hashes, offsets = shingle_texts(texts, CONFIG.num_words)
    return [set(hashes[start:end].tolist()) for start, end in itertools.pairwise(offsets)]


def measure(left: set[int], right: set[int]) -> float:
    return len(left & right) / len(left | right) if left | right else 0.0


def find_true_pairs(sets: list[set[int]]) -> dict[tuple[int, int], float]:
    every = ((pair, measure(sets[pair[0]], sets[pair[1]])) for pair in itertools.combinations(range(len(sets)), 2))
    return {pair: jaccard for pair, jaccard in every if jaccard >= CONFIG.threshold}


def cluster_slowly(
    ids: list[str], lengths: list[int], sets: list[set[int]], pairs: dict[tuple[int, int], float]
) -> list[dict[str, object]]:
    partners: dict[int, dict[int, float]] = defaultdict(dict)
    for (left, right), jaccard in pairs.items():
        partners[left][right] = partners[right][left] = jaccard
    rows = []
    for row in partners:
        cluster, waiting = {row}, [row]
        while waiting:
            new = set(partners[waiting.pop()]) - cluster
            cluster |= new
            waiting.extend(new)
        kept = min(cluster, key=lambda member: (-lengths[member], ids[member]))
        matched = min(partners[row], key=lambda partner: (-partners[row][partner], ids[partner]))
        if row != kept:
            rows.append(
                {
                    "ref_id": ids[row],
                    "kept_ref_id": ids[kept],
                    "jaccard": measure(sets[row], sets[kept]),
                    "matched_ref_id": ids[matched],
                    "matched_jaccard": partners[row][matched],
                    "cluster": min(ids[member] for member in cluster),
                }
            )
    return sorted(rows, key=lambda row: str(row["ref_id"]))


def list_all_candidates(texts: list[str], config: DeduplicationConfig) -> tuple[Indices, Hashes, Indices]:
    hashes, offsets = shingle_texts(texts, config.num_words)
    keys = hash_bands(sign(hashes, offsets, config.num_permutations, config.seed), config.num_bands)
    pairs, _ = list_candidate_pairs(keys.ravel(), np.repeat(np.arange(len(texts)), config.num_bands))
    return pairs, hashes, offsets


@pytest.fixture(scope="module")
def corpus() -> list[str]:
    return make_corpus()


def find(texts: list[str], config: DeduplicationConfig = CONFIG) -> pa.Table:
    return find_duplicates([make_id(text) for text in texts], texts, [len(text) for text in texts], config)


def test_pairs_have_full_precision_and_recall(corpus: list[str]) -> None:
    sets = list_sets(corpus)
    truth = find_true_pairs(sets)
    near_threshold = [pair for pair, jaccard in truth.items() if jaccard < 0.87]
    pairs, hashes, offsets = list_all_candidates(corpus, CONFIG)
    jaccards = verify_pairs(pairs, hashes, offsets)
    assert [measure(sets[left], sets[right]) for left, right in pairs.tolist()] == jaccards.tolist()
    found = {(left, right) for left, right in pairs[jaccards >= CONFIG.threshold].tolist()}
    assert len(truth) > 150
    assert len(near_threshold) > 30
    assert found <= set(truth)
    assert len(found) >= 0.99 * len(truth)
    # The candidates are a choice, not all pairs, and verification has something to refuse.
    assert len(found) < len(pairs) < 0.02 * len(corpus) ** 2


def test_table_equals_brute_force(corpus: list[str]) -> None:
    ordered = sorted(corpus, key=make_id)
    ids, sets = [make_id(text) for text in ordered], list_sets(ordered)
    lengths = [len(text) // 40 for text in ordered]  # coarse, so that several are longest
    expected = cluster_slowly(ids, lengths, sets, find_true_pairs(sets))
    table = find_duplicates(ids, ordered, lengths, CONFIG)
    assert table.schema == DUPLICATES
    assert table.to_pylist() == expected
    assert len(expected) > 100
    assert any(row["jaccard"] != row["matched_jaccard"] for row in expected)
    assert any(row["kept_ref_id"] != row["cluster"] for row in expected)


@pytest.mark.parametrize("sample", range(len(SAMPLES)))
def test_a_copy_with_another_end_is_found_in_every_script(sample: int) -> None:
    text = SAMPLES[sample]
    copy = text[:-4] + text[30:33] + text[-1]
    other = SAMPLES[sample - 1]
    table = find([text, copy, other])
    assert set(table["ref_id"].to_pylist() + table["kept_ref_id"].to_pylist()) == {make_id(text), make_id(copy)}


@settings(max_examples=12, deadline=None)
@given(order=st.randoms(use_true_random=False), num_partitions=st.integers(1, 9), num_batches=st.integers(1, 5))
def test_order_batches_and_partitions_do_not_matter(
    corpus: list[str], order: random.Random, num_partitions: int, num_batches: int
) -> None:
    texts = corpus[:120] + corpus[-150:]
    expected = find(texts)
    assert expected.num_rows > 30
    shuffled = order.sample(texts, len(texts))
    assert find(shuffled).equals(expected)

    ordered = sorted(texts, key=make_id)
    batches = [rows for rows in np.array_split(np.arange(len(ordered)), num_batches) if len(rows)]
    shingled = [shingle_texts([ordered[row] for row in rows], CONFIG.num_words) for rows in batches]
    firsts = find_equal_sets(np.concatenate([hash_sets(*batch) for batch in shingled]))
    parts: list[list[bytes]] = [[] for _ in range(num_partitions)]
    for rows, batch in zip(batches, shingled, strict=True):
        keys = hash_bands(sign(*batch, CONFIG.num_permutations, CONFIG.seed), CONFIG.num_bands)
        compared = firsts[rows] == rows
        packed = partition_keys(keys[compared], rows[compared], num_partitions)
        for partition, part in zip(parts, packed, strict=True):
            partition.append(part)
    equal = np.flatnonzero(firsts != np.arange(len(ordered)))
    pairs = [np.stack([firsts[equal], equal], axis=1)]
    for partition in order.sample(parts, num_partitions):
        pairs.append(list_candidate_pairs(*unpack_keys(b"".join(order.sample(partition, len(partition)))))[0])
    hashes, offsets = shingle_texts(ordered, CONFIG.num_words)
    joined = np.concatenate(pairs)
    ids, lengths = [make_id(text) for text in ordered], np.array([len(text) for text in ordered])
    jaccards = verify_pairs(joined, hashes, offsets)
    assert cluster_duplicates(ids, lengths, joined, jaccards, hashes, offsets, CONFIG).equals(expected)


def test_a_reference_given_twice_changes_nothing(corpus: list[str]) -> None:
    assert find(corpus + corpus[50:90]).equals(find(corpus))


def test_an_equal_text_of_another_id_is_only_dropped_itself(corpus: list[str]) -> None:
    texts, ids = corpus[:60], [make_id(text) for text in corpus[:60]]
    lengths = [len(text) for text in texts]
    before = find_duplicates(ids, texts, lengths, CONFIG)
    after = find_duplicates([*ids, "g" * 32], [*texts, texts[7]], [*lengths, lengths[7]], CONFIG)
    assert after.to_pylist()[:-1] == before.to_pylist()
    last = after.to_pylist()[-1]
    assert (last["ref_id"], last["matched_ref_id"], last["matched_jaccard"]) == ("g" * 32, ids[7], 1.0)


def test_templated_texts_are_not_removed() -> None:
    words = sorted({word for word in topics["assignment"].split() if word.isalpha() and len(word) > 3})
    generator = random.Random(1)
    texts = [
        f"This page describes the command {' '.join(generator.sample(words, 5))}. To run it you must have the rights "
        "of an administrator on the machine, and the service must be running before the command is called by a script. "
        f"Its first argument is the name of the {' '.join(generator.sample(words, 5))}, which must not be empty."
        for _ in range(300)
    ]
    pairs, hashes, offsets = list_all_candidates(texts, CONFIG)
    assert len(pairs) > 100
    assert 0.3 < verify_pairs(pairs, hashes, offsets).max() < CONFIG.threshold
    assert find(texts).num_rows == 0


def test_blank_texts_are_duplicates_of_nothing() -> None:
    assert find(["", " ", "\n\n", "..."]).num_rows == 0
    assert find([]).equals(DUPLICATES.empty_table())


def test_a_chain_keeps_one_and_says_how_far_the_others_are() -> None:
    words = [f"w{number}" for number in range(60)]
    texts = [" ".join(words[start : start + 50]) for start in (0, 4, 8)]
    table = find_duplicates(["a", "b", "c"], texts, [9, 5, 7], CONFIG)
    near, far = 42 / 50, 38 / 54
    assert table.to_pylist() == [
        dict(zip(DUPLICATES.names, ("b", "a", near, "a", near, "a"), strict=True)),
        dict(zip(DUPLICATES.names, ("c", "a", far, "b", near, "a"), strict=True)),
    ]


def test_a_pair_that_many_partitions_found_counts_as_one() -> None:
    hashes, offsets = join_sets([{1, 2}, {1, 2}])
    pairs = np.repeat(np.array([[0, 1]]), 256, axis=0)
    table = cluster_duplicates(["a", "b"], np.array([1, 1]), pairs, np.ones(256), hashes, offsets, CONFIG)
    assert table["ref_id"].to_pylist() == ["b"]


small_sets = st.lists(st.sets(st.integers(0, 12), max_size=8), max_size=12)


@given(small_sets)
def test_equal_sets_are_found(sets: list[set[int]]) -> None:
    hashes, offsets = join_sets(sets)
    first_of: dict[frozenset[int], int] = {}
    expected = [first_of.setdefault(frozenset(values), row) if values else row for row, values in enumerate(sets)]
    assert find_equal_sets(hash_sets(hashes, offsets)).tolist() == expected


@given(small_sets.filter(bool), st.data())
def test_jaccard_is_that_of_the_sets(sets: list[set[int]], data: st.DataObject) -> None:
    row = st.integers(0, len(sets) - 1)
    pairs = data.draw(st.lists(st.tuples(row, row), max_size=20))
    jaccards = verify_pairs(np.array(pairs, np.int64).reshape(-1, 2), *join_sets(sets))
    assert jaccards.tolist() == [measure(sets[left], sets[right]) for left, right in pairs]


def join_sets(sets: list[set[int]]) -> tuple[Hashes, Indices]:
    offsets = np.zeros(len(sets) + 1, np.int64)
    np.cumsum([len(values) for values in sets], out=offsets[1:])
    return np.array([value for values in sets for value in sorted(values)], np.uint64), offsets


def test_jaccard_of_sets_larger_than_a_tile() -> None:
    generator = np.random.default_rng(2)
    sets = [set(generator.integers(0, 150_000, size).tolist()) for size in (90_000, 5, 60_000, 0)]
    pairs = np.array(list(itertools.product(range(4), repeat=2)), np.int64)
    jaccards = verify_pairs(pairs, *join_sets(sets))
    assert jaccards.tolist() == [measure(sets[left], sets[right]) for left, right in pairs.tolist()]


def test_rows_share_a_band_key_exactly_if_they_agree_in_the_band() -> None:
    signatures = np.random.default_rng(4).integers(0, 2, (200, 12)).astype(np.uint32)
    signatures[:, 3:6] = signatures[:, :3]  # two bands of equal values still have different keys
    keys = hash_bands(signatures, 4)
    bands = [(band, *signatures[row, 3 * band : 3 * band + 3].tolist()) for row in range(200) for band in range(4)]
    assert len(set(zip(bands, keys.ravel().tolist(), strict=True))) == len(set(bands)) == len(np.unique(keys))


some_keys = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 40)), max_size=120)


@given(some_keys)
def test_candidates_are_the_pairs_that_share_a_key(entries: list[tuple[int, int]]) -> None:
    buckets: dict[int, set[int]] = defaultdict(set)
    for key, row in entries:
        buckets[key].add(row)
    expected = sorted({pair for rows in buckets.values() for pair in itertools.combinations(sorted(rows), 2)})
    columns = np.array(entries, np.int64).reshape(-1, 2)
    pairs, num_skipped = list_candidate_pairs(columns[:, 0].astype(np.uint64), columns[:, 1])
    assert pairs.dtype == np.int64
    assert [(left, right) for left, right in pairs.tolist()] == expected
    assert num_skipped == 0


@given(some_keys, st.integers(2, 12))
def test_a_large_bucket_costs_no_more_than_the_bound_and_counts_its_loss(
    entries: list[tuple[int, int]], max_bucket: int
) -> None:
    buckets: dict[int, list[int]] = defaultdict(list)
    for key, row in sorted(set(entries)):
        buckets[key].append(row)
    expected, num_left_out = set(), 0
    for rows in buckets.values():
        reach = max_bucket // 2 if len(rows) > max_bucket else len(rows)
        for left, right in itertools.combinations(range(len(rows)), 2):
            if left == 0 or right - left <= reach:
                expected.add((rows[left], rows[right]))
            else:
                num_left_out += 1
    columns = np.array(entries, np.int64).reshape(-1, 2)
    pairs, num_skipped = list_candidate_pairs(columns[:, 0].astype(np.uint64), columns[:, 1], max_bucket)
    assert [(left, right) for left, right in pairs.tolist()] == sorted(expected)
    assert num_skipped == num_left_out
    assert len(pairs) <= len(entries) * (max_bucket // 2 + 1)


def test_a_cluster_larger_than_a_bucket_stays_whole(caplog: pytest.LogCaptureFixture) -> None:
    words = topics["assignment"].split()[:120]
    texts = [" ".join([*words[:60], f"number{number}", *words[60:]]) for number in range(300)]
    config = DeduplicationConfig(max_bucket=16)
    with caplog.at_level(logging.WARNING, logger="pipelines.clustering"):
        assert find(texts, config).num_rows == 299
    assert "were not compared" in caplog.text


def test_exact_copies_and_blanks_do_not_fill_buckets(caplog: pytest.LogCaptureFixture) -> None:
    texts = [SAMPLES[0]] * 300 + [""] * 300 + [SAMPLES[0] + "完"]
    ids = [f"{number:032x}" for number in range(len(texts))]
    table = find_duplicates(ids, texts, [len(text) for text in texts], DeduplicationConfig(max_bucket=4))
    assert table["ref_id"].to_pylist() == ids[:300]
    assert set(table["kept_ref_id"].to_pylist()) == {ids[600]}
    assert set(table["matched_ref_id"].to_pylist()[1:]) == {ids[0]}
    assert caplog.text == ""


@given(st.lists(st.tuples(st.integers(0, (1 << 64) - 1), st.integers(0, 1 << 40)), max_size=60), st.integers(1, 20))
def test_partitions_give_back_every_key_once(entries: list[tuple[int, int]], num_partitions: int) -> None:
    keys = np.array([[key, key ^ 1] for key, _ in entries], np.uint64).reshape(-1, 2)
    packed = partition_keys(keys, np.array([row for _, row in entries], np.int64), num_partitions)
    assert len(packed) == num_partitions
    read: list[tuple[int, int]] = []
    for partition, part in enumerate(packed):
        part_keys, part_rows = unpack_keys(part)
        assert all(key % num_partitions == partition for key in part_keys.tolist())
        read.extend(zip(part_keys.tolist(), part_rows.tolist(), strict=True))
    assert sorted(read) == sorted((key ^ flip, row) for key, row in entries for flip in (0, 1))


def test_packed_keys_are_little_endian_pairs() -> None:
    (packed,) = partition_keys(np.array([[0x0102030405060708]], np.uint64), np.array([5]), 1)
    assert packed.hex() == "0807060504030201" + "0500000000000000"


@pytest.mark.parametrize(
    ("settings_given", "message"),
    [
        ({"num_words": 0}, "num_words is 0, must be at least 1"),
        ({"num_bands": 7}, "num_bands is 7, must divide num_permutations = 120"),
        ({"threshold": 0.0}, "threshold is 0.0, must be above 0"),
        ({"threshold": 1.5}, "threshold is 1.5"),
        ({"seed": -1}, "seed is -1"),
        ({"max_bucket": 1}, "max_bucket is 1, must be at least 2"),
    ],
)
def test_settings_are_checked(settings_given: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        DeduplicationConfig(**settings_given)  # type: ignore[arg-type]


def test_wrong_columns_are_refused() -> None:
    one, none = np.array([1, 1]), np.empty((0, 2), np.int64)
    with pytest.raises(InputError, match="2 ids, 1 texts and 1 lengths"):
        find_duplicates(["a", "b"], ["x"], [1], CONFIG)
    for ids in (["b", "a"], ["a", "a"]):
        with pytest.raises(InputError, match="not ascending and distinct"):
            cluster_duplicates(ids, one, none, np.empty(0), np.empty(0, np.uint64), np.zeros(3, np.int64), CONFIG)
    with pytest.raises(InputError, match="num_bands is 3, must divide the 4 values"):
        hash_bands(np.zeros((1, 4), np.uint32), 3)
    with pytest.raises(InputError, match=r"rows are 0\.\.4294967296"):
        list_candidate_pairs(np.zeros(2, np.uint64), np.array([0, 1 << 32]))
    with pytest.raises(InputError, match="num_partitions is 0"):
        partition_keys(np.zeros((1, 1), np.uint64), np.zeros(1, np.int64), 0)
