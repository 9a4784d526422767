"""Near-duplicate removal from texts to the table of duplicates, against brute force over all pairs."""

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

from pipelines.clustering import (
    DeduplicationConfig,
    cluster_duplicates,
    find_duplicates,
    rank_sources,
)
from pipelines.shingling import shingle_texts
from pipelines.words import Indices
from schemas.errors import InputError
from schemas.tables import duplicates_schema

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
    hashes, offsets = shingle_texts(pa.array(texts, pa.string()), CONFIG.num_words)
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
                    "id": ids[row],
                    "kept_id": ids[kept],
                    "jaccard": measure(sets[row], sets[kept]),
                    "matched_id": ids[matched],
                    "matched_jaccard": partners[row][matched],
                    "cluster": min(ids[member] for member in cluster),
                }
            )
    return sorted(rows, key=lambda row: str(row["id"]))


@pytest.fixture(scope="module")
def corpus() -> list[str]:
    return make_corpus()


def find(texts: list[str], config: DeduplicationConfig = CONFIG) -> pa.Table:
    lengths = np.array([len(text) for text in texts], np.int64)
    return find_duplicates([make_id(text) for text in texts], pa.array(texts, pa.string()), -lengths, config)


def test_table_equals_brute_force(corpus: list[str]) -> None:
    ordered = sorted(corpus, key=make_id)
    ids, sets = [make_id(text) for text in ordered], list_sets(ordered)
    lengths = [len(text) // 40 for text in ordered]  # coarse, so that several are longest
    expected = cluster_slowly(ids, lengths, sets, find_true_pairs(sets))
    table = find_duplicates(ids, ordered, -np.array(lengths), CONFIG)
    assert table.schema == duplicates_schema("id")
    assert table.to_pylist() == expected
    assert len(expected) > 100
    assert any(row["jaccard"] != row["matched_jaccard"] for row in expected)
    assert any(row["kept_id"] != row["cluster"] for row in expected)


def keep_strictly_slowly(ids: list[str], lengths: list[int], pairs: dict[tuple[int, int], float]) -> dict[str, str]:
    kept_for: dict[str, str] = {}
    kept: set[int] = set()
    for row in sorted(range(len(ids)), key=lambda row: (-lengths[row], ids[row])):
        matching = [left + right - row for left, right in pairs if row in (left, right)]
        # The first that was kept before it takes it.
        takers = [other for other in matching if other in kept]
        if takers:
            best = min(takers, key=lambda other: (-lengths[other], ids[other]))
            kept_for[ids[row]] = ids[best]
        else:
            kept.add(row)
    return kept_for


def test_in_strict_mode_the_kept_text_matches_itself(corpus: list[str]) -> None:
    ordered = sorted(corpus, key=make_id)
    ids, lengths = [make_id(text) for text in ordered], [len(text) // 40 for text in ordered]
    expected = keep_strictly_slowly(ids, lengths, find_true_pairs(list_sets(ordered)))
    strict = DeduplicationConfig(strict=True)
    table = find_duplicates(ids, ordered, -np.array(lengths), strict)
    assert dict(zip(table["id"].to_pylist(), table["kept_id"].to_pylist(), strict=True)) == expected
    assert min(table["jaccard"].to_pylist()) >= strict.threshold
    loose = find_duplicates(ids, ordered, -np.array(lengths), CONFIG)
    assert set(expected) < set(loose["id"].to_pylist())
    assert min(loose["jaccard"].to_pylist()) < strict.threshold


def test_a_copy_of_a_dropped_text_is_dropped_with_it() -> None:
    words = [f"w{number}" for number in range(60)]
    long, short = " ".join(words[:55]), " ".join(words[:50])
    # "a" and "b" are copies; the one that is preferred of them is worse than "c", which both match.
    table = find_duplicates(
        ["a", "b", "c"], [short, short, long], np.array([5, 4, 3]), DeduplicationConfig(strict=True)
    )
    assert table["id"].to_pylist() == ["a", "b"]
    assert table["kept_id"].to_pylist() == ["c", "c"]
    assert table["jaccard"].to_pylist() == [46 / 51, 46 / 51]
    # And if one of the copies is preferred to all, it is kept, and the other copy is dropped for it.
    table = find_duplicates(
        ["a", "b", "c"], [short, short, long], np.array([5, 2, 3]), DeduplicationConfig(strict=True)
    )
    assert table["id"].to_pylist() == ["a", "c"]
    assert table["kept_id"].to_pylist() == ["b", "b"]
    assert table["jaccard"].to_pylist() == [1.0, 46 / 51]


def test_sources_are_ranked_by_the_first_pattern_they_match() -> None:
    sources = pa.array(["web/a", "docs/b", "web/gold", "other", "docs/b"])
    assert rank_sources(sources, ["*gold", "docs/*", "web/*"]).tolist() == [2, 1, 0, 3, 1]
    assert rank_sources(pa.array([], pa.string()), ["*"]).tolist() == []


@pytest.mark.parametrize("sample", range(len(SAMPLES)))
def test_a_copy_with_another_end_is_found_in_every_script(sample: int) -> None:
    text = SAMPLES[sample]
    copy = text[:-4] + text[30:33] + text[-1]
    other = SAMPLES[sample - 1]
    table = find([text, copy, other])
    assert set(table["id"].to_pylist() + table["kept_id"].to_pylist()) == {make_id(text), make_id(copy)}


@settings(max_examples=12, deadline=None)
@given(order=st.randoms(use_true_random=False), strict=st.booleans())
def test_order_does_not_matter(corpus: list[str], order: random.Random, strict: bool) -> None:
    texts = corpus[:120] + corpus[-150:]
    config = DeduplicationConfig(strict=strict)
    expected = find(texts, config)
    assert expected.num_rows > 30
    assert find(order.sample(texts, len(texts)), config).equals(expected)


def test_an_equal_text_of_another_id_is_only_dropped_itself(corpus: list[str]) -> None:
    texts, ids = corpus[:60], [make_id(text) for text in corpus[:60]]
    lengths = np.array([len(text) for text in texts])
    before = find_duplicates(ids, texts, -lengths, CONFIG)
    after = find_duplicates([*ids, "g" * 32], [*texts, texts[7]], -np.append(lengths, lengths[7]), CONFIG)
    assert after.to_pylist()[:-1] == before.to_pylist()
    last = after.to_pylist()[-1]
    assert (last["id"], last["matched_id"], last["matched_jaccard"]) == ("g" * 32, ids[7], 1.0)


def test_templated_texts_are_not_removed() -> None:
    words = sorted({word for word in topics["assignment"].split() if word.isalpha() and len(word) > 3})
    generator = random.Random(1)
    texts = [
        f"This page describes the command {' '.join(generator.sample(words, 5))}. To run it you must have the rights "
        "of an administrator on the machine, and the service must be running before the command is called by a script. "
        f"Its first argument is the name of the {' '.join(generator.sample(words, 5))}, which must not be empty."
        for _ in range(300)
    ]
    sets = list_sets(texts)
    similar = [measure(*pair) for pair in itertools.combinations(sets, 2)]
    assert 0.3 < max(similar) < CONFIG.threshold
    assert find(texts).num_rows == 0


def test_blank_texts_are_duplicates_of_nothing() -> None:
    assert find(["", " ", "\n\n", "..."]).num_rows == 0
    assert find([]).equals(duplicates_schema("id").empty_table())


def test_a_chain_keeps_one_and_says_how_far_the_others_are() -> None:
    words = [f"w{number}" for number in range(60)]
    texts = [" ".join(words[start : start + 50]) for start in (0, 4, 8)]
    table = find_duplicates(["a", "b", "c"], texts, -np.array([9, 5, 7]), CONFIG)
    near, far = 42 / 50, 38 / 54
    names = duplicates_schema("id").names
    assert table.to_pylist() == [
        dict(zip(names, ("b", "a", near, "a", near, "a"), strict=True)),
        dict(zip(names, ("c", "a", far, "b", near, "a"), strict=True)),
    ]


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
    lengths = np.array([len(text) for text in texts])
    table = find_duplicates(ids, texts, -lengths, DeduplicationConfig(max_bucket=4))
    assert table["id"].to_pylist() == ids[:300]
    assert set(table["kept_id"].to_pylist()) == {ids[600]}
    assert set(table["matched_id"].to_pylist()[1:]) == {ids[0]}
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("settings_given", "message"),
    [
        ({"num_words": 0}, "num_words is 0, must be at least 1"),
        ({"num_bands": 7}, "num_bands is 7, must divide num_permutations = 120"),
        ({"threshold": 0.0}, "threshold is 0.0, must be above 0"),
        ({"threshold": 1.5}, "threshold is 1.5"),
        ({"seed": -1}, "seed is -1"),
        ({"max_bucket": 1}, "max_bucket is 1, must be at least 2"),
        ({"keep": "best"}, "keep is 'best', must be one of longest, first, source"),
        ({"keep": "source"}, "must be given together"),
        ({"source_priority": ("a",)}, "must be given together"),
    ],
)
def test_settings_are_checked(settings_given: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        DeduplicationConfig(**settings_given)  # type: ignore[arg-type]


def test_wrong_columns_are_refused() -> None:
    def measure_nothing(pairs: Indices) -> np.ndarray:
        return np.empty(len(pairs))

    none = np.empty((0, 2), np.int64)
    with pytest.raises(InputError, match="2 ids, 1 texts and 1 preferences"):
        find_duplicates(["a", "b"], ["x"], np.array([1]), CONFIG)
    for ids in (["b", "a"], ["a", "a"]):
        with pytest.raises(InputError, match="not ascending and distinct"):
            cluster_duplicates(pa.array(ids), np.zeros(2), np.arange(2), none, np.empty(0), measure_nothing, CONFIG)
    with pytest.raises(InputError, match="not ascending and distinct"):
        find_duplicates(["a", "a"], ["x", "y"], np.array([1, 1]), CONFIG)
