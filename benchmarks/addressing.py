"""Find address arithmetic in Triton's IR that can overflow 32 bits.

`ptr + offset` is wrong from 2**31 elements on if any part of the offset was a product of sizes in 32 bits:
64k tokens * K 8 * D 4096 is exactly that many. Single sizes fit 32 bits, and so do indices below them. The
rule is about what an offset is made of, so that a kernel can be checked without tensors of that size:

- in 32 bits, nothing may be multiplied but by a constant, a loaded index not even that, nothing twice;
- a program id that was multiplied in 32 bits must be made 64-bit before it becomes an offset;
- what something is divided by may be any product: numbers of blocks, whose product is at most the grid.
"""

import re
from dataclasses import dataclass, field

PROGRAM_ID = "a program id"
LOADED = "a loaded index"
SCALED = "a multiple of a program id"
OVERFLOW = "a product in 32 bits"

_LINE = re.compile(r"^(?:(%[\w.$-]+)(?::(\d+))? = )?\"?([a-z_]+\.[\w.]+)\"?(.*)$")
_OPERAND = re.compile(r"%[\w.$-]+(?:#\d+)?")
_BITS = re.compile(r"(?:x|\b)i(\d+)\b")
_REGION_ARGUMENT = re.compile(r"(%[\w.$-]+) = (%[\w.$-]+(?:#\d+)?)")
_LOCATION = re.compile(r" loc\((.*)\)$")


@dataclass(frozen=True)
class _Value:
    """What an SSA value is made of."""

    facts: frozenset[str] = frozenset()
    constant: bool = False


_SOURCES = {
    "arith.cmpi": _Value(),
    "arith.constant": _Value(constant=True),
    "tt.get_program_id": _Value(frozenset({PROGRAM_ID})),
    "tt.load": _Value(frozenset({LOADED})),
}


@dataclass
class _Region:
    """An operation whose body is being read: a loop, a branch, or the inside of a reduction."""

    operation: str
    line: int
    results: list[str]
    arguments: list[str] = field(default_factory=list)
    leaving: list[_Value] = field(default_factory=list)


def _join(*values: _Value) -> _Value:
    return _Value(frozenset().union(*(value.facts for value in values)))


def _join_lists(first: list[_Value], second: list[_Value]) -> list[_Value]:
    if not first or not second:
        return first or second
    return [_join(a, b) for a, b in zip(first, second, strict=True)]


class _Reader:
    """One pass over the text, in which every name is known where it is used.

    Names are used again in other regions, so the text is read in order. `carried` holds what an earlier pass
    saw a loop hand to its next round.
    """

    def __init__(self, carried: dict[int, list[_Value]]) -> None:
        self.carried = carried
        self.values: dict[str, _Value] = {}
        self.regions: list[_Region] = []
        self.found: list[tuple[str, str]] = []  # what is wrong, and the location's name

    def read(self, number: int, line: str) -> None:
        location = _LOCATION.search(line)
        text = _LOCATION.sub("", line).strip()
        if text.startswith("^bb"):
            self._enter_block(text)
        elif text.startswith("}"):
            if not text.endswith("{"):
                self._leave()
        elif match := _LINE.match(text):
            self._operation(number, text, match, location.group(1) if location else "")
        elif text.endswith("{"):  # the module
            self.regions.append(_Region("", number, []))

    def _operation(self, number: int, text: str, match: re.Match, location: str) -> None:
        result, count, name, rest = match.groups()
        results = [f"{result}#{i}" for i in range(int(count))] if count else [result] if result else []
        operands = [self.values.get(operand, _Value()) for operand in _OPERAND.findall(rest)]
        if name in ("scf.yield", "scf.condition"):
            self._hand_over(name, operands)
        else:
            value = self._value(name, rest, operands)
            for each in results:
                self.values[each] = value
        if name == "tt.addptr":
            self._check_offset(_BITS.findall(rest)[-1], operands[1], location)
        if text.endswith("{"):
            self._enter(name, number, rest, results)

    def _value(self, name: str, rest: str, operands: list[_Value]) -> _Value:
        joined = _join(*operands)
        bits = _BITS.findall(rest)
        if name in _SOURCES:
            return _SOURCES[name]
        if name in ("arith.muli", "arith.shli") and bits and int(bits[-1]) <= 32:
            return _product(operands)
        if name in ("arith.divsi", "arith.remsi"):
            return _quotient(name, *operands)
        if name in ("arith.extsi", "arith.extui"):
            return _Value(joined.facts - {SCALED}, operands[0].constant)
        keeps_constants = name in ("tt.splat", "tt.broadcast", "tt.expand_dims", "tt.reshape")
        return _Value(joined.facts, keeps_constants and all(operand.constant for operand in operands))

    def _check_offset(self, bits: str, offset: _Value, location: str) -> None:
        if OVERFLOW in offset.facts:
            self.found.append((f"an offset contains {OVERFLOW}", location))
        elif int(bits) <= 32 and SCALED in offset.facts:
            self.found.append((f"a 32-bit offset contains {SCALED}", location))

    # --- regions ---

    def _enter(self, name: str, number: int, rest: str, results: list[str]) -> None:
        region = _Region(name, number, results)
        self.regions.append(region)
        if name not in ("scf.while", "scf.for"):
            return
        pairs = _REGION_ARGUMENT.findall(rest)  # of scf.for, the first is its counter
        first = [self.values.get(start, _Value()) for _, start in pairs]
        carried = self.carried.get(number, [])
        if name == "scf.for":
            counter, start = pairs[0]
            step = _OPERAND.findall(rest)[3]
            self.values[counter] = _join(self.values.get(start, _Value()), self.values.get(step, _Value()))
            pairs, first = pairs[1:], first[1:]
        region.arguments = [name for name, _ in pairs]
        for argument, value in zip(region.arguments, _join_lists(first, carried), strict=True):
            self.values[argument] = _join(value)

    def _enter_block(self, text: str) -> None:
        """The body of a while loop gets what its condition lets through; a reduction's gets nothing known."""
        names = re.findall(r"(%[\w.$-]+):", text)
        region = self.regions[-1]
        known = region.leaving if region.operation == "scf.while" else []
        for i, name in enumerate(names):
            self.values[name] = known[i] if i < len(known) else _Value()

    def _hand_over(self, name: str, operands: list[_Value]) -> None:
        region = self.regions[-1]
        if name == "scf.condition":
            region.leaving = operands[1:]
        elif region.operation == "scf.if":
            region.leaving = _join_lists(region.leaving, operands)
        elif region.operation in ("scf.while", "scf.for"):
            self.carried[region.line] = _join_lists(self.carried.get(region.line, []), operands)
            if region.operation == "scf.for":
                region.leaving = operands

    def _leave(self) -> None:
        region = self.regions.pop()
        if region.operation.startswith("scf."):
            for result, value in zip(region.results, region.leaving, strict=False):
                self.values[result] = _join(value)


def _product(operands: list[_Value]) -> _Value:
    facts = _join(*operands).facts
    if all(operand.constant for operand in operands):
        return _Value(facts, True)
    if facts & {SCALED, LOADED} or not any(operand.constant for operand in operands):
        return _Value(facts | {OVERFLOW})
    return _Value(facts | {SCALED} if PROGRAM_ID in facts else facts)


def _quotient(name: str, value: _Value, divisor: _Value) -> _Value:
    """A program id is divided by numbers of blocks; their product is at most the grid, which fits 32 bits."""
    if name == "arith.remsi" and not divisor.facts & {PROGRAM_ID, LOADED}:
        return _Value(value.facts & {OVERFLOW})  # below a size, whatever was divided
    return _Value(value.facts)


def _source_lines(ttir: str) -> dict[str, str]:
    """Location name -> `file:line`, through calls and names."""
    defined = dict(re.findall(r"^(#loc\d*) = loc\((.*)\)$", ttir, flags=re.MULTILINE))

    def resolve(text: str, depth: int = 0) -> str:
        if place := re.search(r'"([^"]+)":(\d+):', text):
            return f"{place.group(1).rpartition('/')[2]}:{place.group(2)}"
        name = re.search(r"#loc\d*", text)
        return resolve(defined.get(name.group(0), ""), depth + 1) if name and depth < 50 else "?"

    return {name: resolve(name) for name in defined}


def overflows(ttir: str) -> list[str]:
    """A sentence for each offset of a compiled kernel that breaks the rule; empty if none does."""
    carried: dict[int, list[_Value]] = {}
    for _ in range(4):  # facts only grow; nested loops need a pass per level
        reader = _Reader(carried)
        for number, line in enumerate(ttir.splitlines()):
            reader.read(number, line)
    places = _source_lines(ttir)
    return list(dict.fromkeys(f"{places.get(where, '?')}: {what}" for what, where in reader.found))
