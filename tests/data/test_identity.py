"""What makes two texts the same: words, duplicates and copies of evaluation rows."""

import random
import unicodedata
from collections.abc import Sequence

import numpy as np
import pytest

from medjob.config.prepare import Contamination
from medjob.data.contamination import ContaminationFilter, Detector
from medjob.data.dedup import Duplicates, find_duplicates
from medjob.data.dialogues import Exchange
from medjob.data.formats import Record
from medjob.data.text import _PLAIN, _PLAIN_WORD, _WORD, _normal_form, question_hash, words
from medjob.evaluate.similarity import bleu, rouge_l
from medjob.judge.scoring import token_f1

DIFFERENT = [
    ("Is the mother Rh+?", "Is the mother Rh-?"),
    ("Is the mother Rh+?", "Is the mother Rh?"),
    ("An Rh- mother", "An Rh mother"),
    ("An Rh− mother", "An Rh mother"),
    ("A potassium < 3.5", "A potassium > 3.5"),
    ("A potassium ≤ 3.5", "A potassium ≥ 3.5"),
    ("A potassium <= 3.5", "A potassium < 3.5"),
    ("A lens of +8 dioptres", "A lens of -8 dioptres"),
    ("A lens of -8 dioptres", "A lens of 8 dioptres"),
    ("A lens of −8 dioptres", "A lens of 8 dioptres"),
    ("A lens of –8 dioptres", "A lens of 8 dioptres"),
    ("Protein ++ in the urine", "Protein ++++ in the urine"),
    ("Protein + in the urine", "Protein ± in the urine"),
    ("A dose of 5 %", "A dose of 5"),
    ("An angle of 5°", "An angle of 5"),
    ("Na+ in the serum", "Na in the serum"),
    ("What is T4?", "What is T-4?"),
    ("What is a T score of -4?", "What is a T score of 4?"),
    ("Give 1.5 mg", "Give 15 mg"),
    ("Give .5 mg", "Give 5 mg"),
    ("Give 1·5 mg", "Give 15 mg"),
    ("Give 1/2 tablet", "Give 12 tablet"),
    ("Give ½ tablet", "Give 12 tablet"),
    ("Give 1½ tablets", "Give 11/2 tablets"),
    ("10^3 cells", "103 cells"),
    ("10³ cells", "103 cells"),
    ("10⁻³ mol", "10³ mol"),
    ("5 µg", "5 mg"),
    ("TSH ↑", "TSH ↓"),
    ("A → B", "A ← B"),
    ("The sex ♂", "The sex ♀"),
    ("a = b", "a ≠ b"),
    ("p<0.05", "p>0.05"),
    ("2 × 3", "2 + 3"),
    ("Adrenaline 1:1000", "Adrenaline 11000"),
    ("A mouse that is p53 -/-", "A mouse that is p53 +/+"),
    ("A mouse that is p53 -/-", "A mouse that is p53 +/-"),
    ("A (+) test", "A (-) test"),
    ("A (-) test", "A test"),
    ("ANA: -", "ANA: +"),
    ("ANA: -", "ANA"),
    ("α blockers", "β blockers"),
    ("Type Ⅱ", "Type Ⅲ"),
    ("CYP2D6*4", "CYP2D64"),
    ("温度为-8度", "温度为8度"),
    ("Rh-型", "Rh型"),
    ("दिन", "दीन"),
    ("दिन", "दान"),
    ("কলা", "কালা"),
    ("மலர்", "மாலர்"),
    ("ไม่มี", "ไม้มี"),
    ("ໄຂ້", "ໄຂ່"),
    ("ក្បាល", "កបាល"),
    ("ကား", "ကာ"),
    ("བོད", "བད"),
    ("كَتَبَ", "كُتِبَ"),
    ("סֵפֶר", "סַפָּר"),
    ("ma", "má"),
    ("か", "が"),
]


@pytest.mark.parametrize(("first", "second"), DIFFERENT)
def test_signs_and_marks_make_another_question(first: str, second: str) -> None:
    assert question_hash(first) != question_hash(second)
    assert token_f1(first, second) < 1
    assert rouge_l(first, second) < 1


EQUAL = [
    ("What is ASTHMA?", "what   is asthma"),
    ("“Fever” (high); cough, pain.", "fever high cough pain"),
    ("follow-up", "Follow up"),
    ("a 45-year-old man", "a 45 year old man"),
    ("non‑small–cell", "non small cell"),
    ("IL-6 and 5-HT", "IL 6 and 5 HT"),
    ("5mg", "5 mg"),
    ("a lens of −8", "a lens of -8"),
    ("5–10 mg", "5-10 mg"),
    ("10³", "10^3"),
    ("10⁻³", "10^-3"),
    ("½", "1/2"),
    ("+/- 5", "± 5"),
    (">= 5", "≥ 5"),
    ("p < .05", "p<0.05"),
    ("Na⁺ and H₂O", "Na+ and H2O"),
    ("5 µg", "5 μg"),
    ("37 ℃", "37 °C"),
    ("37 ºC", "37°C"),
    ("**Fever** and `pain`", "fever and pain"),
    ("# Fever", "fever"),
    ("Aspirin®", "aspirin"),
    ("ﬁbrosis", "fibrosis"),
    ("İlaç", "ilaç"),
    ("Straße", "STRASSE"),
    ("ΑΣΘΕΝΉΣ", "ασθενής"),
    ("Ｆｅｖｅｒ　３８", "fever 38"),
    ("ｶﾞﾝ", "ガン"),
    ("胸痛，三天。", "胸痛三天"),
    ("♀\ufe0f", "♀"),
    ("soft\u00adhyphen", "softhyphen"),
    ("The most likely diagnosis is-", "the most likely diagnosis is"),
    ("The most likely diagnosis is: –", "the most likely diagnosis is"),
    ("می\u200cخواهم", "میخواهم"),
    ("مـــرض", "مرض"),
    ("دواء ٣", "دواء 3"),
    ("क्या है।", "क्या है?"),
]


@pytest.mark.parametrize(("first", "second"), EQUAL)
def test_case_spacing_and_punctuation_do_not_matter(first: str, second: str) -> None:
    assert words(first) == words(second)


@pytest.mark.parametrize("text", ["Tiếng Việt", "हिन्दी", "한국어", "がん", "é", "தமிழ்"])
def test_composed_and_decomposed_text_are_equal(text: str) -> None:
    assert words(unicodedata.normalize("NFD", text)) == words(text) != []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("दिन में तीन बार", ["दिन", "में", "तीन", "बार"]),
        ("胸痛々𠀀が", ["胸", "痛", "々", "𠀀", "が"]),
        ("ประเทศไทย", ["ป", "ระ", "เท", "ศ", "ไท", "ย"]),
        ("ភាសាខ្មែរ", ["ភា", "សា", "ខ្មែ", "រ"]),
        ("မြန်မာ", ["မြ", "န်", "မာ"]),
        ("ພາສາ", ["ພາ", "ສາ"]),
        ("བོད་སྐད", ["བོད", "སྐད"]),
        ("한국어 낱말", ["한국어", "낱말"]),
        ("pH 7.4, T4 and B12", ["ph", "7.4", "t4", "and", "b12"]),
        ("Ca2+/Na+", ["ca2", "+", "/", "na", "+"]),
    ],
)
def test_words_of_other_scripts(text: str, expected: list[str]) -> None:
    assert words(text) == expected


def test_unrelated_hindi_answers_have_no_overlap() -> None:
    first, second = "बुखार में पानी पिएँ", "दाँत रोज़ साफ़ करें"
    assert token_f1(first, second) == rouge_l(first, second) == bleu(first, second) == 0


def test_both_word_patterns_find_the_same() -> None:
    """Most texts take a faster pattern."""
    generator = random.Random(0)
    letters = "aB1 .,:-–−+/*#<>=()%°×é'αβ~^_|$&@\n"
    for _ in range(3000):
        text = _normal_form("".join(generator.choices(letters, k=generator.randint(1, 12))))
        assert _PLAIN.fullmatch(text)
        assert _PLAIN_WORD.findall(text) == _WORD.findall(text), text


def duplicates(records: Sequence[Record], threshold: float | None = 0.85) -> Duplicates:
    hashes = np.array([question_hash(record.identity) for record in records], dtype=np.uint64)
    return find_duplicates(hashes, lambda: records, threshold, lambda _: None)


CASE = (
    "A 45-year-old man comes to the clinic because of a cough and a fever of 38.5 °C for 3 days. "
    "He has lost some weight over the last months, sleeps badly, sweats at night and is short of "
    "breath when he climbs stairs. He takes enalapril for high blood pressure, has smoked for 20 "
    "years and works in a quarry, where he breathes dust all day. His lungs sound dull on the left "
    "side, and a film of his chest shows small nodules in both upper lobes, with some calcium. "
    "What is the most likely diagnosis?"
)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("fever of 38.5", "fever of 39.5"),
        ("3 days", "30 days"),
        ("What is the most likely diagnosis?", "Which drug should be given first?"),
        ("the most likely diagnosis", "the least likely diagnosis"),
        ("enalapril", "metformin"),
        ("the left", "the right"),
        ("a fever", "no fever"),
        ("both upper", "both lower"),
        ("38.5", "-38.5"),
    ],
)
def test_one_word_can_make_another_question(old: str, new: str) -> None:
    changed = CASE.replace(old, new)
    assert changed != CASE
    records = [Record(CASE, response="It is silicosis."), Record(changed, response="It is not.")]
    assert duplicates(records) == Duplicates()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("climbs", "climsb"),
        ("sweats", "swets"),
        ("diagnosis", "diagnossis"),
        ("A 45-year-old", "Hello doctor, please help me with this. A 45-year-old"),
        ("diagnosis?", "diagnosis? Thank you very much"),
    ],
)
def test_typos_and_greetings_make_near_duplicates(old: str, new: str) -> None:
    changed = Record(CASE.replace(old, new), response="Another answer.")
    assert duplicates([Record(CASE, response="It is silicosis."), changed]).near == {1: 0}


def test_reworded_text_with_the_same_answer_is_a_duplicate() -> None:
    changed = CASE.replace("comes to the clinic", "sees his doctor")
    answers = ["It is silicosis.", "it is  silicosis."]
    records = [Record(CASE, response=answers[0]), Record(changed, response=answers[1])]
    assert duplicates(records).near == {1: 0}


LABEL = "Say yes if the drug below is a betablocker, and no if it is not. " * 6
PASSAGE = " ".join(CASE.split()[:60])


def _drugs(count: int) -> list[str]:
    generator = random.Random(1)
    return ["".join(generator.choices("abcdefghiklmnoprstuvwxyz", k=9)) for _ in range(count)]


SHARED = {
    "instruction before": lambda drug: Record(f"{LABEL}\n{drug}", response="Yes"),
    "instruction after": lambda drug: Record(f"Drug: {drug}\n{CASE}", response="Not at all."),
    "instruction around": lambda drug: Record(f"{LABEL} {drug} {LABEL}", response="Yes"),
    "system message": lambda drug: Record(f"What is {drug}?", system=LABEL, response="A drug."),
    "context": lambda drug: Record(f"What is {drug} for?", context=PASSAGE, response="For pain."),
    "drug in context": lambda drug: Record(LABEL, context=drug, response="A drug."),
    "passage": lambda drug: Record(f"{PASSAGE}. Is {drug} a good choice?", response="It is good."),
    "earlier turn": lambda drug: Record(
        f"And {drug}?", history=[Exchange(PASSAGE, "Take rest.")], response="It is good."
    ),
    "options": lambda drug: Record(
        f"What treats {drug} fever?",
        options={"A": PASSAGE, "B": LABEL},
        answer_idx="A",
        response=f"The answer is A. {PASSAGE}",
    ),
    "answer": lambda drug: Record(f"What is {drug}?", response=PASSAGE),
}


@pytest.mark.parametrize("count", [4, 30])
@pytest.mark.parametrize("layout", SHARED)
def test_shared_text_makes_no_duplicates_and_no_copies(layout: str, count: int) -> None:
    records = [SHARED[layout](drug) for drug in _drugs(count)]
    assert duplicates(records) == Duplicates()
    evaluation, training = records[:2], records[2:]
    kept = ContaminationFilter(evaluation, Contamination(), training)
    assert all(kept.passes(record) for record in training)


def test_duplicates_below_a_shared_instruction_are_found() -> None:
    generator = random.Random(2)
    vocabulary = _drugs(400)
    texts = [" ".join(generator.choices(vocabulary, k=30)) for _ in range(100)]
    repeats = [text[:-5] + text[-4:] for text in texts[:20]]
    instruction = " ".join(generator.choices(vocabulary, k=1200))
    records = [Record(f"{instruction}.\n{text}.", response=text[:20]) for text in texts + repeats]
    assert duplicates(records).near == {100 + i: i for i in range(20)}


def test_large_family_of_near_duplicates_keeps_one() -> None:
    long_words = [word for word in CASE.split() if word.isalpha() and len(word) > 5]
    family = {CASE.replace(w, w[:i] + w[i + 1 :], 1) for w in long_words for i in range(1, len(w))}
    records = [Record(text, response=f"Answer {i}") for i, text in enumerate([CASE, *family])]
    found = duplicates(records)
    assert len(records) > 60
    assert len(found.near) + len(found.exact) == len(records) - 1


def test_answer_that_many_rows_have_says_nothing() -> None:
    texts = [CASE.replace("enalapril", drug) for drug in _drugs(30)]
    assert duplicates([Record(text, response="Not indicated.") for text in texts]).near == {}


def test_questions_without_words_are_not_alike() -> None:
    assert duplicates([Record("???"), Record("!!"), Record("...")]) == Duplicates()


def test_another_correct_option_makes_another_question() -> None:
    options = {"A": "aspirin at night", "B": "rest and water"}
    typo = CASE.replace("climbs", "climsb")
    records = [
        Record(CASE, options=options, answer_idx="A"),
        Record(typo, options=options, answer_idx="B"),
        Record(
            typo, options=dict(zip("AB", reversed(options.values()), strict=True)), answer_idx="B"
        ),
    ]
    assert duplicates(records).near == {2: 0}


def copies(evaluation: list[Record], training: list[Record]) -> list[int]:
    kept = ContaminationFilter(evaluation, Contamination(), training)
    return [row for row, record in enumerate(training) if not kept.passes(record)]


@pytest.mark.parametrize(
    "planted",
    [
        Record(CASE, response="Silicosis."),
        Record(f"Answer this. {CASE} Think step by step.", response="Silicosis."),
        Record(f"{CASE}\nA. asthma\nB. silicosis", response="B"),
        Record("Write an exam question.", response=CASE),
        Record(CASE.replace("comes to the clinic", "sees his doctor"), response="Silicosis."),
        Record(
            CASE.replace("What is the most likely diagnosis?", "Name it."), response="Silicosis."
        ),
        Record(CASE, system="You are a doctor.", response="Silicosis."),
    ],
)
def test_planted_copy_is_found(planted: Record) -> None:
    others = [Record(f"What is {drug}?", response=f"{drug} is a drug.") for drug in _drugs(20)]
    assert copies([Record(CASE, response="Silicosis."), *others[:5]], [*others[5:], planted]) == [
        15
    ]


def test_question_that_is_copied_many_times_is_found() -> None:
    training = [Record(f"{number}. {CASE}", response="x") for number in range(15)]
    assert copies([Record(CASE)], training) == list(range(15))


def test_short_question_under_a_system_message_is_found() -> None:
    training = [Record("What is gout?", system=LABEL), Record("What is croup?", system=LABEL)]
    assert copies([Record("what is gout")], training) == [0]


def test_answer_with_a_reworded_question_is_a_copy() -> None:
    generator = random.Random(3)
    answers = [" ".join(generator.choices(_drugs(300), k=40)) for _ in range(12)]
    names = _drugs(12)
    rows = [
        Record(f"What are the signs of {name}?", response=answer)
        for name, answer in zip(names, answers, strict=True)
    ]
    reworded = Record(f"Please list the signs of {names[0]}", response=answers[0])
    assert copies(rows[:3], [*rows[3:], reworded]) == [9]


def test_numbered_types_are_different_questions() -> None:
    text = "This form is rare and is passed on by both parents. " + PASSAGE
    rows = [Record(f"What are the signs of Foo syndrome {n}?", response=text) for n in range(1, 6)]
    others = [Record(f"Is {drug} 1, 2, 3, 4 or 5?") for drug in _drugs(30)]
    assert copies(rows[:1], [*rows[1:], *others]) == []


def test_shared_prefix_of_evaluation_rows_is_ignored() -> None:
    generator = random.Random(4)
    vocabulary = _drugs(500)
    prefix = " ".join(generator.choices(vocabulary, k=300))
    rows = [
        Record(f"{prefix}\n{' '.join(generator.choices(vocabulary, k=15))}?") for _ in range(60)
    ]
    copied = Record(f"Hello. {rows[0].question}")
    assert Detector(rows[:30], Contamination(), rows[30:]).find(rows[40]) is None
    assert copies(rows[:30], [*rows[30:], copied]) == [30]
