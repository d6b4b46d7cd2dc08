"""English pronunciations by spelling rules, for words that a dictionary does not know."""

import hashlib
import re

# Spellings and their ARPABET phones; of the rules that fit at a letter, the first counts. Lower case letters only;
# `<` is the beginning and `>` the end of a word, both in context only.
_RULES = (
    # Endings
    ("ation", "EY SH AH N"),
    ("at(?=ing>|ed>|ors?>|e[sd]?>)", "EY T"),
    ("ology(?=>)", "AA L AH JH IY"),
    ("iz(?=ing>)", "AY Z"),
    ("tion", "SH AH N"),
    ("(?<=s)sion|(?<=[ln])sion", "SH AH N"),
    ("sion", "ZH AH N"),
    ("cian(?=s?>)", "SH AH N"),
    ("ture(?=[sd]?>)", "CH ER"),
    ("(?<=[td])ed(?=>)", "AH D"),
    ("(?<=[pkfcsx])ed(?=>)|(?<=[sc]h)ed(?=>)", "T"),
    ("(?<=[a-z][a-z])ed(?=>)", "D"),
    ("(?<=[sxz])es(?=>)|(?<=[sc]h)es(?=>)|(?<=[cg])es(?=>)", "AH Z"),
    ("'s(?=>)", "Z"),
    ("tial", "SH AH L"),
    ("cial", "SH AH L"),
    ("tious|cious", "SH AH S"),
    ("ous(?=>)", "AH S"),
    ("(?<=[bcdfgkptz])le(?=s?>)", "AH L"),
    ("(?<=[a-z][a-z])ing(?=s?>)", "IH NG"),
    ("(?<=[a-z])y(?=>)", "IY"),
    ("ism(?=s?>)", "IH Z AH M"),
    ("age(?=>)", "IH JH"),
    ("(?<=[a-z])able(?=>)", "AH B AH L"),
    ("(?<=[a-z][a-z])ment(?=s?>)", "M AH N T"),
    ("(?<=[a-z][a-z])ness(?=>)", "N AH S"),
    ("(?<=[a-z][a-z])man(?=>)", "M AH N"),
    ("(?<=[a-z][a-z])al(?=s?>)", "AH L"),
    ("(?<=[a-z][a-z])el(?=s?>)", "AH L"),
    ("(?<=[a-z][a-z])en(?=s?>)", "AH N"),
    ("(?<=[a-z][a-z])on(?=s?>)", "AH N"),
    ("(?<=[a-z][a-z])ia(?=>)", "IY AH"),
    ("(?<=[a-z][a-z])a(?=>)", "AH"),
    # Silent letters at the beginning
    ("(?<=<)(?:kn|gn|pn)", "N"),
    ("(?<=<)wr", "R"),
    ("(?<=<)ps(?=[aeiouy])", "S"),
    ("(?<=<)wh(?=o)", "HH"),
    ("(?<=<)x", "Z"),
    ("(?<=<)mc", "M AH K"),
    # Vowel groups
    ("eigh", "EY"),
    ("igh", "AY"),
    ("augh|ough(?=t)", "AO"),
    ("ough", "OW"),
    ("eau", "OW"),
    ("air", "EH R"),
    ("ear(?=[nlt])", "ER"),
    ("eer|ear", "IH R"),
    ("oor|oar|our", "AO R"),
    ("ire(?=[sd]?>)", "AY ER"),
    ("are(?=[sd]?>)", "EH R"),
    ("ore(?=[sd]?>)", "AO R"),
    ("ure(?=[sd]?>)", "Y UH R"),
    ("(?<=w)ar", "AO R"),
    ("(?<=w)or", "ER"),
    ("(?<=[a-z][bdlmt])ar(?=s?>)", "ER"),
    ("ar(?![aeiouyr])", "AA R"),
    ("(?:er|ir|ur)(?![aeiouyr])", "ER"),
    ("er(?=[aeiouy])", "ER"),
    ("or(?=s?>)", "ER"),
    ("or", "AO R"),
    ("ai|ay|ei(?=[gn])", "EY"),
    ("au|aw", "AO"),
    ("ee|ea|ie(?=[a-z])", "IY"),
    ("ei", "AY"),
    ("eu|ew", "UW"),
    ("ey(?=>)", "IY"),
    ("ey", "EY"),
    ("ie(?=>)", "IY"),
    ("io", "IY OW"),
    ("ia", "IY AH"),
    ("oa|oe(?=s?>)", "OW"),
    ("oo(?=k)", "UH"),
    ("oo", "UW"),
    ("oi|oy", "OY"),
    ("ou", "AW"),
    ("ow(?=>|s>|n>)", "OW"),
    ("ow", "AW"),
    ("gue(?=s?>)", "G"),
    ("ue|ui", "UW"),
    # Long vowels before a consonant and a silent e
    ("a(?=[bcdfgklmnpstvz]e[sd]?>)", "EY"),
    ("e(?=[bcdfgklmnpstvz]e[sd]?>)", "IY"),
    ("i(?=ve>)", "IH"),
    ("i(?=[bcdfgklmnpstvz]e[sd]?>)", "AY"),
    ("o(?=[bcdfgklmnpstvz]e[sd]?>)", "OW"),
    ("u(?=[bcdfgklmnpstvz]e[sd]?>)", "UW"),
    ("(?<=[a-z][a-z])e(?=s?>)", ""),
    # Vowels
    ("(?<=w)a(?=[tsnl][^e])", "AA"),
    ("a(?=ll|lk|ld)", "AO"),
    ("(?<=<)a(?=[bcdfglmnpst][bcdfglmnpst]?[aeiou])", "AH"),
    ("a", "AE"),
    ("(?<=<[bdrp])e(?=[bcdfglmnpst][aeiouy])", "IH"),
    ("e(?=>)", "IY"),
    ("e(?=[aou])", "IY"),
    ("e", "EH"),
    ("i(?=nd>|ld>)", "AY"),
    ("i(?=>)", "IY"),
    ("i", "IH"),
    ("o(?=>|ld|st>|ll>)", "OW"),
    ("o(?=[bcdfgklmnpstvz][aiouy])", "OW"),
    ("o", "AA"),
    ("(?<=q)u", "W"),
    ("(?<=g)u(?=[aei])", ""),
    ("u(?=[bcdfgklmnpstvz][aeiouy])", "UW"),
    ("u(?=>)", "UW"),
    ("u", "AH"),
    ("(?<=<)y|y(?=[aeou])", "Y"),
    ("y(?=[bcdfgklmnpstvz]e)", "AY"),
    ("y", "IH"),
    # Consonants; doubled ones are one
    ("tch|ch(?![rl])", "CH"),
    ("ck|ch|cc(?![eiy])|kk|k|qu(?=e>)", "K"),
    ("cc", "K S"),
    ("sch(?=[aeioulmnw])", "SH"),
    ("sc(?=[eiy])", "S"),
    ("sh", "SH"),
    ("ss", "S"),
    ("c(?=[eiy])", "S"),
    ("c|q", "K"),
    ("dge|dj", "JH"),
    ("gg", "G"),
    ("gh(?=[aeiou])", "G"),
    ("gh", ""),
    ("gn(?=>)", "N"),
    ("g(?=[eiy])", "JH"),
    ("g", "G"),
    ("j", "JH"),
    ("ph|ff|f", "F"),
    ("(?<=m)b(?=>)", ""),
    ("bb?", "B"),
    ("dd?", "D"),
    ("(?<=[a-z])h(?![aeiouy])", ""),
    ("h", "HH"),
    ("ll?", "L"),
    ("mm?", "M"),
    ("ng(?=>|s>|[a-z]?st)", "NG"),
    ("n(?=k|g[aourl]|x)", "NG"),
    ("nn?", "N"),
    ("pp?", "P"),
    ("rh|rr?", "R"),
    ("s(?=ure)", "ZH"),
    ("(?<=[aeiou])s(?=[aeiouy])|(?<=[aeioubdglmnrvwy])s(?=>)", "Z"),
    ("s", "S"),
    ("th(?=e[rs]|y>)", "DH"),
    ("th", "TH"),
    ("tt?", "T"),
    ("v+", "V"),
    ("wh", "W"),
    ("w(?![aeiouyh])", ""),
    ("w", "W"),
    ("x", "K S"),
    ("zz|z", "Z"),
)
_COMPILED = [(re.compile(spelling), phones) for spelling, phones in _RULES]
_SILENT = re.compile("['<>]")

# Changes with the rules: times that rest on them must not be mixed with others.
RULES_SHA256 = hashlib.sha256(repr(_RULES).encode()).hexdigest()

LETTER_NAMES = {
    **{"a": "EY", "b": "B IY", "c": "S IY", "d": "D IY", "e": "IY", "f": "EH F", "g": "JH IY", "h": "EY CH", "i": "AY"},
    **{"j": "JH EY", "k": "K EY", "l": "EH L", "m": "EH M", "n": "EH N", "o": "OW", "p": "P IY", "q": "K Y UW"},
    **{"r": "AA R", "s": "EH S", "t": "T IY", "u": "Y UW", "v": "V IY", "w": "D AH B AH L Y UW", "x": "EH K S"},
    **{"y": "W AY", "z": "Z IY"},
}


def pronounce(word: str) -> str:
    """ARPABET phones of a word by spelling rules; a word without vowels is spelt, letter by letter.

    The rules are a rough guess: good enough to align a name, not to teach one.

    Args:
        word: lower case letters a to z and apostrophes.

    Returns:
        Phones, separated by spaces.

    Raises:
        ValueError: the word has other characters, or no letters.
    """
    if not re.fullmatch("[a-z']*[a-z][a-z']*", word):
        raise ValueError(f"word {word!r} is not made of the letters a to z: spell it out in English")
    if not re.search("[aeiouy]", word):
        return " ".join(LETTER_NAMES[letter] for letter in word if letter != "'")
    padded, position, phones = f"<{word}>", 0, []
    while position < len(padded):
        if _SILENT.match(padded, position) and not padded.startswith("'s>", position):
            position += 1
            continue
        match, sound = next(
            (match, sound) for spelling, sound in _COMPILED if (match := spelling.match(padded, position))
        )
        phones.append(sound)
        position = match.end()
    return " ".join(filter(None, phones))
