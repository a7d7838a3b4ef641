"""Which tiles the wgmma of a kernel read: by its PTX, and by the machine code that ptxas made of it.

A wgmma takes tiles of shared memory by 64-bit descriptors: an address and strides. ptxas computes them in halves, and
ptxas 12.8 was seen to take a half from the wrong register: the kernel then multiplies another tile, and no error is
raised. So both texts are executed for one thread, from the first line to the last, as far as descriptors need it: each
loop once, with every branch not taken. What cannot be known that way is None.
"""

import re
from collections.abc import Callable, Iterator, Sequence

Descriptors = list[tuple[int | None, ...]]  # of each wgmma, in order: that of A unless A is in registers, and that of B

SHARED_BASE = 0x400  # where the shared memory of a block begins
LOW = 2**32 - 1
_PTX = re.compile(r"^\s*([a-z][\w.:]*)\s+(.*);")
_PTX_WGMMA = re.compile(r"wgmma\.mma_async\S+ (\{[^}]*\}), (\{[^}]*\}|%rd\d+), (%rd\d+),")
_TARGET = re.compile(r"U?[RP]\d+|U?PT|U?RZ")
_SASS = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@(!?U?P\w+) )?([A-Z][\w.]*)\s*([^;]*);")


def misread(ptx: str, sass: str) -> Descriptors:
    """The descriptors of wgmma that read another tile than their PTX says. What stays unknown passes."""
    meant, read = of_ptx(ptx), of_sass(sass)
    if len(meant) != len(read):  # ptxas unrolled a loop, whose rounds may differ in the address
        layouts = {layout for each in _known(meant) for layout in _layouts(each)}
        return [each for each in _known(read) if not layouts.issuperset(_layouts(each))]
    pairs = zip(meant, read, strict=True)
    return [b for a, b in pairs if None not in a and None not in b and a != b]


def _layouts(descriptors: tuple[int, ...]) -> list[int]:
    return [each >> 14 for each in descriptors]


def _known(descriptors: Descriptors) -> Descriptors:
    return [each for each in descriptors if None not in each]


def of_ptx(text: str) -> Descriptors:
    known: dict[str, int | None] = {}
    found: Descriptors = []
    for line in text.splitlines():
        if wgmma := _PTX_WGMMA.search(line):
            _, a, b = wgmma.groups()
            found.append(tuple(known.get(name) for name in (a, b) if name.startswith("%")))
        elif instruction := _PTX.match(line):
            opcode, arguments = instruction[1].split("."), [x.strip() for x in instruction[2].split(",")]
            if arguments[0].startswith("%"):
                values = [_ptx_value(x, known) for x in arguments[1:]]
                compute = _COMPARE.get(opcode[1]) if opcode[0] == "setp" else _PTX_COMPUTE.get(opcode[0])
                bits = 64 if arguments[0].startswith("%rd") else 32
                if opcode[0] == "setp" and opcode[-1].startswith("s"):
                    values = [None if x is None else _signed(x) for x in values]
                known[arguments[0].partition("|")[0]] = _apply(compute, values, bits)
    return found


def _ptx_value(text: str, known: dict[str, int | None]) -> int | None:
    if text == "global_smem":
        return SHARED_BASE
    if text.startswith("%"):  # of thread 0 in block 0
        return 0 if re.match(r"%(tid|ctaid)\.", text) else known.get(text)
    return int(text, 0) if re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)", text) else None


def _apply(compute: Callable[..., int] | None, values: Sequence[int | None], bits: int) -> int | None:
    """None if an operand is not known, or for another form of the instruction, with fewer."""
    needed = 0 if compute is None else compute.__code__.co_argcount
    if compute is None or len(values) < needed or None in values[:needed]:
        return None
    return compute(*values[:needed]) % 2**bits


def _signed(value: int) -> int:
    return (value + 2**31) % 2**32 - 2**31


_COMPARE: dict[str, Callable[..., int]] = {
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
}

_PTX_COMPUTE: dict[str, Callable[..., int]] = {
    "mov": lambda a: a,
    "cvt": lambda a: a,
    "shfl": lambda a: a,
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "mad": lambda a, b, c: a * b + c,
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "xor": lambda a, b: a ^ b,
    "shl": lambda a, b: a << b,
    "shr": lambda a, b: a >> b,
    "bfe": lambda a, b, c: a >> b & (1 << c) - 1,
    "selp": lambda a, b, p: a if p else b,
}


def of_sass(text: str) -> Descriptors:
    machine = _Machine()
    return list(machine.run(text))


class _Machine:
    """Integer registers of one thread, its uniform registers and its predicates."""

    def __init__(self) -> None:
        self.registers: dict[str, int | None] = {}

    def run(self, text: str) -> Iterator[tuple[int | None, ...]]:
        for predicate, opcode, operands in _SASS.findall(text):
            arguments = [x.strip() for x in operands.split(",")]
            if opcode.startswith("HGMMA"):
                yield self._descriptors(arguments)
                continue
            targets = _targets(opcode, arguments)
            if targets:
                results = self._results(opcode, targets, arguments)
                runs = self._value(predicate) if predicate else 1
                for target, value in results.items():
                    if runs != 0:
                        self.registers[target] = value if runs else None

    def _descriptors(self, arguments: Sequence[str]) -> tuple[int | None, ...]:
        """Four uniform registers hold those of A and B; where A is in registers, only the last two are read."""
        position = next(i for i, x in enumerate(arguments) if x.startswith("gdesc"))
        first = int(re.search(r"\d+", arguments[position])[0])
        pairs = (first + 2,) if position == 2 else (first, first + 2)
        return tuple(self._wide(f"UR{i}") for i in pairs)

    def _results(self, opcode: str, targets: list[str], arguments: list[str]) -> dict[str, int | None]:
        """What an instruction writes to each register; None for what is not computed here."""
        name, *kinds = opcode.removeprefix("U").split(".")
        target, predicates = targets[0], targets[1:]
        if name == "SHFL":
            return {targets[-1]: self._value(arguments[0])}
        if name == "CS2R":
            return _halves(target, 0 if arguments == ["SRZ"] else None)
        if name == "ISETP":
            values = [self._value(x) for x in arguments[:2]]
            if "U32" not in kinds:
                values = [None if x is None else _signed(x) for x in values]
            return dict.fromkeys(targets[1:], None) | {target: _apply(_COMPARE.get(kinds[0].lower()), values, 32)}
        if name == "IADD3" and "64" in kinds:
            return _halves(target, self._sum([self._wide(x) for x in arguments[:3]]))
        if name == "IADD3":
            total = self._sum([None if x is None else x & LOW for x in map(self._value, arguments[:3])])
            carried = [self._value(x) for x in arguments[3:]] if "X" in kinds else []
            total = self._sum([total, *carried])
            carry = None if total is None else total >> 32
            return {target: None if total is None else total & LOW} | dict.fromkeys(predicates, carry)
        compute = _SASS_COMPUTE.get((name, *kinds))
        if compute is None:
            written = [target]
            for _ in range(_more_registers(opcode)):
                written.append(_next(written[-1]))
            return dict.fromkeys([*written, *predicates], None)
        return {target: _apply(compute, [self._value(x) for x in arguments], 32)} | dict.fromkeys(predicates, None)

    @staticmethod
    def _sum(values: Sequence[int | None]) -> int | None:
        return None if None in values else sum(values)

    def _wide(self, text: str) -> int | None:
        negative, name = text.startswith("-"), text.lstrip("-")
        if not re.fullmatch(r"U?R\d+", name):
            value = self._value(name)
        else:
            low, high = self.registers.get(name), self.registers.get(_next(name))
            value = None if low is None or high is None else high << 32 | low
        return None if value is None else -value % 2**64 if negative else value

    def _value(self, text: str) -> int | None:
        text = text.removesuffix(".reuse")
        if text.startswith("-") and not text[1:2].isdigit():
            value = self._value(text[1:])
            return None if value is None else -value
        if text.startswith("!"):
            value = self._value(text[1:])
            return None if value is None else int(not value)
        if text in ("PT", "UPT"):
            return 1
        if text in ("RZ", "URZ") or text.startswith("SR_"):  # thread 0 of block 0
            return 0
        if re.fullmatch(r"-?(0x[0-9a-f]+|\d+)", text):
            return int(text, 0)
        return self.registers.get(text)


def _targets(opcode: str, arguments: list[str]) -> list[str]:
    """Take what an instruction writes from the front of its arguments."""
    targets = []
    if arguments and _TARGET.fullmatch(arguments[0]):
        targets.append(arguments.pop(0))
        if opcode.startswith("SHFL") and targets[0].startswith("P"):
            targets.append(arguments.pop(0))
        while arguments and re.fullmatch(r"U?P\w", arguments[0]):
            targets.append(arguments.pop(0))
    return targets


def _halves(register: str, value: int | None) -> dict[str, int | None]:
    low, high = (None, None) if value is None else (value & LOW, value >> 32 & LOW)
    return {register: low, _next(register): high}


def _more_registers(opcode: str) -> int:
    if re.search(r"\.128\b|^LDSM", opcode):
        return 3
    return int(bool(re.search(r"\.(64|WIDE)\b|^(DADD|DMUL|DFMA)", opcode)))


def _next(register: str) -> str:
    return re.sub(r"\d+$", lambda number: str(int(number[0]) + 1), register)


def _lop3(a: int, b: int, c: int, table: int) -> int:
    bits = ((a >> i & 1) << 2 | (b >> i & 1) << 1 | c >> i & 1 for i in range(32))
    return sum((table >> index & 1) << i for i, index in enumerate(bits))


_SASS_COMPUTE: dict[tuple[str, ...], Callable[..., int]] = {
    ("MOV",): lambda a: a,
    ("S2R",): lambda a: a,
    ("S2UR",): lambda a: a,
    ("R2UR",): lambda a: a,
    ("VIADD",): lambda a, b: a + b,
    ("IMAD", "MOV", "U32"): lambda a, b, c: c,
    ("IMAD", "SHL", "U32"): lambda a, b: a * b,
    ("IMAD", "U32"): lambda a, b, c: a * b + c,
    ("IMAD", "IADD"): lambda a, b, c: a * b + c,
    ("IMAD",): lambda a, b, c: a * b + c,
    ("LEA",): lambda a, b, c: (a << c) + b,
    ("LEA", "HI"): lambda a, b, c, d: ((c << 32 | a & LOW) << d >> 32) + b,
    ("SHF", "R", "U32", "HI"): lambda a, b, c: (c & LOW) >> b,
    ("SHF", "L", "U32"): lambda a, b: a << b,
    ("SEL",): lambda a, b, p: a if p else b,
    ("SGXT", "U32"): lambda a, b: a & (1 << b) - 1,
    ("LOP3", "LUT"): lambda a, b, c, table: _lop3(a, b, c, table),
}
