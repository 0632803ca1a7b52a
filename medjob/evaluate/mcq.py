"""Parse the option that a generated answer chose. The last statement counts, without guessing.

Every pattern is either matched once per position with possessive quantifiers, or on a window of
limited length, so the time is linear in the length of the answer.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from medjob.evaluate import statements

_WINDOW = 100  # characters before and after a letter that can change what it says
_INVISIBLE = re.compile(r"[\u200b-\u200f\u202a-\u202e\u2066-\u2069\ufe00-\ufe0f\ufeff]")
_BOX = re.compile(r"\\(?:boxed|fbox|box)(?![a-zA-Z])")
_LATEX = re.compile(r"\\(?:[a-zA-Z]{1,20}|[^\w\s])")
_STYLE_TAG = re.compile(r"<(?:b|i|u|em|strong|code|span|p)(?: [^<>]{0,80})?>", re.IGNORECASE)
_END_TAG = re.compile(r"</[\w -]{1,40}>|<br ?/?>|<\|\w{1,30}\|>", re.IGNORECASE)
_MARKUP = str.maketrans(
    dict.fromkeys("*`$#~") | dict.fromkeys("_{}|", " ") | dict.fromkeys("“”„«»", '"')
    | dict.fromkeys("‘’", "'") | dict.fromkeys("「」『』", '"') | {"【": "[", "】": "]"}
)  # fmt: skip
_IN_WORD = r"(?![A-Za-z0-9\u00c0-\u024f]|-[A-Za-z])"  # what cannot follow a letter on its own
_LETTER = re.compile(rf"[\"'(\[]*+([A-Za-z])(?!\+){_IN_WORD}[\"')\]]*+")
_MENTION = re.compile(rf"(?<![A-Za-z0-9\u00c0-\u024f'-])[(\[]?+([A-Z]){_IN_WORD}[\"')\]]*+")
_LINE_START = re.compile(
    r"^(?:[-•→⇒✓✔✅>=]+ ?)?"
    r"(?:(?:option|choice|letter|opción|opção|letra|alternativa|选项)\s*:?\s*)?"
    r"([\"'(\[]*)([A-Za-z])"
    rf"{_IN_WORD}([\"')\]]*) ?([.):,!、–—-]*)[\"')\]]* ?",
    re.IGNORECASE,
)
_MULTIPLE = re.compile(
    r"(?:,? ?(?:[,/&+、和或及与]|\b(?:and|or|und|oder|y|o|et|ou|e|и|или|и/или|と)\b)+ ?"
    r"(?:options? )?[\"'(\[]*([A-Z])(?![A-Za-z0-9\u00c0-\u024f])[\"')\]]*)++",
    re.IGNORECASE,
)
_OPTION = re.compile(r"^(?:option|choice) ", re.IGNORECASE)
_ARTICLE = re.compile(r"(?:the|an?|la|el|le|der|die|das|o|il)\s+", re.IGNORECASE)
_MIN_NAME = 4  # characters of an option that is found by its text in any sentence


def chosen_option(text: str, options: Mapping[str, str]) -> str | None:
    """Return the letter that `text` chooses, or None.

    The first match counts:
    1. the last statement such as "the answer is B", "\\boxed{B}" or "B is correct". Negated and
       hypothetical ones do not count. If it names several options, there is no choice;
    2. the only letter that a line begins with, as in "B." or "(B) insulin". A list of the options
       does not count;
    3. the only option whose full text is in the last line, or at its beginning.
    """
    names = {key: _plain(option).rstrip(" .") for key, option in options.items()}
    answer = _Answer(_plain(text), names)
    stated = sorted(answer.statements(), key=lambda statement: statement.position)
    if stated:
        return stated[-1].letter
    return answer.letter_at_line_start() or answer.named_in_last_line()


def _plain(text: str) -> str:
    """Remove markup, and write full-width letters and typographic quotes in their plain form."""
    text = _INVISIBLE.sub("", unicodedata.normalize("NFKC", text))
    text = _LATEX.sub(" ", _BOX.sub(" answer: ", text))
    text = _END_TAG.sub("\n", _STYLE_TAG.sub("", text)).translate(_MARKUP)
    lines = (" ".join(line.split()) for line in text.splitlines())
    return "\n".join(line for line in lines if line)


@dataclass(frozen=True, slots=True)
class _Statement:
    position: int
    letter: str | None
    """None if the statement names several options."""


@dataclass(frozen=True, slots=True)
class _Answer:
    """An answer without its markup, and the options."""

    text: str
    options: Mapping[str, str]

    def statements(self) -> Iterator[_Statement]:
        """Yield the statements of a choice, in no order."""
        listed = self._listed()
        for cue in statements.CUE.finditer(self.text):
            if statements.asserts(self._before(cue.start()), cue):
                found = self._choice_at(cue.end(), lower_case=not cue["verb"])
                crossed = "\n" in cue["links"]
                if found and not (crossed and found.position in listed):
                    yield found
        for mention in _MENTION.finditer(self.text):
            if self._is_called_correct(mention):
                yield _Statement(mention.start(1), mention[1])

    def _before(self, position: int) -> str:
        """The sentence so far, as far as the window reaches."""
        return statements.last_sentence(self.text[max(0, position - _WINDOW) : position])

    def _after(self, position: int) -> str:
        return self.text[position : position + _WINDOW]

    def _choice_at(self, position: int, lower_case: bool) -> _Statement | None:
        """The option whose text or letter is at `position`, directly after a cue."""
        if statements.SEVERAL.match(self.text, position):
            by_text = self._named_at(position)
            return by_text or _Statement(position, None)
        by_letter = self._letter_at(position, lower_case)
        by_text = self._named_at(position)
        return by_letter or by_text

    def _letter_at(self, position: int, lower_case: bool) -> _Statement | None:
        match = _LETTER.match(self.text, position)
        letter = match[1].upper() if match else ""
        if match is None or letter not in self.options:
            return None
        after = self._after(match.end())
        if self._names_several(after) or self._is_in_option_list(letter, match.end()):
            return _Statement(match.start(1), None)
        if statements.takes_back(after):
            return None
        closed = match[0][-1] in ")]\"'"
        if match[1].islower() and not closed:
            ends = lower_case and statements.ENDS.match(after) is not None
        else:
            ends = statements.FOLLOWS.match(after) is not None or self._names(letter, after)
        if ends and not self._is_abbreviation(letter, after):
            return _Statement(match.start(1), letter)
        return None

    def _names(self, letter: str, after: str) -> bool:
        """Whether `after` begins with the text of the option, as in "B insulin"."""
        return _begins_with(after.lstrip(" .:,(-–—\"')]"), self.options[letter])

    def _is_abbreviation(self, letter: str, after: str) -> bool:
        """Whether a letter and a full stop are the beginning of a name, as in "E. coli"."""
        word = statements.LOWER_CASE_WORD.match(after)
        if word is None or word[1] in statements.CONTINUATIONS:
            return False
        return not self._names(letter, after)

    def _names_several(self, after: str) -> bool:
        """Whether a letter is followed by others that are chosen too, as in "A or B"."""
        match = _MULTIPLE.match(after)
        if match is None or match[1].upper() not in self.options or match[1].islower():
            return False
        return statements.VERB.match(after, match.end()) is None  # "B, and A is wrong"

    def _is_in_option_list(self, letter: str, end: int) -> bool:
        """Whether the option's text is followed by the next option, as in a list in one line."""
        following = min((key for key in self.options if key > letter), default="")
        if not following:
            return False
        longest = len(self.options[letter]) + len(self.options[following])
        rest = self.text[end : end + longest + _WINDOW].lstrip(" .:,-–—\"')]")
        if not _begins_with(rest, self.options[letter]):
            return False
        rest = rest[len(self.options[letter]) :].lstrip(' .,;/"([')
        rest = _OPTION.sub("", rest, count=1).lstrip("([")
        marked = rest[:1] == following and rest[1:2] in (".", ")", ":", "]", " ")
        return marked and _begins_with(rest[2:].lstrip(" .:)-"), self.options[following])

    def _named_at(self, position: int) -> _Statement | None:
        """The option whose text is at `position`. The longest one counts."""
        longest = max(map(len, self.options.values()), default=0)
        after = self.text[position : position + longest + _WINDOW].lstrip(" \"'([")
        after = after if self._begins_with_option(after) else _ARTICLE.sub("", after, count=1)
        found = self._begins_with_option(after)
        if found is None:
            return None
        rest = after[len(self.options[found]) :].lstrip("\"')] ")
        if statements.takes_back(rest):
            return None
        joined = statements.JOINED.match(rest)
        if joined and self._begins_with_option(rest[joined.end() :]):
            return _Statement(position, None)
        return _Statement(position, found)

    def _begins_with_option(self, text: str) -> str | None:
        found = [key for key, option in self.options.items() if _begins_with(text, option)]
        longest = max((len(self.options[key]) for key in found), default=0)
        found = [key for key in found if len(self.options[key]) == longest]
        return found[0] if len(found) == 1 else None

    def _is_called_correct(self, mention: re.Match[str]) -> bool:
        """Whether a letter is the subject of "... is correct" or "... is the best choice"."""
        letter = mention[1]
        if letter not in self.options or not statements.can_be_subject(
            self._before(mention.start())
        ):
            return False
        rest = self.text[mention.end() : mention.end() + len(self.options[letter]) + _WINDOW]
        predicate = rest.lstrip(" .:,(-–—")
        if _begins_with(predicate, self.options[letter]):
            rest = predicate[len(self.options[letter]) :].lstrip(" ),")
        match = statements.PREDICATE.match(rest)
        return match is not None and not statements.takes_back(rest[match.end() :])

    def _listed(self) -> set[int]:
        """Positions of letters that begin the lines of a list."""
        runs = self._runs()
        return {position for run in runs if len(run) > 1 for position, _ in run}

    def letter_at_line_start(self) -> str | None:
        """The only letter that begins a line outside of lists."""
        letters = {letter for run in self._runs() if len(run) == 1 for _, letter in run}
        return letters.pop() if len(letters) == 1 else None

    def _runs(self) -> list[list[tuple[int, str]]]:
        """Group the letters that begin lines into ascending runs. Lists are runs of several."""
        runs: list[list[tuple[int, str]]] = []
        for position, letter in self._line_letters():
            if runs and runs[-1][-1][1] < letter:
                runs[-1].append((position, letter))
            else:
                runs.append([(position, letter)])
        return runs

    def _line_letters(self) -> Iterator[tuple[int, str]]:
        start = 0
        lines = self.text.split("\n")
        for number, line in enumerate(lines):
            match = _LINE_START.match(line[:_WINDOW])
            letter = match[2].upper() if match else ""
            if match and letter in self.options:
                is_edge = number in (0, len(lines) - 1)
                if self._is_in_option_list(letter, start + match.end(2)):
                    continue
                if self._is_choice(match, letter, line[match.end() :], is_edge):
                    yield start + match.start(2), letter
            start += len(line) + 1

    def _is_choice(self, match: re.Match[str], letter: str, rest: str, is_edge: bool) -> bool:
        """Whether a line that begins with a letter chooses it.

        "(B) ..." does. "B. ..." and "B: ..." do if the option's text or nothing follows, and "B."
        also before a new sentence in the first or last line of the answer.
        """
        opened, closed, mark = match[1], match[3], match[4]
        beginning = rest[:_WINDOW]
        if (
            self._names_several(match[0][match.end(3) :] + beginning)
            or statements.takes_back(beginning)
            or statements.DENIAL.match(beginning)
        ):
            return False
        named = _begins_with(_ARTICLE.sub("", rest, count=1), self.options[letter])
        if named or _begins_with(rest, self.options[letter]):
            return bool(mark or closed or match[2].isupper())
        enclosed = mark.startswith(")") or (closed.endswith((")", "]")) and opened)
        if not rest or enclosed or statements.REASON.match(beginning):
            return True
        return is_edge and mark == "." and match[2].isupper() and rest[:1].isupper()

    def named_in_last_line(self) -> str | None:
        """The option that the last line begins with, or the only one in it."""
        last = self.text.rpartition("\n")[2]
        if max(self._listed(), default=-1) >= len(self.text) - len(last):
            return None
        first = self._begins_with_option(last)
        if first and statements.ENDS_NAME.match(last, len(self.options[first])):
            return first
        named = {
            key: option
            for key, option in self.options.items()
            if len(option) >= _MIN_NAME and _contains(last, option)
        }
        longest = max(named, key=lambda key: len(named[key]), default=None)
        if longest is None:
            return None
        rest = last.casefold().replace(named[longest].casefold(), " ")
        if any(_contains(rest, option) for option in named.values()):
            return None
        if statements.NEGATION.search(rest) or last.endswith("?"):
            return None
        return longest


def _begins_with(text: str, option: str, start: int = 0) -> bool:
    end = start + len(option)
    if not option or text[start:end].casefold() != option.casefold():
        return False
    return not (_in_word(text[end : end + 1]) and _in_word(option[-1]))


def _contains(text: str, option: str) -> bool:
    return bool(option) and any(
        _begins_with(text, option, match.start())
        and not (_in_word(text[max(0, match.start() - 1) : match.start()]) and _in_word(option[0]))
        for match in re.finditer(re.escape(option), text, re.IGNORECASE)
    )


def _in_word(character: str) -> bool:
    """Whether the letters beside `character` belong to its word. Chinese has no spaces."""
    return character.isalnum() and character < "\u2e80"
