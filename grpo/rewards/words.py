"""Words that may or may not stand behind a number: units belong to it, the others make something else of it."""


def _words(*lines: str) -> frozenset[str]:
    return frozenset(" ".join(lines).split())


UNITS = _words(
    "mm cm dm m km ft in yd mi mg g kg lb lbs oz ml cl dl l L",
    "s sec secs min mins h hr hrs ms ns d wk wks mo mos",
    "yr yrs",
    "am pm AM PM mph kmh kph rpm bpm fps dpi px pt pts Hz kHz MHz GHz V mV kV A mA W kW MW GW Wh kWh J kJ MJ cal kcal",
    "N",
    "Pa kPa C F K B KB MB GB TB kB ha acre sq cu USD EUR GBP CNY RMB INR JPY usd eur Rs rs cts ct p.m a.m ppm mol",
    "th st nd rd kr zł pcs pc pkg ea bps nm dB Ω € £ ¥",
)
"""Short words that are known as units; longer words are taken for units without a list."""
SHORT = _words(
    "of in is as at on an we he so it us per the for are all day bus car cup box pen egg",
    "de du la le el al il un les par por pro je pr",
)
"""Other words of two letters, and some that must not be read as variables."""
SINGLE_LETTERS = _words("m g s h l L V A W J K N C F d Ω")
"""Letters that are a unit when written behind a number in plain text."""

NOT_BEHIND = _words(
    # another number follows, or a condition
    "or and to plus minus times by over mod modulo if when where und oder bis et ou til till until",
    "through",
    "vs versus out but et/ou and/or or/and either и или да",
    # what these make of a number is another number
    "squared cubed factorial divided multiplied choose percentile halves half thirds fourths fifths sixths sevenths",
    "eighths ninths tenths hundredths thousandths",
    # names of functions and constants
    "pi sqrt sin cos tan cot sec csc log ln exp arcsin arccos arctan theta alpha beta gamma lambda phi infinity inf",
    "infty root cbrt abc xyz dx dy",
)
"""Directly behind a number these say that it is not the whole answer."""
SCALES = _words(
    "hundred thousand million billion trillion dozen lakh crore mille mil milion millón millones milliard",
    "tausend hundert dutzend docena тысяч миллион миллиард тыс млн млрд k bn tn mn mrd mio",
)
SCALE_STARTS = ("thousand", "million", "milliard", "billion", "trillion", "hundred", "dozen", "тысяч", "миллион")
NUMBER_WORDS = _words(
    "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen",
    "eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety half quarter third another",
)
BEFORE_AN_ASIDE = _words("in for after within during at from since because")
"""Behind a unit these begin what is no longer the answer: "42 apples in 3 days"."""


def is_scale(word: str) -> bool:
    """Whether it multiplies the number: "5 million", "5k"."""
    return word in SCALES or word.startswith(SCALE_STARTS)
