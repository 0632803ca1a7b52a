"""Words that state, deny or join choices, in the languages of common medical data sets."""

from __future__ import annotations

import re
import unicodedata

_QUALIFIED = (
    r"(?:(?:final|correct|best|right|true|most (?:likely|appropriate|suitable|accurate))\s)"
)
# Nouns after which a letter is the answer.
_NOUNS = (
    # English
    rf"\b{_QUALIFIED}{{0,2}}answer(?!ed|ing|s\b|\s(?:choices|options|sheet))"
    r"(?:\s(?:key|choice|option|letter|idx|index|id))?"
    rf"|\b{_QUALIFIED}{{1,2}}(?:options?|choice|letter|response|alternative|statement)\b"
    r"|\bans(?:\.|\b)|(?:^|(?<=\n))a:"
    # Chinese, Japanese, Korean
    r"|正确的(?=是)|答(?=\s?[:选選])|(?:正确|最佳|最终)?(?:答案|選項|选项(?=\s?[:是为]))|(?<!首)(?<!挑)[选選](?:择|擇)?(?![项項题題择擇])"
    r"|正解|答え|解答|回答|정답|(?<![가-힣])답(?=[은는: ])"
    # European languages
    r"|\brespuesta(?:\s(?:correcta|final))?|\b(?:opción|alternativa)\scorrecta|\bla\scorrecta(?=\ses)"
    r"|\bréponse(?:\s(?:correcte|finale|exacte))?|\bbonne\soption"
    r"|\bantwort(?:option)?\b|\b(?:richtige|korrekte)\soption|\brichtig(?=\sist)"
    r"|\bresposta(?:\s(?:correta|certa|final))?|\b(?:opção|alternativa)\s(?:correta|certa)"
    r"|\bgabarito|\brisposta(?:\s(?:corretta|giusta|esatta))?|\bantwoord\b|\bsvar(?:et)?\b"
    r"|\bvastaus\b|\bodpowied[źz]\b|\bodpověď\b|\brăspuns(?:ul)?(?:\scorect)?|\bválasz\b|απάντηση"
    r"|\bправильный\sвариант\b|\bответ\b|\bвідповідь\b|\bcevap\b|\byanıt\b"
    # Asian and Semitic languages
    r"|\bjawaban(?:nya)?(?:\syang\s(?:benar|tepat))?|\bđáp\sán(?:\sđúng)?"
    r"|\btrả\slời(?=:)|\bcâu\strả\slời(?:\sđúng)?|คำตอบ(?:ที่ถูกต้อง)?|सही\sविकल्प|उत्तर|জবাব|উত্তর|பதில்|సమాధానం"
    r"|الخيار\sالصحيح|ال[إا]جاب[ةه](?:\sالصحيحة)?|الجواب(?:\sالصحيح)?|پاسخ(?:\sصحیح)?|جواب|گزینه"
    r"|התשובה(?:\sהנכונה)?"
)
# Nouns after which a letter is the answer only with a verb or a colon in between.
_WEAK = (
    rf"\b{_QUALIFIED}(?:[a-z]+\s){{0,3}}?(?:diagnosis|step|treatment|therapy|drug|test|management"
    r"|cause|organism|explanation|finding|one)\b"
    r"|\b(?:my\s(?:pick|selection)|(?:my\s)?(?:option|choice|letter)|conclusion|response|solution|key"
    r"|correct|opción|opção|letra|choix|lösung)\b"
)
# Verbs of a choice.
_CHOICES = (
    r"\b(?:i|we|let\sus|let's)(?:'d|'ll|'m|\swould|\swill|\smust|\sshould|\shave\sto|\sam)?(?:\sgoing\sto)?"
    r"(?:\s(?:therefore|thus|then|also|definitely|probably|confidently))?\s"
    r"(?:choose|chose|pick|select|selected|(?:go|going|went)\swith|(?:would\s)?opt\sfor|settle\son"
    r"|(?:answer|say|think|believe|guess|conclude)(?:\sthat)?)(?:\sit(?:'s|\sis|\swould\sbe)?)?\b"
    r"|(?:^|(?<=[.!:;\n]\s)|(?<=\n))(?:please\s)?(?:choose|select|pick)\b"
    r"|\b(?:therefore|thus|hence|so),?\s(?:(?:it|this)(?:'s|\sis|\smust\sbe)\b)?"
    r"|\bin\s(?:conclusion|summary|short),|\bbased\son\s(?:this|that|the\sabove),"
    r"|\bit(?:'s|\sis|\smust\sbe|\shas\sto\sbe)\b"
)
_LINK_WORDS = (
    r"to\s(?:this|the)\squestion|(?:in|of)\s(?:the\s)?(?:management|treatment)"
    r"|(?:of|for|in)\s(?:this|the)\s(?:patient|case)|is|was|are|would|should|must|be|to|seems|appears|will|has|the|option|choice|letter|answer"
    r"|number|correct|right|best|therefore|thus|hence|clearly|definitely|probably|likely|most|simply"
    r"|then|i\s(?:think|believe|would\ssay|choose)|in\sthis\scase|here|given"
    r"|not\s[A-Z],?\sbut(?:\srather)?"
    r"|es|sería|la|el|opción|letra|correcta|est|sera|serait|donc|lettre|l'option|le|choix|ist|lautet"
    r"|wäre|daher|also|die|buchstabe|é|seria|opção|alternativa|correta|certa|è|sarebbe|lettera|corretta"
    r"|het|er|är|on|je|jest|to|brzmi|este|adalah|là|a\s(?=(?:letra|opção|alternativa|[B-Z]\b))"
)
_LINK_CHARACTERS = (
    r"[\s:=>\"'(\[\]<–—→⇒-]|应该|應該|应当|应|應|是|为|為|选项|选|選|項|项|は|が|を|은|는|이|है|हैं"
    r"|هي|هو|היא|คือ|это|является|:|،"
)
_LINK = rf"(?:{_LINK_CHARACTERS}|\b(?:{_LINK_WORDS})\b)"
CUE = re.compile(
    # Answers are in this form too. It splits a Thai vowel, for example.
    unicodedata.normalize(
        "NFKC",
        rf"(?:(?P<noun>{_NOUNS})|(?P<weak>{_WEAK})|(?P<verb>{_CHOICES}))"
        rf"(?P<links>(?:{_LINK}){{0,30}}+)",
    ),
    re.IGNORECASE | re.MULTILINE,
)
"""A phrase after which a letter or the text of an option is a choice."""
_COPULA = re.compile(
    r"[:=>→⇒\n–—]|\s-\s|\b(?:is|was|be|es|sería|est|sera|serait|ist|lautet|wäre|é|seria|è|on|er|je)\b",
    re.IGNORECASE,
)
_SENTENCE_END = re.compile(r".*(?:[.!?;。！？]\s|[\n。；！？])", re.DOTALL)
_NOT_ASSERTED = re.compile(
    r"(?:"
    # The word before the cue denies it.
    r"(?:\b(?:not|never|nor|neither|no|wrong|incorrect|false|worst|unlike|than|without|except|if"
    r"|whether|unless|suppose|assuming|nicht|falsche|kein|keine|pas|mauvaise|incorrecta|errada"
    r"|least(?:\s\w+)?|exclud\w+|eliminat\w+|reject\w*|dismiss\w*|discard\w*|rul\w+\sout|instead\sof)|n't)"
    r"(?:\s(?:the|an?|is|was|my|that|be|choose|die|la|le|a)){0,2}"
    # A sentence about what is not thought, or what others might think.
    r"|(?:\b(?:not|never|cannot|unlikely|doubt\w*|wrong|false|mistake\w*|incorrect|disagree|one|some"
    r"|many|people|students|others|tempt\w*|might|may|could|initial\w*|first)|n't)"
    r"(?:\s[\w']+){0,3}\s(?:think|thought|say|said|saying|believe|suppose|argue|assume|assuming|guess|expect"
    r"|claim|agree|conclude|mean|sure|certain|clear|true|likely|possible|case|right|that|answer)"
    r"(?:\s(?:that|the|it|is|if|whether|to)){0,3}"
    r"|[不非没沒別别勿未](?:[会會能应應可]|应该|是)?"
    r")\s?$",
    re.IGNORECASE,
)
SEVERAL = re.compile(r"(?:both|either|neither|one of|between|any of)\b", re.IGNORECASE)
"""Words after a cue that announce several options."""
_REASONS = (
    r"because|since|as|due|given|based|which|por|porque|ya que|pois|car|parce|puisque|weil|da|denn"
    r"|perché|потому|因为|因為"
)
CONTINUATIONS = frozenset(
    ("because", "since", "as", "this", "the", "it", "its", "these", "that", "he", "she", "in")
) | {"so", "due", "given", "based", "which", "explanation", "reason", "and", "but", "not"}
"""Words in lower case that can follow "B." without being part of a name such as "E. coli"."""
LOWER_CASE_WORD = re.compile(r"\. ?([a-z]{3,})")
ENDS = re.compile(r"\s*(?:$|[\n;!。<]|[.,:](?:\s|$))")
"""What follows a chosen letter in lower case."""
FOLLOWS = re.compile(
    r"\s*(?:$|[\n.,;:!…。、<\])/&\"।۔✓✔✅]|[(\[–—]|-\s|->)"
    rf"|\s+(?:{_REASONS}|for|in|but|not|rather|here|and\s(?:not|the|it|this|that|so))\b"
    r"|\s?(?:[选選]?[项項](?:[,。.;]|$|[是为為]?正确)|[选選][项項]|です|だ|である|입니다|이다|번|예요|है|हैं|است|'?d[iıuü]r\b"
    r"|şıkkı|er\b|är\b)"
    r"|\s(?:olmalı|olacak|aan|ist\s(?:richtig|korrekt))",
    re.IGNORECASE,
)
"""What follows a letter in upper case, if it is not the beginning of a phrase."""
_TAKES_BACK = re.compile(
    r"[\"')\]]*\s*\?"
    r"|[\"')\].,;:\s–—-]{0,4}(?:no,? (?:wait|that|it|sorry)|wait\b|actually,? no\b|or rather"
    r"|that(?:'s| is| would be) (?:wrong|incorrect|not|false))"
    r"|,? (?:which )?(?:is|are|was|would be|seems)"
    r" (?:not\b|wrong|incorrect|false|inappropriate|unlikely)"
    r"|,? (?:isn't|wasn't|can't|cannot|does not|doesn't)\b",
    re.IGNORECASE,
)
DENIAL = re.compile(
    r".{0,60}?(?:\b(?:is|are|was|would be) (?:not|wrong|incorrect|false|unlikely|inappropriate)"
    r"|isn't\b|\b(?:wrong|incorrect)\b|错误|不正确|不对|不是)",
    re.IGNORECASE,
)
"""A line about an option that denies it."""
REASON = re.compile(rf"(?:{_REASONS})\b", re.IGNORECASE)
VERB = re.compile(
    r"\s(?:is|are|was|were|would|does|do|can|cannot|can't|may|seems?|has|have|will)\b"
    r"|\s?(?:是|不|错|均|都)",
    re.IGNORECASE,
)
JOINED = re.compile(r"\s?(?:,|/|&|\band\b|\bor\b|和|或)\s?(?:the |an? )?", re.IGNORECASE)
ENDS_NAME = re.compile(r"[\"')\]]*(?:$|[.,:;!。])")
NEGATION = re.compile(
    r"\b(?:not|no|never|cannot|wrong|incorrect|avoid\w*|contraindicat\w*|except|without|neither|nor"
    r"|rather than|instead of|unlikely|exclud\w+|rul\w+ out|nicht|kein\w*|pas|nunca|ni|não|non)\b"
    r"|n't\b|[不非没無无未]|없|아니|नहीं|ليس|لا\b",
    re.IGNORECASE,
)
"""Words that deny, or may deny, what a sentence names."""
_CAN_BE_SUBJECT = re.compile(
    r"(?:^|[\n,:;(\"–—-]\s?|、|\b(?:option|choice|answer|letter|statement|so|thus|hence|therefore"
    r"|that|and|but|think|believe|because|since|only|then|clearly|definitely|why|say|conclude|makes"
    r"|making|leaves|leaving|left\swith|la|die|der|opción|alternativa|opção|letra|réponse|antwort"
    r"|respuesta|resposta)\s\(?|[选選][项項]\s?|[故以此则]\s?)$",
    re.IGNORECASE,
)
_ADVERBS = (
    r"(?:(?:therefore|thus|clearly|indeed|definitely|probably|likely|obviously|actually|then)\s)?"
)
_ENDS_PREDICATE = r"(?=\s*(?:$|[.,;:!)\]\n。]|because|since|as\b|for\b|here|in\b|given|and\b))"
_IS = r"(?:(?:is|was|would\sbe|must\sbe|should\sbe)|(?:seems|appears)(?:\sto\sbe)?)"
_PRAISE = (
    r"(?:only|single|one|most|best|final|correct|right|true|likely|appropriate|accurate|suitable"
    r"|probable|plausible|logical|reasonable)\s"
)
_SUBJECTS = r"step|diagnosis|treatment|therapy|test|management|cause|explanation|organism"
PREDICATE = re.compile(
    r"\s?,?\s?(?:(?:选项|选項|項|项)?(?:才)?(?:是|为|為)?(?:最佳|最|符合)?"
    r"(?:正确|正確|对的|答案|合适|恰当|题意)"
    r"|(?:が|は)(?:最も)?(?:正解|正しい|答え|適切)|(?:번)?[이가은는]\s?(?:정답|맞|옳)"
    rf"|{_IS}\s{_ADVERBS}(?:the\s|my\s|our\s)?(?:{_PRAISE}){{0,4}}"
    rf"(?:(?:answer|choice|option|response|alternative)\b|(?:correct|right|true|best)\b{_ENDS_PREDICATE})"
    rf"|{_IS}\s{_ADVERBS}(?:the\s)?(?:best|most\s(?:likely|appropriate|suitable|probable|accurate))"
    rf"(?:\s(?:next\s)?(?:{_SUBJECTS}))?\b{_ENDS_PREDICATE}"
    rf"|(?:as\s)?the\s(?:{_PRAISE}){{1,4}}(?:answer|choice|option)\b|as\sthe\sanswer\b"
    rf"|(?:fits\sbest|best\sfits)\b{_ENDS_PREDICATE}"
    r"|es\s(?:la\s)?(?:respuesta|opción|alternativa)?\s?(?:correcta|adecuada)"
    r"|est\s(?:la\s)?(?:bonne\s(?:réponse|option)|réponse\s(?:correcte|exacte)|correcte?|juste)"
    r"|ist\s(?:die\s)?(?:richtige?|korrekte?|beste)(?:\s(?:antwort|option))?"
    r"|é\s(?:a\s)?(?:resposta|alternativa|opção)?\s?(?:correta|certa)"
    r"|è\s(?:la\s)?(?:risposta|opzione)?\s?(?:corretta|giusta|esatta)"
    r"|सही\sहै|صحيحة|است)",
    re.IGNORECASE,
)
"""What calls the letter before it correct."""


def asserts(before: str, cue: re.Match[str]) -> bool:
    """Whether a cue states a choice: it is not denied, and has a verb or colon if it needs one.

    Args:
        before: The sentence before the cue.
    """
    if cue["weak"] and not _COPULA.search(cue["links"]):
        return False
    return _NOT_ASSERTED.search(before) is None


def last_sentence(text: str) -> str:
    """Return what follows the last end of a sentence."""
    end = _SENTENCE_END.match(text)
    return text[end.end() :] if end else text


def can_be_subject(before: str) -> bool:
    """Whether a letter after `before` can be an option that the sentence is about, unlike the one
    in "hepatitis B"."""
    return _CAN_BE_SUBJECT.search(before) is not None and _NOT_ASSERTED.search(before) is None


def takes_back(after: str) -> bool:
    """Whether a choice is a question, or is denied or corrected directly after it."""
    return _TAKES_BACK.match(after) is not None
